from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.files import MAX_FILE_BYTES, encode_texts, save
from latentrt.images.inputs import (
    apply_mask,
    apply_overlay,
    default_height_width,
    find_crop_region,
    image_to_pixels,
    load_image,
    mask_to_latents,
    mask_to_pixels,
    prepare_inpainting,
    resize,
)
from tests.runtime.images.test_files import png

FORMATS = ["PNG", "JPEG", "WEBP"]
ORIENTATION = 0x0112


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Return an image whose four corners differ, smooth enough for JPEG and WebP."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def rectangle(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return mask


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_by_path(tmp_path: Path, file_format: str, as_text: bool) -> None:
    data = encode(gradient(), file_format, quality=95)
    path = tmp_path / "any name"
    path.write_bytes(data)
    found = load_image(str(path) if as_text else path)
    assert found.image.mode == "RGB"
    assert (found.width, found.height) == (24, 16)
    assert found.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert found.parameters is None
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(gradient())).max() < 40
    assert load_image(data).digest == found.digest
    assert np.array_equal(np.asarray(load_image(data).image), np.asarray(found.image))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_brings_its_parameters(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / f"image.{file_format.lower()}"
    save(gradient(), path, {"parameters": "a cat\nSteps: 20", "latentrt": "{}"})
    assert load_image(path).parameters == "a cat\nSteps: 20"
    with Image.open(path) as opened:
        assert load_image(opened).parameters == "a cat\nSteps: 20"


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_honoured(file_format: str, orientation: int) -> None:
    data = encode(gradient(), file_format, exif=exif(orientation), quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        stored = np.asarray(opened.convert("RGB"))
    transposed = stored.swapaxes(0, 1) if orientation > 4 else stored
    # EXIF 2.32, table 6: which edges the first row and the first column of the stored image are.
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    expected = transposed[:: -1 if rows else 1, :: -1 if columns else 1]
    assert np.array_equal(np.asarray(load_image(data).image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    source = Image.new(mode, (8, 4), 1) if mode in ("1", "L", "P") else Image.new(mode, (8, 4))
    found = load_image(source)
    assert found.image.mode == "RGB"
    assert np.array_equal(np.asarray(found.image), np.asarray(source.convert("RGB")))


def test_transparency_is_dropped_not_blended() -> None:
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert load_image(encode(red, "PNG")).image.getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for transparency in (0, b"\x80\x40"):
        data = encode(palette, "PNG", transparency=transparency)
        assert load_image(data).image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(dtype: type[np.generic]) -> None:
    deep = Image.fromarray(np.full((8, 8), 1000, dtype))
    with pytest.raises(RequestError, match=r"`mask_image`.*8"):
        load_image(deep, "mask_image")


def test_a_16_bit_file_is_refused() -> None:
    data = encode(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "PNG")
    with pytest.raises(RequestError, match=r"`image`.*8"):
        load_image(data)


def test_a_pillow_image_is_copied() -> None:
    source = gradient()
    found = load_image(source)
    source.paste("black", (0, 0, 24, 16))
    assert np.array_equal(np.asarray(found.image), np.asarray(gradient()))


def test_equal_pixels_have_equal_digests() -> None:
    pixels = np.asarray(gradient())
    digests = [load_image(source).digest for source in (gradient(), pixels, np.asfortranarray(pixels))]
    assert len(set(digests)) == 1
    assert digests[0].startswith("sha256:")
    others = [pixels.swapaxes(0, 1), pixels[:, ::-1], pixels.astype(np.float32) / 255]
    assert len({load_image(source).digest for source in others} | set(digests)) == 4


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 1), (8, 16, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, np.float32, np.float64])
def test_arrays(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    bits = np.random.default_rng(0).integers(0, 2, shape)
    source = (bits * 255 if dtype == np.uint8 else bits).astype(dtype)
    found = load_image(source)
    expected = np.broadcast_to(bits.reshape(8, 16, -1), (8, 16, 3))
    assert np.array_equal(np.asarray(found.image), expected * 255)
    assert (found.values is not None) == np.issubdtype(dtype, np.floating)
    assert np.array_equal(image_to_pixels(found), expected.transpose(2, 0, 1)[None] * 2 - 1)
    assert found.parameters is None


def test_a_float_array_is_not_rounded_to_8_bits() -> None:
    pixels = image_to_pixels(load_image(np.full((8, 8, 3), 0.3333, np.float32)))
    assert (pixels == np.float32(2) * np.float32(0.3333) - np.float32(1)).all()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\(1, 8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.float32), r"\(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\)"),
        (np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((8, 8), np.complex64), "complex64"),
        (np.full((8, 8), 1.5, np.float32), "1.5"),
        (np.full((8, 8), -0.5, np.float32), "-0.5"),
        (np.full((8, 8), np.nan, np.float32), "nan"),
        (np.full((8, 8), np.inf, np.float64), "inf"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "10000 × 10000"),
        (None, "NoneType"),
        ([gradient()], "list"),
        (b"", "0 bytes"),
        (b"GIF89a" + bytes(100), "PNG, JPEG or WebP"),
        ("https://example.com/cat.png", "URL"),
        ("", "No such file"),
        ("missing.png", "missing.png"),
        ("\0", "null"),
        ("\x1b[31m.png", r"\\x1b"),
    ],
)
def test_invalid_images_are_refused(source: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=f"(?s)`mask_image`.*{reason}") as caught:
        load_image(source, "mask_image")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(gradient(), file_format))
    with pytest.raises(RequestError, match="expected a PNG, JPEG or WebP"):
        load_image(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(RequestError, match="`image`: got"):
            load_image(path)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.98])
