"""Autoencoders of other classes than `AutoencoderKL`, compared with diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

from latentrt import Bundle, Pipeline
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Arrays, run
from latentrt.bundle.gate_inputs import make_image_pixels, make_masks
from latentrt.bundle.manifest import LatentSpace
from latentrt.bundle.tensors import check_feeds
from latentrt.errors import CheckpointError, RequestError
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.component import export_component
from latentrt_export.families import plan_export
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.modules.vae import (
    AsymmetricVaeDecoder,
    AsymmetricVaeEncoder,
    InpaintingVaeDecoder,
    NormalizedVaeDecoder,
    TinyEncoder,
    VaeDecoder,
)
from latentrt_export.quantize.options import QuantizationOptions
from tests.export.skeleton import open_skeleton, write_skeleton
from tests.exported import Exported
from tests.tiny_preview import make_preview_decoder
from tests.tiny_xl import xl_autoencoder

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_preview_decoder(tmp_path_factory.mktemp("tiny"))


def changed(tiny: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def test_a_decoder_inverts_the_statistics_of_latents() -> None:
    torch.manual_seed(0)
    vae = xl_autoencoder(statistics=True)
    config = vae.config
    space = LatentSpace(
        channels=4,
        downscale=8,
        scale=config.scaling_factor,
        mean=tuple(config.latents_mean),
        std=tuple(config.latents_std),
    )
    encoded = np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)
    latents = space.normalize(encoded)
    # diffusers, `StableDiffusionXLPipeline.__call__`
    mean, std = (torch.tensor(each).view(1, 4, 1, 1) for each in (config.latents_mean, config.latents_std))
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(latents) * std / config.scaling_factor + mean).sample
    images = VaeImageProcessor(vae_scale_factor=8).postprocess(decoded, output_type="np")
    expected = (images * 255).round().astype(int)
    found = NormalizedVaeDecoder(vae).torch_outputs({"latents": latents})["pixels"]
    # A level where a value lies on the edge between two.
    assert np.abs(found.astype(int) - expected).max() <= 1
    # Pipelines of other families pass over the statistics.
    plain = VaeDecoder(vae).torch_outputs({"latents": encoded * np.float32(config.scaling_factor)})["pixels"]
    assert np.abs(plain.astype(int) - expected).max() <= 1
    assert found.std() > 1, "an image of one colour proves nothing"


@pytest.mark.parametrize("overflows", [False, True])
def test_what_overflows_in_half_stays_float32(tmp_path: Path, overflows: bool) -> None:
    """A checkpoint with `force_upcast` needs no exception of its own: its values exceed half's range.

    Every norm divides by the spread of its input, so that scaled weights before it make large values and the same
    image.
    """
    torch.manual_seed(0)
    vae = xl_autoencoder(force_upcast=True)
    with torch.no_grad():
        if overflows:
            for layer in (vae.post_quant_conv, vae.decoder.conv_in):
                for parameter in layer.parameters():
                    parameter.mul_(500)
    module = VaeDecoder(vae).requires_grad_(False)
    plan = ComponentPlan(
        name="vae_decoder", role="decoder", module="vae:VaeDecoder", weights="vae", sources={"latents": "latents"}
    )
    latents = {"latents": np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)}
    space = LatentSpace(channels=4, downscale=8, scale=0.13025)
    component, _ = export_component(module, plan, tmp_path, "float16", latents, space, lambda text: None)
    graph = component.graphs["float16"]
    assert all(result.value <= result.bound for result in graph.gate)
    kept = {name for name in graph.float32_nodes if not name.startswith("/")}
    # Our own arithmetic around the decoder has no module in its nodes' names.
    assert any(name.startswith("decoder.conv_in/") for name in kept) == overflows
    assert any(name.startswith("decoder.mid_block.") for name in kept) == overflows
    assert not any(name.startswith("decoder.conv_out/") for name in kept)
    assert bool(kept) == overflows


def test_a_previews_images_equal_those_of_diffusers(sd2: Exported) -> None:
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


def test_a_preview_decoders_class_is_checked(sd1: Exported, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a tiny autoencoder; expected its folder"):
        open_skeleton(sd1.checkpoint, given=GivenComponents(preview_decoder=tmp_path))
    with pytest.raises(CheckpointError, match="'AutoencoderKL', expected AutoencoderTiny"):
        open_skeleton(sd1.checkpoint, given=GivenComponents(preview_decoder=sd1.checkpoint / "vae"))
    found = open_skeleton(sd1.checkpoint, given=GivenComponents(preview_decoder=tiny))
    assert found.weights["preview_decoder"].root == tiny
    assert "preview_decoder/diffusion_pytorch_model.safetensors" in found.sources


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {"decoder_block_out_channels": [8, 8, 8], "encoder_block_out_channels": [8, 8, 8]},
            "preview_decoder has pixels per latent 4, expected 8",
        ),
        ({"latent_channels": 16}, "preview_decoder has latent_channels 16, expected 4"),
    ],
)
def test_a_preview_decoder_decodes_the_same_latents(
    tmp_path: Path, tiny: Path, changes: dict[str, Any], fragment: str
) -> None:
    checkpoint = write_skeleton(tmp_path / "checkpoint")
    other = changed(tiny, tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=fragment):
        plan_export(open_skeleton(checkpoint, given=GivenComponents(preview_decoder=other)))


def test_a_tiny_encoder_returns_latents_and_no_distribution(tiny: Path) -> None:
    module = TinyEncoder.load(tiny, None)
    assert [spec.name for spec in module.outputs] == ["mean"]
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 16, 24)).astype(np.float32)
    with torch.inference_mode():
        expected = AutoencoderTiny.from_pretrained(tiny).eval().encode(torch.from_numpy(pixels)).latents.numpy()
    np.testing.assert_array_equal(module.torch_outputs({"pixels": pixels})["mean"], expected)


def test_an_asymmetric_autoencoder_without_its_mask(tmp_path: Path) -> None:
    torch.manual_seed(2)
    options = {"norm_num_groups": 4, "scaling_factor": 0.3}
    model = AsymmetricAutoencoderKL(down_block_out_channels=(8,), up_block_out_channels=(16,), **options).eval()
    model.save_pretrained(tmp_path)
    decoder, encoder = AsymmetricVaeDecoder.load(tmp_path, None), AsymmetricVaeEncoder.load(tmp_path, None)
    assert not any("condition_encoder" in name for name in decoder.weights())
    latents = np.random.default_rng(1).standard_normal((1, 4, 6, 8)).astype(np.float32)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 6, 8)).astype(np.float32)
    with torch.inference_mode():
        decoded = model.decode(torch.from_numpy(latents) / 0.3).sample
        encoded = model.encode(torch.from_numpy(pixels)).latent_dist
    images = VaeImageProcessor(vae_scale_factor=1).postprocess(decoded, output_type="np")
    expected = (images * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(decoder.torch_outputs({"latents": latents})["pixels"], expected)
    np.testing.assert_array_equal(encoder.torch_outputs({"pixels": pixels})["mean"], encoded.mean.numpy())


def save_asymmetric(folder: Path, *widths: int) -> AsymmetricAutoencoderKL:
    torch.manual_seed(2)
    model = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        down_block_out_channels=(8,) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        up_block_out_channels=widths,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    model.save_pretrained(folder)
    return model.eval()


# Of one width, two layers have features of one shape, of which diffusers takes the later.
@pytest.mark.parametrize("widths", [(8, 16, 16), (8, 8)])
def test_an_asymmetric_autoencoder_with_image_and_mask(tmp_path: Path, widths: tuple[int, ...]) -> None:
    model, decoder = save_asymmetric(tmp_path, *widths), InpaintingVaeDecoder.load(tmp_path, None)
    factor = 2 ** (len(widths) - 1)
    rng, sides = np.random.default_rng(1), (6 * factor, 8 * factor)
    # Not a pattern that every pixel of a block shares: the mask is resized by nearest neighbour.
    mask = rng.integers(0, 2, (2, 1, *sides)).astype(np.float32)
    feeds = {
        "latents": rng.standard_normal((2, 4, 6, 8)).astype(np.float32),
        "image": make_image_pixels((2, 3, *sides)),
        "mask": mask,
    }
    check_feeds(decoder.inputs, feeds)

    def expect(**inputs: torch.Tensor) -> Any:
        with torch.inference_mode():
            decoded = model.decode(torch.from_numpy(feeds["latents"]) / 0.3, **inputs).sample
        images = VaeImageProcessor(vae_scale_factor=factor).postprocess(decoded, output_type="np")
        return (images * 255).round().astype(np.uint8)

    expected = expect(image=torch.from_numpy(feeds["image"]), mask=torch.from_numpy(mask))
    # A value near a half may round to either side: convolutions of other batches and sizes add in another order.
    difference = decoder.torch_outputs(feeds)["pixels"].astype(int) - expected
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01
    # A mask of ones keeps nothing: the decoder without a condition.
    plain = decoder.torch_outputs({**feeds, "mask": np.ones_like(mask)})["pixels"]
    difference = plain.astype(int) - expect()
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01
    assert (plain != expected).mean() > 0.1
    # Layers without an effect have no weights in a graph.
    layers = {name.split(".")[3] for name in decoder.weights() if "condition_encoder" in name}
    assert len(layers) == len(widths) + 1


def test_an_asymmetric_autoencoder_whose_features_do_not_fit(tmp_path: Path) -> None:
    save_asymmetric(tmp_path, 8, 32)
    with pytest.raises(CheckpointError, match=r"up_block_out_channels.*`vae`"):
        InpaintingVaeDecoder.load(tmp_path, None)


def test_a_decoder_is_calibrated_with_a_kept_region_and_without(tmp_path: Path) -> None:
    save_asymmetric(tmp_path, 8, 8)
    decoder, feeds = InpaintingVaeDecoder.load(tmp_path, None), list[Arrays]()

    def record(each: Arrays) -> Arrays:
        check_feeds(decoder.inputs, each)
        feeds.append(each)
        return {}

    decoder.calibrate(record, {"latents": np.zeros((2, 4, 6, 8), np.float32)}, QuantizationOptions())
    np.testing.assert_array_equal([each["mask"][0] for each in feeds], np.tile(make_masks(2, 12, 16), (2, 1, 1, 1)))
