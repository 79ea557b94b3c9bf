from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from latentrt.bundle import manifest as manifest_module
from latentrt.bundle.manifest import (
    MAX_MANIFEST_BYTES,
    ConfigChange,
    LatentSpace,
    Manifest,
    SchedulerRecord,
    decode_manifest,
    encode_manifest,
    named_files,
    schema,
)
from latentrt.bundle.sample import bundle_path
from latentrt.errors import ManifestError
from tests.runtime.small_bundle import FILES, manifest, write_bundle

SCHEMA_FILE = Path(manifest_module.__file__).with_name("bundle.schema.json")


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


def test_a_manifest_round_trips(good: Manifest) -> None:
    assert decode_manifest(encode_manifest(good)) == good


def test_the_encoding_is_canonical(good: Manifest) -> None:
    shuffled = msgspec.structs.replace(good, files=dict(reversed(good.files.items())))
    assert encode_manifest(shuffled) == encode_manifest(good)
    assert encode_manifest(good).startswith(b'{\n  "format_version": 2,\n')
    assert encode_manifest(good).endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2)])
def test_a_value_that_json_cannot_represent_is_not_written(good: Manifest, value: object) -> None:
    schedulers = {"unet": msgspec.structs.replace(good.schedulers["unet"], config={"beta_start": value})}
    with pytest.raises(ManifestError, match="JSON cannot represent"):
        encode_manifest(msgspec.structs.replace(good, schedulers=schedulers))


def test_an_infinity_is_written_as_a_text_and_read_as_a_number(good: Manifest) -> None:
    config = {"a": math.inf, "b": [-math.inf, 1.5], "c": {"d": -math.inf}, "e": "Infinity?", "f": None}
    change = ConfigChange(key="a", found=math.inf, used=1, tasks=("inpainting",))
    record = SchedulerRecord.of("DDIMScheduler", config, (change,))
    written = encode_manifest(msgspec.structs.replace(good, schedulers={"unet": record}))
    read = decode_manifest(written).schedulers["unet"]
    assert read == record
    assert (read.config["a"], read.config["b"], read.changes[0].found) == ("Infinity", ["-Infinity", 1.5], "Infinity")
    assert read.config_for("text-to-image", "DDIMScheduler") == config
    assert read.config_for("inpainting", "DDIMScheduler") == {**config, "a": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"key": "a", "found": 0, "used": 1, "tasks": ["dancing"]}], "expected the bundle's tasks"),
        ([{"key": "a", "found": 0, "used": 1, "tasks": ["inpainting"]}] * 2, "two changes of one key"),
    ],
)
@pytest.mark.parametrize("place", ["scheduler", "default size"])
def test_changes_of_a_configuration_are_of_the_bundles_tasks(
    tree: Any, place: str, changes: list[Any], message: str
) -> None:
    (tree["schedulers"]["unet"] if place == "scheduler" else tree["defaults"])["changes"] = changes
    told = refusal(json.dumps(tree).encode())
    assert place in told
    assert message in told


def test_an_impossible_manifest_is_not_written(good: Manifest) -> None:
    with pytest.raises(ManifestError, match="expected a denoiser among them"):
        encode_manifest(msgspec.structs.replace(good, components={}))


def test_the_published_schema_is_current() -> None:
    assert SCHEMA_FILE.read_bytes() == schema(), (
        "write it anew: python -c 'import sys; from latentrt.bundle.manifest import schema; "
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
        lambda tree: tree.update(tasks=["Text To Image"]),
        lambda tree: tree["components"]["unet"].update(role="sampler"),
        lambda tree: tree["components"]["unet"]["inputs"][0].update(source="somewhere"),
        lambda tree: tree.pop("tokenizers"),
    ],
)
def test_schema_and_reader_refuse_the_same(tree: Any, spoil: Callable[[Any], None]) -> None:
    spoil(tree)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json.loads(SCHEMA_FILE.read_bytes()), jsonschema.Draft202012Validator)
    refusal(json.dumps(tree).encode())