def test_a_truncated_file_is_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    with pytest.raises(RequestError, match="`image`: got"):
        load_image(data[: int(share * len(data))])


def test_a_truncated_pillow_image_is_refused() -> None:
    data = encode(gradient(200, 200), "BMP")
    with Image.open(io.BytesIO(data[:1000])) as opened, pytest.raises(RequestError, match=r"`image`.*truncated"):
        load_image(opened)


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000), (1, 90_000_000)])
def test_a_decompression_bomb_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # programs lift it for themselves

    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(RequestError, match=r"`image`.*pixels"):
        load_image(png(*size))


def test_a_large_pillow_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.images.inputs.MAX_PIXELS", 100)
    with pytest.raises(RequestError, match="24 × 16"):
        load_image(gradient())


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "image.png").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(RequestError, match=f"{MAX_FILE_BYTES:,}"):
        load_image(tmp_path / "image.png")


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_file_is_read_or_refused(file_format: str) -> None:
    generator = np.random.default_rng(0)
    data = encode(gradient(), file_format, **encode_texts(file_format, {"parameters": "a cat\nSteps: 20"}))
    for _ in range(300):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(0, len(data), 4)] = generator.integers(0, 256, 4)
        try:
            assert load_image(damaged.tobytes()).image.mode == "RGB"
        except RequestError as error:
            assert str(error).isprintable()  # noqa: PT017, either outcome is right


@pytest.mark.parametrize(
    ("size", "given", "factor", "expected"),
    [
        ((513, 770), (None, None), 8, (768, 512)),
        ((64, 64), (None, None), 8, (64, 64)),
        ((71, 79), (None, 33), 8, (72, 32)),
        ((71, 79), (100, None), 64, (64, 64)),
        ((7, 7), (None, None), 4, (4, 4)),
    ],
)
def test_sizes_are_rounded_down(
    size: tuple[int, int], given: tuple[int | None, int | None], factor: int, expected: tuple[int, int]
) -> None:
    image = load_image(Image.new("RGB", size))
    assert default_height_width(image, *given, factor=factor) == expected
    assert image_to_pixels(image, *given, factor=factor).shape == (1, 3, *expected)
    assert mask_to_pixels(image, *given, factor=factor).shape == (1, 1, *expected)


def test_an_image_below_one_latent_is_refused() -> None:
    with pytest.raises(RequestError, match=r"`image`.*7 × 64"):
        image_to_pixels(load_image(Image.new("RGB", (7, 64))))


@pytest.mark.parametrize("mode", ["fill", "crop"])
def test_an_extreme_aspect_ratio_is_refused(mode: Any) -> None:
    with pytest.raises(RequestError, match=r"`mask_image`.*aspect ratio"):
        resize(
            Image.new("RGB", (1, 100_000) if mode == "fill" else (100_000, 1)), 64, 64, mode=mode, argument="mask_image"
        )


def test_fill_repeats_the_edges_and_crop_cuts_them_off() -> None:
    image = Image.fromarray(np.stack([rectangle(32, 8, (0, 0, 16, 8))] * 3, axis=-1))
    filled = np.asarray(resize(image, 32, 32, mode="fill", resample=Image.Resampling.NEAREST))[..., 0]
    assert (filled[:, :16] == 255).all()
    assert (filled[:, 16:] == 0).all()
    cropped = np.asarray(resize(image, 8, 8, mode="crop"))[..., 0]
    assert (cropped[:, :4] == 255).all()
    assert (cropped[:, 4:] == 0).all()


def test_the_mask_is_binary_and_greys_out_the_image() -> None:
    mask = mask_to_pixels(load_image(np.array([[0, 127, 128, 255] * 2] * 8, np.uint8), "mask_image"))
    assert mask.dtype == np.float32
    assert mask[0, 0, 0].tolist() == [0, 0, 1, 1] * 2
    pixels = image_to_pixels(load_image(Image.new("RGB", (8, 8), "white")))
    assert apply_mask(pixels, mask)[0, 2, 0].tolist() == [1, 1, 0, 0] * 2


