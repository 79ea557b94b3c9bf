from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from latentrt.bundle import manifest_json
from latentrt.bundle.manifest import Manifest
from latentrt.bundle.manifest_json import MAX_MANIFEST_BYTES, decode_manifest, encode_manifest, schema
from latentrt.errors import ManifestError
from tests.runtime.small_bundle import manifest, write_bundle

SCHEMA_FILE = Path(manifest_json.__file__).with_name("bundle.schema.json")


@pytest.fixture
def good(tmp_path: Path) -> Manifest:
    return manifest(write_bundle(tmp_path / "bundle"))


@pytest.fixture
def tree(good: Manifest) -> Any:
    return json.loads(encode_manifest(good))


def refusal(data: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        decode_manifest(data)
    assert "latentrt export" in str(caught.value) or "pip install -U latentrt" in str(caught.value)
    return str(caught.value)


def test_a_manifest_comes_back_as_it_was(good: Manifest) -> None:
    assert decode_manifest(encode_manifest(good)) == good


def test_there_is_one_way_of_writing(good: Manifest) -> None:
    shuffled = msgspec.structs.replace(good, files=dict(reversed(good.files.items())))
    assert encode_manifest(shuffled) == encode_manifest(good)
    assert encode_manifest(good).startswith(b'{\n  "format_version": 1,\n')
    assert encode_manifest(good).endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2)])
def test_what_json_cannot_carry_is_not_written(good: Manifest, value: object) -> None:
    scheduler = msgspec.structs.replace(good.scheduler, config={"beta_start": value})
    with pytest.raises(ManifestError, match="JSON cannot carry"):
        encode_manifest(msgspec.structs.replace(good, scheduler=scheduler))


def test_an_impossible_manifest_is_not_written(good: Manifest) -> None:
    with pytest.raises(ManifestError, match="expected text_encoder among them"):
        encode_manifest(msgspec.structs.replace(good, components={}))


def test_the_published_schema_is_current() -> None:
    assert SCHEMA_FILE.read_bytes() == schema(), (
        "write it anew: python -c 'import sys; from latentrt.bundle.manifest_json import schema; "
        "sys.stdout.buffer.write(schema())' > runtime/latentrt/bundle/bundle.schema.json"
    )


def test_a_real_manifest_fulfils_the_schema(tree: Any) -> None:
    described = json.loads(SCHEMA_FILE.read_bytes())
    jsonschema.Draft202012Validator.check_schema(described)
    jsonschema.validate(tree, described, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree.update(colour="red"),
        lambda tree: tree["files"]["LICENSE"].update(sha256="short"),
        lambda tree: tree.update(precision="bfloat16"),
        lambda tree: tree.pop("tokenizer"),
    ],
)
def test_schema_and_reader_refuse_the_same(tree: Any, spoil: Callable[[Any], None]) -> None:
    spoil(tree)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json.loads(SCHEMA_FILE.read_bytes()), jsonschema.Draft202012Validator)
    refusal(json.dumps(tree).encode())


def test_a_newer_format_is_told_to_upgrade(tree: Any) -> None:
    message = refusal(json.dumps(tree | {"format_version": 2}).encode())
    assert message.startswith("this bundle is format 2, this latentrt reads 1; upgrade")
    assert "pip install -U latentrt" in message


def test_a_newer_format_is_refused_before_its_unknown_keys() -> None:
    assert "format 7" in refusal(b'{"format_version": 7, "everything": "else", "is": ["different"]}')


@pytest.mark.parametrize("version", ["0", "-1", "true", '"1"', "1.0", "null", "[1]"])
def test_a_format_version_that_is_no_number(version: str) -> None:
    assert "format_version" in refusal(b'{"format_version": %s}' % version.encode())


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '"bundle"'])
def test_json_that_is_no_manifest(text: str) -> None:
    assert "not a bundle's manifest" in refusal(text.encode())


def test_an_unknown_key(tree: Any) -> None:
    assert "`colour`" in refusal(json.dumps(tree | {"colour": "red"}).encode())


def test_an_unknown_key_deep_inside(tree: Any) -> None:
    tree["components"]["unet"]["weights"]["colour"] = "red"
    assert "`colour`" in refusal(json.dumps(tree).encode())


def test_an_unknown_key_cannot_talk_to_the_terminal(tree: Any) -> None:
    message = refusal(json.dumps(tree | {"\x1b[31mred\x07": 1}).encode())
    assert r"\x1b[31mred\x07" in message
    assert message.isprintable()


def test_a_duplicate_key_at_the_top(good: Manifest) -> None:
    data = encode_manifest(good).replace(b'"precision"', b'"precision": "float16", "precision"', 1)
    assert "'precision' twice" in refusal(data)


def test_a_duplicate_key_deep_inside(good: Manifest) -> None:
    data = encode_manifest(good).replace(b'"sha256": "', b'"sha256": "%s", "sha256": "' % (b"0" * 64), 1)
    assert "'sha256' twice" in refusal(data)


def test_a_duplicate_key_written_with_an_escape(good: Manifest) -> None:
    data = encode_manifest(good).replace(b'"precision"', b'"\\u0070recision": "float16", "precision"', 1)
    assert "'precision' twice" in refusal(data)


def test_a_missing_key(tree: Any) -> None:
    del tree["tokenizer"]
    assert "`tokenizer`" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("precision",), "bfloat16"),
        (("family",), "stable-diffusion-9"),
        (("limits", "max_batch"), "4"),
        (("limits", "max_batch"), 0),
        (("latents", "scaling_factor"), None),
        (("files", "LICENSE", "sha256"), "A" * 64),
        (("files", "LICENSE", "size"), -1),
        (("files",), []),
        (("components", "unet", "inputs"), {}),
        (("safety",), "off"),
    ],
)
def test_a_wrong_value(tree: Any, place: tuple[str, ...], value: object) -> None:
    target = tree
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    assert "is not a manifest of format 1" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_json_does_not_have(good: Manifest, number: str) -> None:
    data = encode_manifest(good).replace(b"0.18215", number.encode())
    assert number in refusal(data)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**80])
def test_a_number_of_more_than_64_bits(tree: Any, number: int) -> None:
    tree["scheduler"]["config"]["num_train_timesteps"] = number
    assert "64 bits" in refusal(json.dumps(tree).encode())


def test_a_number_of_too_many_digits() -> None:
    assert "64 bits" in refusal(b'{"format_version": 1%s}' % (b"0" * 5000))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_manifest(good: Manifest, share: float) -> None:
    data = encode_manifest(good)
    assert "truncated" in refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"\x80\x02}q\x00.", b"PK\x03\x04", b"<html></html>", b"{'a': 1}", b"{} {}"])
def test_not_json(data: bytes) -> None:
    assert "expected JSON" in refusal(data) or "not JSON" in refusal(data)


def test_not_utf8(good: Manifest) -> None:
    assert "not UTF-8" in refusal(encode_manifest(good).decode().encode("utf-16"))


def test_nested_without_end() -> None:
    assert "nested" in refusal(b'{"format_version":' + b"[" * 200_000)


def test_a_huge_manifest() -> None:
    assert "larger than" in refusal(b" " * (MAX_MANIFEST_BYTES + 1))
