"""Oracles: diffusers' `load_image`, its `VaeImageProcessor` as each pipeline configures it, and the pipelines' code."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image as load_with_diffusers
from PIL import Image

from latentrt.images.inputs import (
    CropRegion,
    apply_mask,
    apply_overlay,
    default_height_width,
    find_crop_region,
    image_to_pixels,
    load_image,
    mask_to_pixels,
    prepare_inpainting,
    resize,
)

SIZES = [(64, 64), (512, 512), (513, 257), (100, 333), (37, 41), (9, 8), (500, 20)]  # width, height
TARGETS = [(None, None), (64, 64), (128, 96), (75, 131), (None, 200)]  # height, width
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]


def random_image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def blob(size: tuple[int, int], seed: int) -> Image.Image:
    """Return a grey mask: black but for a rectangle of random values."""
    generator = np.random.default_rng(seed)
    width, height = size
    (left, right), (top, bottom) = (np.sort(generator.choice(edge + 1, 2, replace=False)) for edge in size)
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = generator.integers(1, 256, (bottom - top, right - left))
    return Image.fromarray(mask)


def load_file_with_diffusers(path: Path) -> Image.Image:
    # diffusers leaves the file of some formats open, and Pillow warns of a palette with partial transparency.
    with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
        loaded: Image.Image = load_with_diffusers(opened)
        return loaded


def image_processor(**options: Any) -> VaeImageProcessor:
    return VaeImageProcessor(**options)


def mask_processor(**options: Any) -> VaeImageProcessor:
    return VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, **options)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_files_are_loaded_as_diffusers_does(tmp_path: Path, file_format: str, mode: str, orientation: int) -> None:
    image = random_image((23, 17), mode)
    if file_format == "JPEG" and mode in ("LA", "P", "RGBA"):
        image = image.convert("RGB")
    if file_format != "JPEG" and mode == "CMYK":
        image = image.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    image.save(path, file_format, exif=exif)
    assert np.array_equal(np.asarray(load_image(path).image), np.asarray(load_file_with_diffusers(path)))


@pytest.mark.parametrize("mode", MODES)
def test_pillow_images_are_loaded_as_diffusers_does(mode: str) -> None:
    image = random_image((23, 17), mode)
    assert np.array_equal(np.asarray(load_image(image).image), np.asarray(load_with_diffusers(image)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{}, {"vae_scale_factor": 4, "resample": "bicubic"}], ids=["default", "upscaler"])
def test_pixels_equal_diffusers(
    size: tuple[int, int], target: tuple[int | None, int | None], options: dict[str, Any]
) -> None:
    image, processor = random_image(size), image_processor(**options)
    resample = Image.Resampling.BICUBIC if options else Image.Resampling.LANCZOS
    factor = options.get("vae_scale_factor", 8)
    found = image_to_pixels(load_image(image), *target, factor=factor, resample=resample)
    assert default_height_width(load_image(image), *target, factor=factor) == found.shape[2:]
    assert found.dtype == np.float32
    # Bit for bit: the same Pillow resampling and the same float32 operations in the same order.
    assert np.array_equal(found, processor.preprocess(image, *target).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_float_array_equal_diffusers(
    size: tuple[int, int], target: tuple[int | None, int | None], channels: int
) -> None:
    array = np.random.default_rng(0).random((size[1], size[0], channels), np.float32)
    expected = image_processor().preprocess(array, *target).numpy()
    # Bit for bit; diffusers leaves a single channel single, which no VAE takes.
    assert np.array_equal(
        image_to_pixels(load_image(array), *target), np.broadcast_to(expected, (1, 3, *expected.shape[2:]))
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_equal_diffusers(size: tuple[int, int], target: tuple[int | None, int | None], mode: str) -> None:
    mask = random_image(size, mode)
    found = mask_to_pixels(load_image(mask, "mask_image"), *target)
    assert found.dtype == np.float32
    assert np.array_equal(found, mask_processor().preprocess(mask, *target).numpy())
    assert set(np.unique(found)) == {0, 1}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_float_masks_equal_diffusers(target: tuple[int | None, int | None], trailing: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).random((90, 130, *trailing), np.float32)
    found = mask_to_pixels(load_image(mask, "mask_image"), *target)
    assert np.array_equal(found, mask_processor().preprocess(mask, *target).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(64, 64), (128, 96), (72, 520)])
@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("resample", ["lanczos", "bicubic"])
def test_resizing_equals_diffusers(size: tuple[int, int], target: tuple[int, int], mode: Any, resample: str) -> None:
    image = random_image(size)
    found = resize(image, *target, mode=mode, resample=Image.Resampling[resample.upper()])
    expected = image_processor(resample=resample).resize(image, *target, resize_mode=mode)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("seed", range(200))
def test_crop_regions_equal_diffusers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = tuple(map(int, generator.integers(1, 200, 2)))
    height, width = (int(edge) * 8 for edge in generator.integers(1, 100, 2))
    padding = int(generator.choice([0, 1, 7, 32, 500]))
    mask = blob((size[0], size[1]), seed)
    expected = VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)
    assert find_crop_region(load_image(mask, "mask_image"), height, width, padding=padding) == expected


def inpaint_with_diffusers(
    image: Image.Image, mask: Image.Image, height: int, width: int, padding: int | None
) -> tuple[list[torch.Tensor], CropRegion | None]:
    """Return pixels, mask, masked pixels and latent mask as `StableDiffusionInpaintPipeline.__call__` makes them."""
    processor, masks = image_processor(), mask_processor()
    region = None if padding is None else masks.get_crop_region(mask, width, height, pad=padding)
    options = {"crops_coords": region, "resize_mode": "default" if padding is None else "fill"}
    pixels = processor.preprocess(image, height=height, width=width, **options)
    condition = masks.preprocess(mask, height=height, width=width, **options)
    masked = pixels * (condition < 0.5)
    fake = SimpleNamespace(vae_scale_factor=8, _encode_vae_image=lambda image, generator: image[:, :, ::8, ::8])
    latent_mask, _ = StableDiffusionInpaintPipeline.prepare_mask_latents(
        fake, condition, masked, 1, height, width, torch.float32, torch.device("cpu"), None, False
    )
    return [pixels, condition, masked, latent_mask], region


@pytest.mark.parametrize("size", [(512, 512), (500, 333), (40, 90), (1000, 30)])
@pytest.mark.parametrize("target", [(64, 64), (128, 96)])
@pytest.mark.parametrize("padding", [None, 0, 8, 1000])
def test_inpainting_equals_diffusers(size: tuple[int, int], target: tuple[int, int], padding: int | None) -> None:
    image, mask = random_image(size), blob(size, 3)
    original, mask_image = load_image(image), load_image(mask, "mask_image")
    found = prepare_inpainting(original, mask_image, *target, padding_mask_crop=padding)
    expected, region = inpaint_with_diffusers(image, mask, *target, padding)
    assert found.region == region
    arrays = [found.pixels, found.mask, found.masked_pixels, found.latent_mask]
    for array, tensor in zip(arrays, expected, strict=True):
        assert array.dtype == np.float32
        assert np.array_equal(array, tensor.numpy())
    assert np.array_equal(apply_mask(found.pixels, found.mask), expected[2].numpy())
    if padding is not None:
        finished = random_image((target[1], target[0]))
        overlaid = image_processor().apply_overlay(mask, image, finished, region)
        assert np.array_equal(np.asarray(apply_overlay(finished, original, mask_image, region)), np.asarray(overlaid))


def test_an_overlay_without_a_region_equals_diffusers() -> None:
    image, mask, finished = random_image((60, 50)), blob((60, 50), 1), random_image((60, 50)).rotate(180)
    expected = image_processor().apply_overlay(mask, image, finished)
    found = apply_overlay(finished, load_image(image), load_image(mask, "mask_image"))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_jpeg_of_a_camera_equals_diffusers(tmp_path: Path) -> None:
    """Two images in one file (MPO), as phones write them."""
    stream = io.BytesIO()
    random_image((40, 30)).save(stream, "MPO", save_all=True, append_images=[random_image((40, 30)).rotate(180)])
    (tmp_path / "image.jpg").write_bytes(stream.getvalue())
    expected = load_file_with_diffusers(tmp_path / "image.jpg")
    assert np.array_equal(np.asarray(load_image(tmp_path / "image.jpg").image), np.asarray(expected))
