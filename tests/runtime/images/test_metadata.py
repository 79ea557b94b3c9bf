from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.decode.safety import SafetyRecord
from latentrt.errors import RequestError
from latentrt.images.files import PARAMETERS, RECORD, save
from latentrt.images.metadata import ImageRecord, InputRecord, parameters_line, read_metadata, record_texts
from latentrt.resolve import MAX_SEED

RECORD_OF_A_CIRCLE = ImageRecord(
    prompt="a red circle on a blue background",
    negative_prompt="blurry",
    seed=7,
    options={
        "sampler": "euler_a",
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "eta": 0.1,
        "clip_skip": 1,
        "width": 512,
        "height": 448,
    },
    bundle_digest="sha256:" + "0" * 64,
    bundle_name="my-model",
    latentrt_version="0.1.0",
    safety=SafetyRecord(policy="blur", flagged=True, concepts=(3, 12), highest_score=0.012),
)
EXTENSIONS = ["png", "jpg", "webp"]
TEXTS = st.text() | st.text(st.sampled_from('aN:, "\\\n\r\u2028\x00Steps:Negative prompt:'))


def changed(**changes: object) -> ImageRecord:
    return msgspec.structs.replace(RECORD_OF_A_CIRCLE, **changes)


def with_options(**options: object) -> ImageRecord:
    """Return the record with other options; None removes one."""
    merged = {**RECORD_OF_A_CIRCLE.options, **options}
    return changed(options={name: value for name, value in merged.items() if value is not None})


def saved(record: ImageRecord, place: Path) -> Path:
    save(Image.new("RGB", (16, 8)), place, record_texts(record))
    return place


def understood(text: str) -> tuple[str, str, dict[str, str]]:
    """The text as the tools of this field read it: prompt, negative prompt, and the fields of the last line."""
    *lines, last = text.strip().split("\n")
    fields = dict(re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        negative = negative or line.startswith("Negative prompt:")
        prompts[negative].append(line.removeprefix("Negative prompt:").strip() if negative else line)
    unquoted = {key: json.loads(value) if value.startswith('"') else value for key, value in fields.items()}
    return "\n".join(prompts[False]), "\n".join(prompts[True]), unquoted


def test_the_line() -> None:
    assert parameters_line(RECORD_OF_A_CIRCLE) == (
        "a red circle on a blue background\n"
        "Negative prompt: blurry\n"
        "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 512x448, Model: my-model, Clip skip: 2, Eta: 0.1, "
        "CFG Rescale phi: 0.7, RNG: CPU, Safety: blur (flagged), "
        f'Bundle: "sha256:{"0" * 64}", Version: latentrt 0.1.0'
    )


def test_the_hash_of_a_checkpoint_file() -> None:
    """AUTOMATIC1111's web UI knows a model by the first ten digits of its file's SHA-256."""
    record = changed(model_sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa")
    assert "Size: 512x448, Model hash: 6ce0161689, Model: my-model, " in parameters_line(record)
    assert understood(parameters_line(record))[2]["Model hash"] == "6ce0161689"
    assert "Model hash" not in parameters_line(RECORD_OF_A_CIRCLE), "a folder has no such file"


def test_the_line_of_a_plain_image() -> None:
    plain = with_options(eta=None, guidance_rescale=None, clip_skip=None)
    line = parameters_line(msgspec.structs.replace(plain, negative_prompt="", safety=SafetyRecord(policy="off")))
    for absent in ("Negative", "Clip skip", "Eta", "CFG Rescale", "Denoising", "Image CFG", "Schedule type"):
        assert absent not in line
    assert ", Safety: off," in line


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"strength": 0.6}, "Denoising strength: 0.6"),
        ({"image_guidance_scale": 1.5}, "Image CFG scale: 1.5"),
        ({"karras": True}, "Schedule type: Karras"),
        ({"sampler_options": {"use_exponential_sigmas": True}}, "Schedule type: Exponential"),
        ({"sampler_options": {"use_beta_sigmas": True}}, "Schedule type: Beta"),
        ({"sampler": "ddim"}, "Sampler: DDIM"),
        ({"sampler": "dpmpp_2m"}, "Sampler: DPM++ 2M"),
        ({"sampler": "dpmpp_2m", "sampler_options": {"algorithm_type": "sde-dpmsolver++"}}, "Sampler: DPM++ 2M SDE"),
        ({"sampler": "ipndm"}, "Sampler: ipndm"),  # it has no name there
    ],
)
def test_fields_have_the_names_that_other_tools_read(options: dict[str, object], field: str) -> None:
    assert f", {field}," in parameters_line(with_options(**options))