PATTERNED: dict[Any, str] = {
    manifest_module.ComponentName: "unet",
    manifest_module.PartName: "slice.1",
    manifest_module.FamilyName: "stable-diffusion-1",
    manifest_module.TaskName: "text-to-image",
    manifest_module.InputSource: "option:clip_skip",
    manifest_module.Sha256: "0" * 64,
    manifest_module.Repository: "owner/name-1.0",
    manifest_module.Commit: "0" * 40,
}


def find_patterns(schema_part: Any) -> set[str]:
    if isinstance(schema_part, list):
        return {pattern for each in schema_part for pattern in find_patterns(each)}
    if not isinstance(schema_part, dict):
        return set()
    own = {schema_part["pattern"]} if isinstance(schema_part.get("pattern"), str) else set()
    return own | find_patterns(list(schema_part.values()))


def test_a_pattern_is_of_the_whole_text() -> None:
    """Python's `$` also matches before a newline at the end."""
    described = find_patterns(json.loads(SCHEMA_FILE.read_bytes()))
    assert described == {kind.__metadata__[0].pattern for kind in PATTERNED}
    for kind, text in PATTERNED.items():
        msgspec.convert(text, kind)
        for wrong in (f"{text}\n", f"\n{text}", f"{text}\n\n", f"{text}\n{text}", f"{text} "):
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert(wrong, kind)
            schema_of_kind = {"type": "string", "pattern": kind.__metadata__[0].pattern}
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema_of_kind, jsonschema.Draft202012Validator)


def test_a_newer_format_requires_an_upgrade(tree: Any) -> None:
    message = refusal(json.dumps(tree | {"format_version": 3}).encode())
    assert message.startswith("this bundle is format 3, this latentrt reads 2; upgrade")
    assert "pip install -U latentrt" in message


def test_an_older_format_is_to_be_exported_again() -> None:
    assert "format 1" in refusal(b'{"format_version": 1, "everything": "else"}')


def test_a_newer_format_is_refused_before_its_unknown_keys() -> None:
    assert "format 7" in refusal(b'{"format_version": 7, "everything": "else", "is": ["different"]}')


@pytest.mark.parametrize("version", ["0", "-1", "true", '"1"', "1.0", "null", "[1]"])
def test_a_format_version_that_is_not_a_number(version: str) -> None:
    assert "format_version" in refusal(b'{"format_version": %s}' % version.encode())


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '"bundle"'])
def test_json_that_is_not_a_manifest(text: str) -> None:
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
    del tree["tokenizers"]
    assert "`tokenizers`" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("precision",), "bfloat16"),
        (("family",), "Stable Diffusion"),
        (("limits", "max_batch"), "4"),
        (("limits", "max_batch"), 0),
        (("latent_spaces", "unet", "scale"), None),
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
    assert "is not a manifest of format 2" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_json_does_not_have(good: Manifest, number: str) -> None:
    data = encode_manifest(good).replace(b"0.18215", number.encode())
    assert number in refusal(data)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**80])
def test_a_number_of_more_than_64_bits(tree: Any, number: int) -> None:
    tree["schedulers"]["unet"]["config"]["num_train_timesteps"] = number
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


# Contradictions


def contradiction(tree: Any) -> str:
    message = refusal(json.dumps(tree).encode())
    assert "expected" in message
    return message


def test_every_file_has_a_role(tree: Any) -> None:
    roles = dict(named_files(decode_manifest(json.dumps(tree).encode())))
    assert set(roles) == set(FILES)
    assert roles["unet/model.safetensors"] == "the weights of unet"


