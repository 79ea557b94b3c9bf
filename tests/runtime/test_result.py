"""Results: saved images, their records and their provenance."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentrt import Bundle, Pipeline, Request, RequestError
from latentrt.backends.models import Components
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.manifest import Source, TokenMerging
from latentrt.errors import OutputError
from latentrt.images.files import check_output
from latentrt.images.metadata import read_metadata
from latentrt.result import Result, expected_texts, numbered

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
        check_output(path, expected_texts(pipeline.bundle, pipeline.family, request))

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


class Unbuffered(io.RawIOBase):
    """A file that takes 100 bytes at once, and no more than `room`."""

    def __init__(self, room: int) -> None:
        self.room, self.data = room, b""

    def write(self, data: Any) -> int | None:
        count = min(100, len(data), self.room - len(self.data))
        self.data += bytes(data[:count])
        return count or None


def test_a_file_object_gets_the_whole_image(finish: Any, tmp_path: Path) -> None:
    result, buffer, unbuffered = finish(), io.BytesIO(), Unbuffered(1 << 20)
    assert result.save(buffer) == result.save(unbuffered) == []
    assert unbuffered.data == buffer.getvalue()
    with pytest.raises(OutputError, match="no more bytes"):
        result.save(Unbuffered(1000))
    with open(tmp_path / "a.png", "wb") as stream:
        pass
    with pytest.raises(OutputError, match="closed"):
        result.save(stream)
    with pytest.raises(RequestError, match="binary file object"):
        result.save(io.StringIO())


def test_images_are_pillow_s(finish: Any) -> None:
    (image,) = finish().images
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert isinstance(finish(output_type="np").images, np.ndarray)
