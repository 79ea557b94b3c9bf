"""How does `bundle.json` become a manifest, and a manifest `bundle.json`?

Reading is strict, as a manifest decides what is run: one meaning per text (UTF-8, no key twice, no NaN), the format
version before anything else, no key that this version does not know. Whether a well-formed manifest makes sense is
asked by `latentrt.bundle.manifest_checks`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from latentrt.bundle.manifest import FORMAT_VERSION, Manifest
from latentrt.bundle.manifest_checks import check_manifest
from latentrt.bundle.printable import printable
from latentrt.bundle.strict_json import AmbiguousJSONError, parse_json
from latentrt.errors import ManifestError

__all__ = ["MAX_MANIFEST_BYTES", "decode_manifest", "encode_manifest", "schema"]

# A manifest of a large model has some thousand file and node names; what is a hundred times larger is not one.
MAX_MANIFEST_BYTES = 16 << 20

_SCHEMA_ID = f"urn:latentrt:bundle:{FORMAT_VERSION}"


def decode_manifest(data: bytes) -> Manifest:
    """Read `bundle.json`.

    Raises:
        ManifestError: it is too large, not strict JSON, of another format version, or says something impossible.
    """
    tree = _parse(data)
    _check_version(tree)
    # One parser reads the text, once: what was checked above is what is converted, not a second parser's opinion of
    # the same bytes.
    try:
        manifest = msgspec.convert(tree, Manifest)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ManifestError(
            f"bundle.json is not a manifest of format {FORMAT_VERSION}: {printable(str(error))}; expected what "
            f"bundle.schema.json describes. {_MEND}"
        ) from None
    check_manifest(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The one way of writing a manifest: UTF-8, two spaces of indentation, the keys of mappings sorted, a newline
    at the end.

    Raises:
        ManifestError: `decode_manifest` would refuse it, or would read something else.
    """
    data = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"
    if decode_manifest(data) != manifest:
        raise ManifestError(
            "the manifest holds a value that JSON cannot carry (a tuple or a NaN in the scheduler's configuration)"
        )
    return data


def schema() -> bytes:
    """The JSON schema of `bundle.json`, as `bundle.schema.json` beside this file publishes it."""
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": _SCHEMA_ID,
        **msgspec.json.schema(Manifest),
    }
    return json.dumps(described, indent=2, ensure_ascii=False).encode() + b"\n"


_MEND = "Copy or download the bundle again, or write a new one: latentrt export CHECKPOINT BUNDLE"


def _parse(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"bundle.json is larger than {MAX_MANIFEST_BYTES:,} bytes, which no manifest is. {_MEND}")
    try:
        return parse_json(data)
    except AmbiguousJSONError as error:
        raise ManifestError(f"bundle.json {error}. {_MEND}") from None


def _check_version(tree: Any) -> None:
    """Before anything else: a newer format may differ in everything else."""
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if type(version) is not int or version < 1:
        raise ManifestError(
            f"bundle.json says no format_version, expected {FORMAT_VERSION}: it is not a bundle's manifest. {_MEND}"
        )
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"this bundle is format {version}, this latentrt reads {FORMAT_VERSION}; upgrade latentrt: "
            "pip install -U latentrt"
        )