@pytest.mark.parametrize(
    "path",
    [
        "../elsewhere",
        "unet/../../elsewhere",
        "unet/..",
        "..",
        ".",
        "./LICENSE",
        "unet/./model.onnx",
        "/etc/passwd",
        "//server/share",
        "unet//model.onnx",
        "unet/",
        "unet\\model.onnx",
        "..\\elsewhere",
        "C:/windows",
        "C:windows",
        "LICENSE:stream",
        "bundle.json",
        "Bundle.JSON",
        "a\0b",
        "a\nb",
        "a\x1b[2Jb",
        "a\u202eb",
    ],
)
def test_a_path_that_no_bundle_may_name(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    message = contradiction(tree)
    assert repr(path) in message
    assert message.isprintable()


@pytest.mark.parametrize("path", ["", "a" * 1025])
def test_a_path_of_impossible_length(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    assert "length" in contradiction(tree)


@pytest.mark.parametrize("path", ["weights/größe.safetensors", "a b/c d", "...", "..a", ".hidden"])
def test_an_unusual_path_that_is_valid(tree: Any, path: str) -> None:
    tree["files"][path] = tree["files"]["LICENSE"]
    assert path in decode_manifest(json.dumps(tree).encode()).files


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_role_that_is_not_pinned(tree: Any, name: str) -> None:
    del tree["files"][name]
    assert "not pinned" in contradiction(tree)


@pytest.mark.parametrize(("name", "role"), [("unet", "denoiser"), ("vae_decoder", "decoder")])
def test_a_missing_component(tree: Any, name: str, role: str) -> None:
    del tree["components"][name]
    assert f"expected a {role} among them" in contradiction(tree)


def test_a_component_with_an_unusual_name(tree: Any) -> None:
    tree["components"]["prior_2"] = {**tree["components"]["unet"], "graphs": add_graph(tree, "prior_2/model.onnx")}
    for key in ("schedulers", "latent_spaces"):
        tree[key]["prior_2"] = tree[key]["unet"]
    assert decode_manifest(json.dumps(tree).encode()).by_role("denoiser") == ("unet", "prior_2")


@pytest.mark.parametrize("name", ["", "UNet", "un et", "unet/..", "1unet"])
def test_a_component_with_an_impossible_name(tree: Any, name: str) -> None:
    tree["components"][name] = tree["components"]["unet"]
    assert "components" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize("tasks", [[], ["edit", "edit"]])
def test_tasks_are_named_once(tree: Any, tasks: list[str]) -> None:
    assert "tasks" in contradiction(tree | {"tasks": tasks})


@pytest.mark.parametrize(
    ("key", "owner"), [("schedulers", "unet"), ("latent_spaces", "unet"), ("tokenizers", "text_encoder")]
)
def test_the_records_that_each_component_needs(tree: Any, key: str, owner: str) -> None:
    tree[key]["vae_decoder"] = tree[key][owner]
    assert f"{key} are of" in contradiction(tree)
    tree[key] = {}
    assert f"expected one of each of ['{owner}']" in contradiction(tree)


def test_a_scheduler_of_another_purpose(tree: Any) -> None:
    level = {"name": "class_labels", "dtype": "int64", "shape": ["evaluations"], "source": "noise-level"}
    tree["components"]["unet"]["inputs"].append(level)
    assert "low_res_scheduler" in contradiction(tree)
    tree["schedulers"]["low_res_scheduler"] = tree["schedulers"]["unet"]
    assert "low_res_scheduler" in decode_manifest(json.dumps(tree).encode()).schedulers


def test_a_depth_estimator_without_preprocessing(tree: Any) -> None:
    tree["components"]["vae_encoder"] = {
        **tree["components"]["unet"],
        "role": "depth-estimator",
        "inputs": [{"name": "pixels", "dtype": "float32", "shape": ["batch", 3, 8, 8], "source": "image"}],
        "outputs": [{"name": "predicted_depth", "dtype": "float32", "shape": ["batch", 8, 8]}],
        "graphs": add_graph(tree, "vae_encoder/other.onnx"),
    }
    assert "vae_encoder has no preprocessing" in contradiction(tree)
    preprocessing = {"height": 8, "width": 8, "resample": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1]}
    tree["components"]["vae_encoder"]["preprocessing"] = preprocessing
    decode_manifest(json.dumps(tree).encode())
    preprocessing["std"] = [1, 1, 0]
    assert "std" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize("source", ["text_encoder.states", "image_encoder.out"])
def test_an_input_from_nowhere(tree: Any, source: str) -> None:
    tree["components"]["unet"]["inputs"][2]["source"] = source
    assert f"encoder_hidden_states comes from {source}" in contradiction(tree)


TWICE = "text_encoder.hidden_states+text_encoder.hidden_states"


def test_outputs_are_joined_along_the_last_axis(tree: Any) -> None:
    embeddings = tree["components"]["unet"]["inputs"][2]
    embeddings.update(source=TWICE, shape=["evaluations", "tokens", 8])
    spec = decode_manifest(json.dumps(tree).encode()).components["unet"].inputs[2]
    assert spec.made_by == (("text_encoder", "hidden_states"),) * 2
    embeddings["source"] = "text_encoder.hidden_states+other.states"
    assert "comes from text_encoder.hidden_states+other.states, expected an output" in contradiction(tree)


@pytest.mark.parametrize(
    ("shape", "second", "fragment"),
    [
        (["evaluations", "tokens", 4], None, "expected 8 values in its last axis"),
        (["evaluations", "tokens", "width"], None, "expected 8 values in its last axis"),
        (["evaluations", 8], None, "differ in the last axis alone"),
        (["evaluations", "tokens", 8], ["chunks", 4], "differ in the last axis alone"),
        (["evaluations", "tokens", 8], ["chunks", 5, 4], "differ in the last axis alone"),
    ],
)
def test_outputs_that_cannot_be_joined(
    tree: Any, shape: list[int | str], second: list[int | str] | None, fragment: str
) -> None:
    encoder, unet = (tree["components"][name] for name in ("text_encoder", "unet"))
    if second is not None:
        encoder["outputs"].append({"name": "other", "dtype": "float32", "shape": second})
    source = TWICE if second is None else "text_encoder.hidden_states+text_encoder.other"
    unet["inputs"][2].update(source=source, shape=shape)
    assert fragment in contradiction(tree)


@pytest.mark.parametrize("source", ["a.b+", "+a.b", "a.b+c", "a.b c.d", "latents+a.b", "a.b++c.d"])
def test_a_source_of_another_form(tree: Any, source: str) -> None:
    tree["components"]["unet"]["inputs"][2]["source"] = source
    assert "source" in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("dtype", "shape", "count", "allowed"),
    [
        ("float32", ["evaluations", 6], 1, True),
        ("float32", ["evaluations", 5], 1, True),
        ("float32", ["evaluations", 6], 2, False),
        ("int64", ["evaluations", 6], 1, False),
        ("float32", ["evaluations", 7], 1, False),
        ("float32", ["evaluations"], 1, False),
    ],
)
def test_micro_conditioning_has_sizes_or_a_score(
    tree: Any, dtype: str, shape: list[int | str], count: int, allowed: bool
) -> None:
    for number in range(count):
        tree["components"]["unet"]["inputs"].append(
            {"name": f"time_ids_{number}", "dtype": dtype, "shape": shape, "source": "micro-conditioning"}
        )
    if allowed:
        assert decode_manifest(json.dumps(tree).encode()).components["unet"].input_from("micro-conditioning")
    else:
        assert "expected one float32 with 6 or 5 values" in contradiction(tree)


