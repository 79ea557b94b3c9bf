"""Results: saved images, their records and their provenance."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentrt import Bundle, Pipeline, Request, RequestError, Verdict
from latentrt.backends.models import Components
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import Source, TokenMerging
from latentrt.errors import MissingAttributeError, OutputError
from latentrt.images.metadata import ImageRecord, read_metadata
from latentrt.result import Result, check_places, numbered

PROMPT = "a red circle"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler", "seed": 3}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", threads=1)


@pytest.fixture
def finish(pipeline: Pipeline) -> Any:
    """Return a function that makes the result of a request of made-up latents."""

    def finish(output_type: Any = "pil", **values: Any) -> Result:
        request = pipeline.resolve(Request.of(**{"prompt": PROMPT, **QUICK, **values}))
        shape = pipeline.family.latent_space.shape(request.height, request.width)
        return pipeline.finish(request, np.zeros((len(request.seeds), *shape), np.float32), output_type)

    return finish


def test_several_images_get_a_number() -> None:
    assert numbered(Path("a/b.png"), 1) == [Path("a/b.png")]
    assert numbered(Path("a/b.c.png"), 2) == [Path("a/b.c-0.png"), Path("a/b.c-1.png")]


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_a_file_carries_its_record(pipeline: Pipeline, finish: Any, tmp_path: Path, extension: str) -> None:
    result = finish(prompt=[PROMPT, "a star"], negative_prompt="blue", clip_skip=1, karras=True)
    paths = result.save(tmp_path / f"image.{extension}")
    assert [path.name for path in paths] == [f"image-0.{extension}", f"image-1.{extension}"]
    record = read_metadata(paths[1]).record
    assert record is not None
    assert record == result.records[1]
    assert (record.prompt, record.negative_prompt, record.seed) == ("a star", "blue", 4)
    assert record.options == {
        "clip_skip": 1,
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "sampler": "euler",
        "karras": True,
        "guidance_scale": 5.0,
    }
    assert (record.task, record.given, record.inputs, record.token_merging) == ("text-to-image", (), {}, 0.0)
    assert (record.bundle_digest, record.bundle_name) == (pipeline.bundle.digest, pipeline.bundle.manifest.source.name)
    assert record.backend == "ONNX Runtime on the CPU"
    assert (record.safety.policy, record.safety.flagged) == ("block", False)


def test_the_file_that_a_bundle_was_exported_from(pipeline: Pipeline, finish: Any) -> None:
    assert finish().records[0].model_sha256 is None, "the sample's checkpoint is a folder"
    manifest = pipeline.bundle.manifest
    file = {"safety_checker/model.safetensors": "0" * 64, "my-model.safetensors": "1" * 64}
    single = Source(name="my-model", layout="single-file", weights=file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.bundle, "manifest", msgspec.structs.replace(manifest, source=single))
        record = finish().records[0]
    assert (record.bundle_name, record.model_sha256) == ("my-model", "1" * 64)


def test_a_sampler_is_recorded_by_its_own_name_with_all_its_options(finish: Any) -> None:
    options = {"lambda_min_clipped": float("-inf"), "solver_order": 3}
    record = finish(sampler="DPM++ 2M Karras", sampler_options=options, num_inference_steps=3).records[0]
    assert record.options["sampler"] == "dpmpp_2m"
    expected = {"use_karras_sigmas": True, "solver_order": 3, "lambda_min_clipped": "-Infinity"}
    assert expected.items() <= record.options["sampler_options"].items()


def test_a_negative_prompt_that_guidance_ignores_is_not_recorded(finish: Any) -> None:
    assert finish(negative_prompt="blue", guidance_scale=1.0).records[0].negative_prompt is None


def test_arrays_are_named_in_the_record(finish: Any) -> None:
    noise, embeds = np.zeros((1, 4, 16, 16), np.float32), np.zeros((1, 77, 128), np.float32)
    assert finish(latents=noise).records[0].given == ("latents",)
    record = finish(prompt=None, prompt_embeds=embeds).records[0]
    assert (record.prompt, record.given) == (None, ("prompt_embeds",))


def test_unchecked_images_are_recorded_as_unchecked(finish: Any) -> None:
    assert finish(safety="off").records[0].safety.policy == "off"
    assert finish(output_type="latent").records[0].safety.policy == "off"


def test_input_images_are_recorded_by_digest(finish: Any, tmp_path: Path) -> None:
    """A file by the digest of its bytes, with the parameters that it carried; an array by the digest of its pixels."""
    (source,) = finish().save(tmp_path / "in.png")
    mask = np.full((64, 64), 255, np.uint8)
    record = finish(image=source, mask_image=mask, strength=0.5).records[0]
    assert record.task == "inpainting"
    assert {*record.inputs} == {"image", "mask_image"}
    assert record.inputs["image"].digest == f"sha256:{hash_bytes(source.read_bytes())}"
    assert record.inputs["image"].parameters == read_metadata(source).parameters
    assert record.inputs["image"].parameters.startswith(PROMPT)
    assert record.inputs["mask_image"].digest.startswith("sha256:")
    assert record.inputs["mask_image"].parameters is None
    assert record.options["strength"] == 0.5
    (place,) = finish(image=source, mask_image=mask).save(tmp_path / "out.webp")
    found = read_metadata(place).record
    assert found is not None
    assert found.inputs == record.inputs


def test_merged_tokens_are_recorded(pipeline: Pipeline, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(pipeline.bundle.folder, tmp_path / "bundle"))
    components = dict(bundle.manifest.components)
    merging = TokenMerging(ratio=0.5, blocks=("down_blocks.0",))
    components["unet"] = msgspec.structs.replace(components["unet"], token_merging=merging)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components=components)
    merged = Pipeline(bundle, Components(pipeline.components.placements))
    request = merged.resolve(Request.of(prompt=PROMPT, **QUICK))
    result = merged.finish(request, np.zeros((1, 4, 16, 16), np.float32), "latent")
    assert result.records[0].token_merging == 0.5


def test_arrays_are_not_saved(finish: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="`output_type`"):
        finish(output_type="np").save(tmp_path / "no.png")
    assert list(tmp_path.iterdir()) == []


def test_places_are_checked_before_the_work(pipeline: Pipeline, tmp_path: Path) -> None:
    def check(path: Path, **values: Any) -> None:
        request = pipeline.resolve(Request.of(**{"prompt": PROMPT, **QUICK, **values}))
        check_places(pipeline.bundle, pipeline.family, request, path)

    check(tmp_path / "out.png")
    with pytest.raises(OutputError, match=r"\.png"):
        check(tmp_path / "out.gif")
    with pytest.raises(OutputError, match="missing"):
        check(tmp_path / "missing" / "out.png")
    long = {"prompt": "☆" * 9_000, "negative_prompt": "☆" * 9_000}  # three bytes each, and the record has them twice
    check(tmp_path / "out.png", **long)
    with pytest.raises(OutputError, match="65,533"):
        check(tmp_path / "out.jpg", **long)
    assert list(tmp_path.iterdir()) == []


def test_a_result_has_the_length_of_its_images(finish: Any) -> None:
    two, arrays = finish(num_images_per_prompt=2), finish("np", num_images_per_prompt=2)
    assert len(two) == len(arrays) == 2
    assert [*two] == two.images
    assert two[1] is two.images[1]
    assert two[-2:] == two.images
    np.testing.assert_array_equal(arrays[1], arrays.images[1])


def test_one_image_has_names_of_its_own(finish: Any) -> None:
    one, two = finish(), finish(num_images_per_prompt=2)
    assert one.image is one.images[0]
    assert one.record is one.records[0]
    for name in ("image", "record"):
        with pytest.raises(MissingAttributeError, match=rf"got `{name}` of a result of 2 images, .*use `{name}s`"):
            getattr(two, name)
        assert not hasattr(two, name)


def test_a_result_is_shown_in_a_line(finish: Any) -> None:
    assert repr(finish()) == "<Result: 1 image of 64 × 64, seed 3>"
    assert repr(finish("np", num_images_per_prompt=2)) == "<Result: float32 array (2, 64, 64, 3), seeds 3, 4>"
    assert repr(finish("latent")) == "<Result: float32 array (1, 4, 16, 16), seed 3>"
    assert repr(finish(num_images_per_prompt=9)).endswith("seeds 3, 4, 5, 6, 7, 8, 9, 10, …>")
    verdict = Verdict(flagged=True, concepts=(1,), concept_scores=(0.5,), special_care_scores=())
    flagged = dataclasses.replace(finish(), verdicts=(verdict,))
    assert repr(flagged) == "<Result: 1 image of 64 × 64, seed 3, 1 flagged>"


def test_a_record_is_plain_python_and_json(finish: Any, tmp_path: Path) -> None:
    record = finish(prompt="a ☆").record
    fields = record.to_dict()
    assert (fields["prompt"], fields["seed"], fields["options"]["sampler"]) == ("a ☆", 3, "euler")
    assert fields["safety"]["policy"] == "block"
    assert record.to_json().isascii()
    assert json.loads(record.to_json()) == fields
    again = msgspec.json.Decoder(ImageRecord).decode(record.to_json())
    assert again == record


class Named(io.BytesIO):
    name: Any

    def __init__(self, name: Any) -> None:
        super().__init__()
        self.name = name


@pytest.mark.parametrize(
    ("target", "file_format", "expected"),
    [
        (io.BytesIO(), None, "PNG"),
        (io.BytesIO(), "jpeg", "JPEG"),
        (io.BytesIO(), "JPG", "JPEG"),
        (io.BytesIO(), "webp", "WEBP"),
        (Named("out.webp"), None, "WEBP"),
        (Named("out.webp"), "png", "PNG"),
        (Named(3), None, "PNG"),  # an open file descriptor
    ],
)
def test_an_image_is_saved_into_a_file_object(
    finish: Any, tmp_path: Path, target: io.BytesIO, file_format: str | None, expected: str
) -> None:
    result = finish()
    assert result.save(target, file_format) == []
    (tmp_path / "written").write_bytes(target.getvalue())
    found = read_metadata(tmp_path / "written")
    assert (found.file_format, found.record) == (expected, result.record)


def test_a_file_object_that_cannot_be_written(finish: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with pytest.raises(RequestError, match="got 2 images for one file object"):
        finish(num_images_per_prompt=2).save(stream)
    with pytest.raises(RequestError, match="`format`: got 'gif', expected one of png, jpeg, webp"):
        finish().save(stream, "gif")
    with pytest.raises(RequestError, match="`format`: got 'txt'"):
        finish().save(Named("out.txt"))
    assert stream.getvalue() == b""
    for wrong in (io.StringIO(), 3, None):
        with pytest.raises(RequestError, match="expected a path or a binary file object"):
            finish().save(wrong)
    with (tmp_path / "empty").open("wb") as unwritable:
        unwritable.write = lambda _: (_ for _ in ()).throw(OSError("no space"))  # type: ignore[method-assign]
        with pytest.raises(OutputError, match="no space"):
            finish().save(unwritable, "png")


def test_a_format_decides_for_a_path_of_any_extension(finish: Any, tmp_path: Path) -> None:
    (path,) = finish().save(tmp_path / "image", format="jpeg")
    assert (path.name, read_metadata(path).file_format) == ("image", "JPEG")
    paths = finish(num_images_per_prompt=2).save(tmp_path / "image.bin", format="png")
    assert [path.name for path in paths] == ["image-0.bin", "image-1.bin"]


def test_notebooks_show_an_image_as_it_is(finish: Any) -> None:
    result = finish()
    png = result._repr_png_()
    with Image.open(io.BytesIO(png)) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(result.image))
    html = result._repr_html_()
    assert html.count("<img") == 1
    assert "seed 3, euler, 2 steps, guidance 5" in html
    assert "64 × 64" in html


def test_notebooks_show_several_images_on_a_sheet(finish: Any) -> None:
    result = finish(num_images_per_prompt=3)
    with Image.open(io.BytesIO(result._repr_png_())) as sheet:
        assert sheet.width > 3 * 64
    assert result._repr_html_().count("<img") == 3


def test_html_is_escaped(finish: Any) -> None:
    text = "</b><script>alert('x')</script>\" onload=\"alert(1)\n\u202e"
    html = finish(prompt=text, negative_prompt=text)._repr_html_()
    tags = {*re.findall(r"<(/?\w+)", html)}
    assert tags == {"div", "/div", "figure", "/figure", "figcaption", "/figcaption", "img", "b", "/b", "br"}
    assert html.count('"') % 2 == 0
    assert " onload=" not in re.sub(r"&quot; onload=&quot;", "", html)
    assert "\u202e" not in html


def test_what_notebooks_are_given_is_bounded(finish: Any) -> None:
    result = finish(prompt="long " * 1_900)
    many = dataclasses.replace(
        result,
        images=[Image.effect_noise((2048, 1024), 100).convert("RGB")] * 20,
        records=result.records * 20,
        seeds=result.seeds * 20,
    )
    html = many._repr_html_()
    assert html.count("<img") == 16
    assert "and 4 further images" in html
    assert len(html) < 16 * 100_000
    with Image.open(io.BytesIO(many._repr_png_())) as sheet:
        assert sheet.width * sheet.height < 4 * 4 * 400 * 400
    assert len(result._repr_html_()) < 10_000, "the prompt is shortened"


def test_arrays_are_shown_as_text(finish: Any) -> None:
    for output_type in ("np", "latent"):
        result = finish(output_type)
        assert (result._repr_png_(), result._repr_html_()) == (None, None)


def test_images_are_pillow_s(finish: Any) -> None:
    (image,) = finish().images
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert isinstance(finish(output_type="np").images, np.ndarray)
