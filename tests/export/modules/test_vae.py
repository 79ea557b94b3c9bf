"""A tiny autoencoder's decoder, compared with diffusers' conversion of latents to images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

from latentrt import Bundle, Pipeline
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import run
from latentrt.errors import CheckpointError, RequestError
from latentrt_export.checkpoints.checkpoint import preview_factor
from tests.export.skeleton import open_skeleton
from tests.exported import Exported
from tests.tiny_preview import make_preview_decoder

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_preview_decoder(tmp_path_factory.mktemp("tiny"))


def changed(tiny: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def test_its_images_equal_those_of_diffusers(sd2: Exported) -> None:
    folder = sd2.checkpoint.with_name("sd2-preview")
    latents = np.random.default_rng(3).standard_normal((2, 4, 9, 7), dtype=np.float32)
    model = AutoencoderTiny.from_pretrained(folder).eval()
    # The bundle's weights are float16.
    model.half().float()
    with torch.inference_mode():
        decoded = model.decode(torch.from_numpy(latents) / model.config.scaling_factor).sample
    images = VaeImageProcessor(vae_scale_factor=8).postprocess(decoded, output_type="np")
    expected = (images * 255).round().astype(int)
    found = run(open_session(Bundle.open(sd2.bundle), "preview_decoder", threads=1), latents=latents)["pixels"]
    # A level where a value lies on the edge between two.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert found.std() > 1, "an image of one colour proves nothing"


def test_a_request_may_select_it_instead_of_the_decoder(sd2: Exported, tmp_path: Path) -> None:
    pipeline = Pipeline.load(sd2.bundle, device="cpu", threads=1)
    options: dict[str, Any] = {"seed": 7, "num_inference_steps": 2}
    latents = pipeline(PROMPT, output_type="latent", **options).images
    preview = pipeline(PROMPT, decoder="preview", **options)
    expected = run(open_session(pipeline.bundle, "preview_decoder", threads=1), latents=latents)["pixels"]
    np.testing.assert_array_equal(np.asarray(preview.images[0]), expected[0])
    # The safety checker judges it like any other image, and its metadata names the decoder.
    assert preview.verdicts is not None
    assert preview.records[0].options["decoder"] == "preview"


def test_a_bundle_without_one_refuses_the_option(sd1: Exported) -> None:
    with pytest.raises(RequestError, match=r"no preview decoder.*--preview-decoder"):
        Pipeline.load(sd1.bundle, device="cpu")(PROMPT, decoder="preview")


def test_its_kind_factor_and_channels_are_checked(sd1: Exported, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a tiny autoencoder; expected its folder"):
        open_skeleton(sd1.checkpoint, preview_decoder=tmp_path)
    with pytest.raises(CheckpointError, match="AutoencoderKL, expected AutoencoderTiny"):
        open_skeleton(sd1.checkpoint, preview_decoder=sd1.checkpoint / "vae")
    other = changed(tiny, tmp_path / "other", decoder_block_out_channels=[8, 8, 8])
    with pytest.raises(CheckpointError, match=r"of 4 channels to 4 times .* expected 4 channels and 8 times"):
        open_skeleton(sd1.checkpoint, preview_decoder=other)
    wide = changed(tiny, tmp_path / "wide", latent_channels=16)
    with pytest.raises(CheckpointError, match="latents of 16 channels"):
        open_skeleton(sd1.checkpoint, preview_decoder=wide)
    found = open_skeleton(sd1.checkpoint, preview_decoder=tiny)
    assert found.weights["preview_decoder"].root == tiny
    assert "preview_decoder/diffusion_pytorch_model.safetensors" in found.sources


def test_its_factor_follows_from_its_configuration() -> None:
    """diffusers: each block of the decoder but the last doubles the size, unless it says otherwise."""
    assert preview_factor({}) == 8
    assert preview_factor({"decoder_block_out_channels": [8, 8, 8]}) == 4
    assert preview_factor({"decoder_block_out_channels": [8, 8, 8], "upsampling_scaling_factor": 3}) == 9