@pytest.mark.parametrize("axis", ["", "8 * height", "x*y", "0*height", "-1", "height*8"])
def test_an_axis_of_another_form(tree: Any, axis: str) -> None:
    tree["components"]["unet"]["inputs"][0]["shape"][0] = axis
    assert "expected axes such as" in contradiction(tree)


def test_a_bundle_without_classifier_is_a_bundle(tree: Any) -> None:
    del tree["components"]["safety_checker"]
    decode_manifest(json.dumps(tree).encode())


def test_no_graph_for_the_precision(tree: Any) -> None:
    assert "float16" in contradiction(tree | {"precision": "float16"})


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_name_twice_in_a_signature(tree: Any, kind: str) -> None:
    tree["components"]["unet"][kind] *= 2
    assert "each name once" in contradiction(tree)


def test_a_component_without_outputs(tree: Any) -> None:
    tree["components"]["unet"]["outputs"] = []
    assert "at least one" in contradiction(tree)


def test_a_gate_that_was_missed(tree: Any) -> None:
    tree["components"]["unet"]["graphs"]["float32"]["gate"][0]["value"] = 1.0
    assert "missed its gate" in contradiction(tree)


@pytest.mark.parametrize(
    ("metric", "bound", "most"), [("relative", 1e9, 0.01), ("absolute", 0.03, 0.02), ("levels", 5, 4), ("rms", 1, 0.05)]
)
def test_a_gate_that_nothing_can_miss(tree: Any, metric: str, bound: float, most: float) -> None:
    gate = tree["components"]["unet"]["graphs"]["float32"]["gate"][0]
    gate.update(metric=metric, bound=bound)
    assert f"has the {metric} bound {bound:g} for {gate['output']!r}, expected at most {most:g}" in contradiction(tree)


