"""The card of a bundle's repository on the Hugging Face hub: README.md, with the entries that the hub reads.

The card is not part of the bundle: no manifest pins it, and no run reads it. Text of the manifest, which may come from
someone else, stands in it in code spans and in JSON strings only, so that it is neither markup nor YAML.
"""

from __future__ import annotations

import json
import re

from latentrt import __version__
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Manifest

__all__ = ["CARD_NAME", "write_card"]

CARD_NAME = "README.md"
# The hub's names of licences that checkpoints of this kind have; it refuses a card with another one, unless that is
# called "other" and named beside it.
_LICENCES = {
    "apache-2.0",
    "mit",
    "openrail",
    "openrail++",
    "creativeml-openrail-m",
    "bigscience-openrail-m",
    "bigscience-bloom-rail-1.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-3.0",
    "cc-by-sa-4.0",
    "cc-by-sa-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nd-4.0",
    "gpl-2.0",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
    "mpl-2.0",
    "unlicense",
    "wtfpl",
    "isc",
    "unknown",
}
_PIPELINE_TAGS = {"text-to-image": "text-to-image", "upscaling": "image-to-image", "inpainting": "image-to-image"}


def write_card(bundle: Bundle, repository: str) -> str:
    """Return the card of a bundle in a repository `owner/name`."""
    manifest = bundle.manifest
    source = manifest.source.repository or manifest.source.name
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in _entries(manifest).items()),
        "---",
        "",
        f"# {repository.partition('/')[2]}",
        "",
        f"A latentrt bundle: {_code(source)} as ONNX graphs with weights in "
        f"{_code(manifest.precision)}, {manifest.size_bytes / 1e9:.2f} GB, which run without torch.",
        "",
        f"- Tasks: {', '.join(map(_code, manifest.tasks))}",
        f"- Components: {', '.join(map(_code, manifest.components))}",
        f"- Default size and steps: {manifest.defaults.width} × {manifest.defaults.height}, "
        f"{manifest.defaults.num_inference_steps}",
        f"- Licence: {_code(manifest.licence.name)}"
        + (f", its text is in {_code(manifest.licence.file)}" if manifest.licence.file else ""),
        f"- Safety checker: {'yes' if manifest.by_role('classifier') else 'none'}",
        *([f"- Source: {_code(f'{source}@{manifest.source.revision}')}"] if manifest.source.revision else []),
        *(["- It contains engines, native code that runs where it fits"] if manifest.engines else []),
        f"- Digest: {_code(bundle.digest)}",
        "",
        "```bash",
        "pip install 'latentrt[cpu,hub]'",
        f"latentrt pull {repository} my-bundle --digest {bundle.digest}",
        'latentrt run my-bundle "a prompt"',
        "```",
        "",
        "```python",
        "from latentrt import Pipeline",
        "",
        f'pipeline = Pipeline.load("my-bundle", digest="{bundle.digest}")',
        'pipeline("a prompt").save("image.png")',
        "```",
        "",
        f"Written by latentrt {__version__}; exported by {_code(manifest.created_by)}.",
    ]
    return "\n".join(lines) + "\n"


def _entries(manifest: Manifest) -> dict[str, object]:
    """Return the entries that the hub reads, in its words."""
    name = manifest.licence.name.lower()
    named = {"license": name} if name in _LICENCES else {"license": "other", "license_name": _slug(name)}
    tag = next((_PIPELINE_TAGS[task] for task in manifest.tasks if task in _PIPELINE_TAGS), "image-to-image")
    return {
        "library_name": "latentrt",
        **named,
        **({"license_link": "LICENSE"} if "license_name" in named and manifest.licence.file == "LICENSE" else {}),
        **({"base_model": manifest.source.repository} if manifest.source.repository else {}),
        "pipeline_tag": tag,
        "tags": ["latentrt", "onnx", manifest.family, *(task for task in manifest.tasks if task != tag)],
    }


def _slug(name: str) -> str:
    """Return a name of a licence in the form that the hub accepts."""
    return re.sub(r"[^a-z0-9.+]+", "-", name).strip("-.")[:80] or "unknown"


def _code(text: str) -> str:
    """Return a text as code: printable, on one line, without the sign that ends it."""
    return f"`{''.join(c if c.isprintable() and c != '`' else ' ' for c in text)[:200]}`"
