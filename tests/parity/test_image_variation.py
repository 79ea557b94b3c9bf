"""Image variation compared with diffusers' own pipeline: the same checkpoint, image, seed; float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from diffusers import StableDiffusionImageVariationPipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt import Pipeline
from latentrt.cli.run import run
from latentrt.images.metadata import read_metadata
from tests.exported import Exported, exported_task
from tests.parity.pipelines import IGNORED_WARNINGS, compare, input_image

# Slow, as this task's export takes a minute of CI; `make test-slow` has it.
pytestmark = [IGNORED_WARNINGS, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_task(tmp_path_factory, "image-variation")


@pytest.fixture(scope="module")
def pipeline(model: Exported) -> Pipeline:
    return Pipeline.load(model.bundle, device="cpu")


@pytest.fixture(scope="module")
def pipe(model: Exported) -> Any:
    # Pillow's preprocessing, which the graph repeats; torchvision's is another.
    processor = CLIPImageProcessorPil.from_pretrained(model.checkpoint / "feature_extractor")
    return StableDiffusionImageVariationPipeline.from_pretrained(model.checkpoint, feature_extractor=processor)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5], ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (88, 72)])
@pytest.mark.parametrize("sampler", ["pndm", "euler_a", "dpmpp_2m"])
def test_image_variation(
    pipeline: Pipeline, pipe: Any, sampler: str, width: int, height: int, images: int, guidance_scale: float
) -> None:
    image = input_image(301, 173)  # of any size, which is not the result's
    common = {"height": height, "width": width, "guidance_scale": guidance_scale, "num_inference_steps": 6}
    compare(pipeline, pipe, sampler, images, {**common, "image": image})


def test_the_default_size_is_the_models(pipeline: Pipeline) -> None:
    made = pipeline(image=input_image(301, 173), num_inference_steps=1, output_type="np", safety="off").images
    assert made.shape == (1, 64, 64, 3)


def test_the_command_line_needs_no_prompt(model: Exported, tmp_path: Path) -> None:
    input_image(96, 80).save(tmp_path / "in.png")
    place = tmp_path / "out.png"
    options = ["--steps", 2, "--seed", 7, "--safety", "off", "--device", "cpu"]
    arguments = [model.bundle, "--image", tmp_path / "in.png", *options, "-o", place]
    done = CliRunner().invoke(run, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = read_metadata(place).record
    assert record is not None
    assert record.task == "image-variation"
    assert [*record.inputs] == ["image"]