@pytest.mark.parametrize(
    ("component", "metric", "expected"),
    [
        ("unet", "levels", "relative"),
        ("unet", "absolute", "relative"),
        ("unet", "rms", "relative"),
        ("vae_decoder", "relative", "levels"),
        ("safety_checker", "levels", "absolute"),
    ],
)
def test_a_metric_by_which_another_kind_of_output_is_compared(
    tree: Any, component: str, metric: str, expected: str
) -> None:
    """An absolute difference of 4 is small between pixels, and more than any value that a denoiser predicts."""
    gate = tree["components"][component]["graphs"]["float32"]["gate"][0]
    gate.update(metric=metric, bound=gate["value"])
    assert f"has the metric '{metric}' for {gate['output']!r}, expected '{expected}'" in contradiction(tree)


LATENTS = {"name": "latents", "dtype": "float32", "shape": ["batch", 4, "height", "width"]}
HEAD = {"inputs": [LATENTS], "outputs": [{**LATENTS, "name": "result", "shape": ["batch", 8, "height", "width"]}]}
FEATURES = {"name": "features", "dtype": "float32", "shape": ["batch", 8, "halo_rows", "width"]}
PIXELS = {"name": "pixels", "dtype": "uint8", "shape": ["batch", "8*rows", "8*width", 3]}
LAST = {"inputs": [FEATURES], "outputs": [PIXELS]}
MEAN = {"name": "mean", "dtype": "float32", "shape": ["batch", 4]}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"head": HEAD, "slice.1": LAST}, r"has the slices ['slice.1'], expected ['slice.0']"),
        ({"slice.0": LAST}, "has slices behind [], expected head alone, or head, attention and neck"),
        ({"head": HEAD, "neck": HEAD, "slice.0": LAST}, "has slices behind ['head', 'neck']"),
        ({"head": HEAD, "slice.0": {**LAST, "inputs": [MEAN]}}, "slice.0 part is not a slice"),
        ({"head": HEAD, "slice.0": {**LAST, "outputs": [PIXELS, MEAN]}}, "and one output"),
        ({"head": {**HEAD, "outputs": [MEAN]}, "slice.0": LAST}, "head part has the outputs mean float32[batch, 4]"),
        ({"head": HEAD, "slice.0": {**LAST, "inputs": [FEATURES, MEAN]}}, "expected mean and variance, or neither"),
        ({"head": HEAD, "slice.0": {**LAST, "outputs": [MEAN]}}, "slice.0 part makes mean"),
        (
            {"head": HEAD, "slice.0": {**LAST, "outputs": [{**MEAN, "shape": ["batch"]}]}, "slice.1": LAST},
            "slice.0 part makes mean float32[batch], expected float32['batch', 'channels'",
        ),
        (
            {
                "head": HEAD,
                "slice.0": {**LAST, "outputs": [{**FEATURES, "shape": ["batch", "channels", "rows", "width"]}]},
                "slice.1": LAST,
            },
            "slice.0 part makes features float32[batch, channels, rows, width], expected float32['batch', 'channels'",
        ),
        (
            {"head": HEAD, "slice.0": {**LAST, "outputs": [{**PIXELS, "shape": ["batch", "rows", "width", 3]}]}},
            "enlarge latents 1 times together, expected 8",
        ),
    ],
)
def test_slices_that_cannot_be_run(tree: Any, parts: dict[str, dict[str, Any]], message: str) -> None:
    decoder = tree["components"]["vae_decoder"]
    decoder["parts"] = {name: {**part, "graphs": decoder["graphs"]} for name, part in parts.items()}
    assert message in contradiction(tree)