def test_an_image_from_embeddings_has_no_prompt() -> None:
    assert parameters_line(changed(prompt=None, negative_prompt=None)).startswith("Steps: 25,")


@pytest.mark.parametrize(
    "prompt",
    [
        "a\nNegative prompt: nothing",
        "Negative prompt: nothing",
        "a\n  negative PROMPT: nothing",
        "a\rNegative prompt: nothing",
        "a\u2028Negative prompt: nothing",
        "a\x0bNegative prompt: nothing",
        "a\nSteps: 1, Sampler: DDIM, CFG scale: 1, Seed: 666, Size: 8x8",
        'a", Seed: 666, "',
    ],
)
def test_a_prompt_cannot_pass_for_something_else(prompt: str) -> None:
    positive, negative, fields = understood(parameters_line(changed(prompt=prompt)))
    assert negative == "blurry"
    assert positive.startswith(prompt[0])
    assert (fields["Steps"], fields["Seed"], fields["Size"]) == ("25", "7", "512x448")
    # Nor does it for tools that look for a line that begins with the first field.
    assert len(re.findall(r"(?m)^Steps:", parameters_line(changed(prompt=prompt)))) == 1


@settings(max_examples=300, deadline=None)
@given(prompt=TEXTS, negative=TEXTS, name=TEXTS)
def test_no_text_reaches_the_fields(prompt: str, negative: str, name: str) -> None:
    line = parameters_line(changed(prompt=prompt, negative_prompt=negative, bundle_name=name))
    expected = understood(parameters_line(RECORD_OF_A_CIRCLE))[2]
    fields = understood(line)[2]
    assert {**fields, "Model": ""} == {**expected, "Model": ""}
    assert fields["Model"] == re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", name)
    line.encode()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=TEXTS | st.text(st.characters(codec=None)) | st.none(),
    seed=st.integers(0, MAX_SEED),
    options=st.dictionaries(st.sampled_from(["clip_skip", "deep_cache", "eta", "guidance_end"]), st.integers(1, 9)),
    guidance_scale=st.floats(allow_nan=False, allow_infinity=False),
    parameters=st.none() | TEXTS,
    extension=st.sampled_from(EXTENSIONS),
)
def test_the_record_round_trips(
    tmp_path: Path,
    prompt: str | None,
    seed: int,
    options: dict[str, object],
    guidance_scale: float,
    parameters: str | None,
    extension: str,
) -> None:
    inputs = {"image": InputRecord(digest="sha256:" + "1" * 64, parameters=parameters)}
    options |= {"guidance_scale": guidance_scale, "sampler_options": {"timesteps": [900, 5], "s_tmax": "Infinity"}}
    record = changed(prompt=prompt, seed=seed, options=options, inputs=inputs, given=("latents",))
    found = read_metadata(saved(record, tmp_path / f"out.{extension}"))
    assert found.record == record
    assert found.parameters == parameters_line(record)
    assert (found.width, found.height) == (16, 8)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_image_without_metadata(tmp_path: Path, extension: str) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / f"out.{extension}")
    found = read_metadata(tmp_path / f"out.{extension}")
    assert found.record is None
    assert not found.parameters


def test_an_image_of_another_tool(tmp_path: Path) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png", {PARAMETERS: "a cat\nSteps: 20, Seed: 1"})
    found = read_metadata(tmp_path / "out.png")
    assert found.record is None
    assert found.parameters == "a cat\nSteps: 20, Seed: 1"


def test_a_key_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    tree = json.loads(record_texts(RECORD_OF_A_CIRCLE)[RECORD]) | {"control": "canny"}
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png", {RECORD: json.dumps(tree)})
    assert read_metadata(tmp_path / "out.png").record == RECORD_OF_A_CIRCLE


@pytest.mark.parametrize(
    "text",
    ["", "not JSON", "null", "[]", "{}", '{"seed": "7"}', "[" * 100_000, '{"seed": 1' + "0" * 5000 + "}", "\x1b[31m"],
    ids=range(9),
)
def test_an_invalid_record_is_refused(tmp_path: Path, text: str) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png", {RECORD: text})
    with pytest.raises(RequestError, match=r"latentrt record of .* cannot be read") as caught:
        read_metadata(tmp_path / "out.png")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_image_is_read_or_refused(tmp_path: Path, file_format: str, data: st.DataObject) -> None:
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[file_format]
    spoiled = bytearray(saved(RECORD_OF_A_CIRCLE, tmp_path / f"whole.{extension}").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "image").write_bytes(spoiled[: data.draw(st.integers(0, len(spoiled)))])
    try:
        read_metadata(tmp_path / "image")
    except RequestError as error:
        assert str(error).isprintable()  # noqa: PT017, either outcome is right