def test_a_float_mask_has_one_channel() -> None:
    mask = load_image(np.full((8, 8), 0.5, np.float32), "mask_image")
    assert (mask_to_pixels(mask) == 1).all()
    with pytest.raises(RequestError, match=r"`mask_image`.*\(8, 8, 3\)"):
        mask_to_pixels(load_image(np.zeros((8, 8, 3), np.float32), "mask_image"))


def test_the_mask_of_the_latents_is_every_eighth_pixel() -> None:
    mask = (np.random.default_rng(0).random((1, 1, 64, 96)) < 0.5).astype(np.float32)
    assert np.array_equal(mask_to_latents(mask), mask[..., ::8, ::8])
    assert np.array_equal(mask_to_latents(mask, factor=4), mask[..., ::4, ::4])


@pytest.mark.parametrize(
    ("box", "padding", "size", "expected"),
    [
        ((10, 20, 42, 28), 0, (64, 64), (10, 8, 42, 40)),
        ((10, 20, 42, 28), 4, (64, 64), (6, 4, 46, 44)),
        ((0, 0, 10, 50), 0, (64, 64), (0, 0, 50, 50)),
        ((90, 0, 100, 50), 0, (64, 64), (50, 0, 100, 50)),
        ((0, 0, 100, 80), 32, (64, 64), (0, 0, 100, 80)),
        ((50, 40, 51, 41), 0, (64, 128), (50, 40, 52, 41)),
    ],
)
def test_crop_regions(
    box: tuple[int, int, int, int], padding: int, size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    mask = load_image(rectangle(100, 80, box, value=1), "mask_image")
    assert find_crop_region(mask, *size, padding=padding) == expected


def test_a_black_mask_has_no_region() -> None:
    mask = load_image(Image.new("L", (32, 32)), "mask_image")
    with pytest.raises(RequestError, match=r"`mask_image`.*black"):
        find_crop_region(mask, 64, 64)
    with pytest.raises(RequestError, match=r"`padding_mask_crop`.*-1"):
        find_crop_region(mask, 64, 64, padding=-1)


def test_inpainting_takes_the_size_of_the_request() -> None:
    image = load_image(gradient(100, 80))
    mask = load_image(rectangle(50, 40, (0, 0, 25, 40)), "mask_image")
    inputs = prepare_inpainting(image, mask, 64, 128)
    assert inputs.region is None
    assert inputs.pixels.shape == inputs.masked_pixels.shape == (1, 3, 64, 128)
    assert inputs.mask.shape == (1, 1, 64, 128)
    assert inputs.latent_mask.shape == (1, 1, 8, 16)
    assert inputs.latent_mask[0, 0, 0].tolist() == [1] * 8 + [0] * 8
    assert (inputs.masked_pixels[..., :64] == 0).all()
    assert np.array_equal(inputs.masked_pixels[..., 64:], inputs.pixels[..., 64:])


def test_cropped_inpainting_needs_one_size_and_no_float_arrays() -> None:
    image, mask = load_image(gradient()), load_image(rectangle(25, 16, (0, 0, 8, 8)), "mask_image")
    with pytest.raises(RequestError, match=r"`mask_image`.*25 × 16.*24 × 16"):
        prepare_inpainting(image, mask, 64, 64, padding_mask_crop=4)
    floats = load_image(np.zeros((16, 25, 3), np.float32))
    with pytest.raises(RequestError, match=r"`image`.*uint8"):
        prepare_inpainting(floats, mask, 64, 64, padding_mask_crop=4)


@pytest.mark.parametrize("cropped", [True, False])
def test_the_overlay_changes_masked_pixels_only(cropped: bool) -> None:
    original = load_image(gradient(100, 80))
    box = rectangle(100, 80, (10, 20, 42, 28))
    mask = load_image(box, "mask_image")
    region = find_crop_region(mask, 64, 64, padding=8) if cropped else None
    finished = Image.new("RGB", (64, 64) if cropped else (100, 80), "red")
    result = np.asarray(apply_overlay(finished, original, mask, region))
    assert result.shape == (80, 100, 3)
    assert np.array_equal(result[box == 0], np.asarray(original.image)[box == 0])
    assert (result[box == 255] == [255, 0, 0]).all()


def test_an_overlay_of_another_size_is_refused() -> None:
    original, mask = load_image(gradient()), load_image(rectangle(24, 16, (0, 0, 8, 8)), "mask_image")
    with pytest.raises(RequestError, match="64 × 64"):
        apply_overlay(Image.new("RGB", (64, 64)), original, mask)


def test_torch_is_not_imported() -> None:
    modules = "latentrt.images.inputs, latentrt.images.feature_extractors, latentrt.images.metadata"
    code = f"import sys, {modules}; assert not {{'torch', 'diffusers', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