@pytest.mark.parametrize(
    ("component", "part", "output", "shape"),
    [
        ("unet", "body", "noise_pred", ["evaluations", 4, "height", "tokens"]),
        ("unet", "shallow_body", "noise_pred", ["evaluations", 4, "width", "height"]),
        ("vae_decoder", "attention", "attended", ["batch", "tokens", 64]),
    ],
)
def test_a_part_whose_output_has_other_axes_than_its_input(
    component: str, part: str, output: str, shape: list[Any]
) -> None:
    """Of another size it would end in numpy's error, or be broadcast without one."""
    tree = json.loads((bundle_path() / "bundle.json").read_bytes())
    decode_manifest(json.dumps(tree).encode())
    specs = tree["components"][component]["parts"][part]["outputs"]
    next(spec for spec in specs if spec["name"] == output)["shape"] = shape
    assert f"{component}'s {part} part makes {output}" in contradiction(tree)


def test_slices_that_can_be_run(tree: Any) -> None:
    decoder = tree["components"]["vae_decoder"]
    decoder["parts"] = {
        name: {**part, "graphs": add_graph(tree, f"vae_decoder/{name}.onnx")}
        for name, part in (("head", HEAD), ("slice.0", LAST))
    }
    decode_manifest(json.dumps(tree).encode())


def add_graph(tree: Any, file: str) -> Any:
    """Add a graph to the files of a manifest, and return the records of a component or part with it alone."""
    tree["files"][file] = tree["files"]["unet/model.onnx"]
    return {"float32": {**tree["components"]["unet"]["graphs"]["float32"], "file": file}}


def test_two_graphs_in_one_file(tree: Any) -> None:
    """They would have to agree with two signatures."""
    tree["components"]["vae_decoder"]["graphs"] = tree["components"]["unet"]["graphs"]
    assert "'unet/model.onnx' is named as two graphs" in contradiction(tree)


def add_inpainting_inputs(tree: Any) -> list[dict[str, Any]]:
    """Give the decoder the image and the mask of inpainting; return its inputs."""
    inputs: list[dict[str, Any]] = tree["components"]["vae_decoder"]["inputs"]
    for name, channels in (("image", 3), ("mask", 1)):
        shape = ["batch", channels, "8*height", "8*width"]
        inputs.append({"name": name, "dtype": "float32", "shape": shape, "source": name})
    return inputs


def test_a_decoder_may_take_the_image_and_the_mask_of_inpainting(tree: Any) -> None:
    add_inpainting_inputs(tree)
    decoder = decode_manifest(json.dumps(tree).encode()).components["vae_decoder"]
    assert [spec.source for spec in decoder.inputs] == ["latents", "image", "mask"]


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.pop(),  # an image without a mask
        lambda inputs: inputs.pop(1),
        lambda inputs: inputs.insert(1, inputs.pop()),
        lambda inputs: inputs[1].update(source="mask"),
        lambda inputs: inputs[2].update(source="image"),
        lambda inputs: inputs[2].update(source="noise-level"),
        lambda inputs: inputs[2].update(name="weight"),
        lambda inputs: inputs[2].update(dtype="uint8"),
        lambda inputs: inputs[2].update(shape=["batch", 3, "8*height", "8*width"]),
        lambda inputs: inputs[1].update(shape=["batch", 1, "8*height", "8*width"]),
        lambda inputs: inputs[2].update(shape=["batch", 1, "height", "width"]),
        lambda inputs: inputs[2].update(shape=["batch", 1, "8*width", "8*height"]),
        lambda inputs: inputs[2].update(shape=["images", 1, "8*height", "8*width"]),
        lambda inputs: inputs.append({**inputs[2], "name": "more", "source": "option:more"}),
    ],
)
def test_a_decoder_takes_no_other_inputs(tree: Any, change: Any) -> None:
    change(add_inpainting_inputs(tree))
    assert "vae_decoder has " in contradiction(tree)


def test_a_decoder_with_slices_takes_latents_alone(tree: Any) -> None:
    add_inpainting_inputs(tree)
    decoder = tree["components"]["vae_decoder"]
    decoder["parts"] = {
        name: {**part, "graphs": decoder["graphs"]} for name, part in (("head", HEAD), ("slice.0", LAST))
    }
    assert "expected latents float32[batch, 4, height, width], and no output but pixels" in contradiction(tree)


def test_a_preview_decoder_takes_latents_alone(tree: Any) -> None:
    add_inpainting_inputs(tree)
    components = tree["components"]
    components["preview_decoder"] = {**components["vae_decoder"], "role": "preview-decoder"}
    components["vae_decoder"] = {**components["vae_decoder"], "inputs": components["vae_decoder"]["inputs"][:1]}
    assert "preview_decoder has the inputs" in contradiction(tree)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"length": 76}, "length 76, expected that of input_ids int64[chunks, 77]"),
        ({"length": 10**9}, "length"),
        ({"length": 2}, "length"),
        ({"rows": 49407}, "end 49407, expected an id below its 49407 rows"),
        ({"rows": 49408, "pad": 49408}, "pad 49408"),
        ({"rows": 49408, "begin": 10**9}, "begin 1000000000"),
        ({"rows": 0}, "rows"),
        ({"begin": -1}, "begin"),
    ],
)
def test_a_tokenizer_that_does_not_suit_its_encoder(tree: Any, changes: dict[str, int], fragment: str) -> None:
    tree["tokenizers"]["text_encoder"].update(changes)
    assert fragment in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize(("key", "most"), [("max_prompt_characters", 20_000), ("max_prompt_chunks", 256)])
def test_limits_of_prompts_are_bounded(tree: Any, key: str, most: int) -> None:
    tree["limits"][key] = most
    assert getattr(decode_manifest(json.dumps(tree).encode()).limits, key) == most
    for value in (0, most + 1):
        tree["limits"][key] = value
        assert key in refusal(json.dumps(tree).encode())


@pytest.mark.parametrize("name", ["", "slice.", "slice.01", "slice.100", "Head", "head.a", "two words"])
def test_a_part_of_another_name(tree: Any, name: str) -> None:
    decoder = tree["components"]["vae_decoder"]
    decoder["parts"] = {name: {key: decoder[key] for key in ("inputs", "outputs", "graphs")}}
    assert "parts" in contradiction(tree)


@pytest.mark.parametrize(
    ("side", "pixels", "message"), [("height", 60, "multiple"), ("width", 8, "within"), ("width", 136, "within")]
)
def test_a_default_size_that_cannot_be_generated(tree: Any, side: str, pixels: int, message: str) -> None:
    tree["defaults"][side] = pixels
    assert message in contradiction(tree)


def test_more_default_steps_than_allowed(tree: Any) -> None:
    tree["defaults"]["num_inference_steps"] = 101
    assert "101 steps" in contradiction(tree)


# Latent spaces

FLUX = LatentSpace(channels=16, downscale=8, scale=0.3611, shift=0.1159, patch=2)


def test_the_shape_of_latents() -> None:
    assert LatentSpace(channels=4, downscale=8, scale=0.18215).shape(512, 768) == (4, 64, 96)
    assert FLUX.shape(1024, 512) == (16, 128, 64)


def test_latents_are_normalized_as_in_diffusers() -> None:
    encoded = np.random.default_rng(0).standard_normal((2, 4, 3, 5)).astype(np.float32)
    shifted = LatentSpace(channels=4, downscale=8, scale=0.3611, shift=0.1159)
    np.testing.assert_array_equal(shifted.normalize(encoded), (encoded - np.float32(0.1159)) * np.float32(0.3611))
    mean, std = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
    playground = LatentSpace(channels=4, downscale=8, scale=0.5, mean=mean, std=std)
    found = playground.normalize(encoded)
    assert found.dtype == np.float32
    # StableDiffusionXLImg2ImgPipeline.prepare_latents, by channel.
    for channel in range(4):
        expected = (encoded[:, channel] - np.float32(mean[channel])) * np.float32(0.5) / np.float32(std[channel])
        np.testing.assert_array_equal(found[:, channel], expected)
    np.testing.assert_array_equal(playground.normalize(encoded[0]), found[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.0] * 4}, "one of mean and std"),
        ({"std": [1.0] * 4}, "one of mean and std"),
        ({"mean": [0.0] * 3, "std": [1.0] * 4}, "a mean of 3 values, expected 4"),
        ({"mean": [0.0] * 4, "std": [1.0] * 5}, "a std of 5 values, expected 4"),
        ({"mean": [0.0] * 4, "std": [1.0] * 4, "shift": 0.5}, "mean and shift 0.5"),
    ],
)
def test_statistics_of_latents_that_contradict(tree: Any, values: dict[str, Any], message: str) -> None:
    tree["latent_spaces"]["unet"].update(values)
    assert message in contradiction(tree)


def test_sides_are_multiples_of_every_latent_space(good: Manifest) -> None:
    assert good.side_multiple == 8
    spaces = {**good.latent_spaces, "flux": FLUX, "odd": LatentSpace(channels=4, downscale=12, scale=1)}
    assert msgspec.structs.replace(good, latent_spaces=spaces).side_multiple == 48


def test_latents_are_packed_as_flux_packs_them() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 16, 4, 6)).astype(np.float32)
    # diffusers, FluxPipeline._pack_latents
    theirs = latents.reshape(2, 16, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, 6, 64)
    packed = FLUX.pack(latents)
    assert np.array_equal(packed, theirs)
    assert np.array_equal(packed[0, 1].reshape(16, 2, 2), latents[0, :, :2, 2:4])
    assert np.array_equal(FLUX.unpack(packed, 4, 6), latents)
    assert np.array_equal(FLUX.pack(latents[0]), packed[0])
    assert np.array_equal(FLUX.unpack(packed[0], 4, 6), latents[0])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("latent_spaces.unet.channels", 10**6),
        ("latent_spaces.unet.downscale", 2**31),
        ("latent_spaces.unet.patch", 10**6),
        ("latent_spaces.unet.frames", 10**6),
        ("latent_spaces.unet.multiple", 10**6),
        ("latent_spaces.unet.scale", 0),
        ("latent_spaces.unet.scale", 1e308),
        ("latent_spaces.unet.shift", 1e308),
        ("tokenizers.text_encoder.length", 10**9),
        ("tokenizers.text_encoder.begin", 2**31),
        ("limits.max_side", 65_536),
        ("limits.max_batch", 10**6),
        ("limits.max_steps", 10**9),
        ("limits.max_clip_skip", 10**6),
        ("limits.max_noise_level", 10**9),
        ("defaults.height", 65_536),
        ("defaults.num_inference_steps", 10**9),
        ("defaults.guidance_scale", 1e308),
        ("files.LICENSE.size", 2**62),
        ("source.name", "a" * 2000),
        ("created_by", "a" * 2000),
        ("schedulers.unet.class_name", "a" * 2000),
        ("family", "a" * 2000),
        ("components.unet.inputs.0.shape", [1] * 17),
        ("components.unet.inputs.0.shape.1", 0),
        ("components.unet.inputs.0.shape.1", 2**31),
        ("components.unet.inputs.0.name", "a" * 2000),
        ("components.unet.graphs.float32.opset", 10**6),
    ],
)
def test_a_value_beyond_its_bound(tree: Any, place: str, value: object) -> None:
    *keys, last = place.split(".")
    node = tree
    for key in keys:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    message = refusal(json.dumps(tree).encode())
    assert "is not a manifest of format 2: Expected" in message
    assert len(message) < 600


def test_limits_that_no_side_fulfils(tree: Any) -> None:
    tree["limits"] |= {"min_side": 128, "max_side": 64}
    assert "expected them in order" in contradiction(tree)
    tree["limits"] |= {"min_side": 16, "max_side": 128}
    tree["latent_spaces"]["unet"] |= {"patch": 1021, "multiple": 1019}
    assert "of at most 16384" in contradiction(tree)


def test_a_name_that_is_no_unicode_is_not_written(good: Manifest) -> None:
    source = msgspec.structs.replace(good.source, name="\udcff")
    with pytest.raises(ManifestError, match="not valid Unicode"):
        encode_manifest(msgspec.structs.replace(good, source=source))
