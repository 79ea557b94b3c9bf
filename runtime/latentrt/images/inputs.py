"""Input images of image-to-image, inpainting, InstructPix2Pix, depth-to-image and upscaling.

Loads an image or a mask and prepares it as diffusers' pipelines do: `diffusers.utils.load_image`, then
`diffusers.image_processor.VaeImageProcessor`. Image-to-image, InstructPix2Pix and depth-to-image take their size from
the image (`default_height_width`) and resample with Lanczos; so do the upscalers, with bicubic resampling. Inpainting
takes its size from the request or the bundle, never from the image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.images.files import (
    MAX_PIXELS,
    PARAMETERS,
    decode_image,
    read_file,
    read_texts,
    translating_decoder_errors,
)
from latentrt.images.interpolation import interpolate_nearest
from latentrt.images.structure import check_exif

__all__ = [
    "CropRegion",
    "ImageSource",
    "InpaintingInputs",
    "LoadedImage",
    "LoadedLatents",
    "ResizeMode",
    "apply_mask",
    "apply_overlay",
    "default_height_width",
    "find_crop_region",
    "image_to_pixels",
    "is_latents",
    "load_image",
    "load_latents",
    "mask_to_latents",
    "mask_to_pixels",
    "prepare_inpainting",
    "resize",
]

Floats = NDArray[np.float32]

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A path, the contents of a file, a Pillow image, or an array (`load_image`)."""
ResizeMode = Literal["default", "fill", "crop"]
"""How `resize` treats another aspect ratio: distort the image, pad it by its edges, or crop it."""
CropRegion = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels, right and lower excluded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedImage:
    """An input image or mask.

    Attributes:
        argument: the name of the argument that it was given for, for error messages.
        image: the image in RGB, 8 bits per channel, upright.
        digest: `sha256:…` of the file's bytes; of the pixels and their shape if no file was given.
        parameters: the generation parameters that the file carried, by latentrt or another tool.
        values: float32 [height, width, 1 or 3] in 0…1 if a float array was given; `image` is rounded to 8 bits.
    """

    argument: str
    image: Image.Image
    digest: str
    parameters: str | None = None
    values: Floats | None = None

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.image.height


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedLatents:
    """Latents in place of an input image.

    Attributes:
        values: float32 [images, C, H, W], in the sampling loop's scale.
        digests: `sha256:…` of the values and the shape of each image's.
    """

    values: Floats
    digests: tuple[str, ...]

    def as_pixels(self, height: int, width: int) -> LoadedImage:
        """Return a black image of this size, which stands where pixels are expected and none are used."""
        return LoadedImage(argument="image", image=Image.new("RGB", (width, height)), digest=self.digests[0])


def is_latents(source: object) -> TypeGuard[NDArray[Any]]:
    """Return whether an input image is given as latents, [images, C, H, W]."""
    return isinstance(source, np.ndarray) and source.ndim == _LATENT_AXES


_LATENT_AXES = 4


def load_latents(source: NDArray[Any], channels: int) -> LoadedLatents:
    """Return latents in place of an input image, checked.

    Args:
        source: [images, C, H, W].
        channels: of the latent space.

    Raises:
        RequestError: there are none, they have another number of channels, or are not finite.
    """
    if not source.size or source.shape[1] != channels:
        raise RequestError(
            f"`image`: got an array of {source.shape}, expected latents of shape (images, {channels}, height, width)"
        )
    with np.errstate(over="ignore"):
        values = source.astype(np.float32) if np.issubdtype(source.dtype, np.floating) else None
    if values is None or not np.isfinite(values).all():
        raise RequestError("`image`: got latents that are not finite float32 numbers")
    return LoadedLatents(values=values, digests=tuple(map(_pixel_digest, values)))


def load_image(source: ImageSource, argument: str = "image") -> LoadedImage:
    """Load an image as `diffusers.utils.load_image` does: turned upright by its EXIF orientation, converted to RGB.

    The conversion drops an alpha channel and a palette's transparency, without blending. Of an animation the first
    frame is used.

    Args:
        source: the path or the bytes of a PNG, JPEG or WebP file; a Pillow image; an array of [height, width],
            [height, width, 1] or [height, width, 3], uint8 in 0…255, bool, or float in 0…1. A float array is not
            rounded to 8 bits, and is resized without antialiasing, as diffusers does with an array.
        argument: the name of the argument, for error messages.

    Raises:
        RequestError: the source is of another type, format, shape or range; a file is missing, damaged, truncated
            or too large; or the image has 16 or 32 bits per channel, which Pillow would clip to white.
    """
    if isinstance(source, Image.Image):
        with translating_decoder_errors(f"`{argument}`: got a Pillow image, which"):
            image, parameters = _convert_to_rgb(source, argument), read_texts(source).get(PARAMETERS)
        return LoadedImage(
            argument=argument, image=image, digest=_pixel_digest(np.asarray(image)), parameters=parameters
        )
    if isinstance(source, np.ndarray):
        return _load_array(source, argument)
    if isinstance(source, bytes):
        return _load_file(source, f"`{argument}`: got {len(source):,} bytes, which", argument)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            raise RequestError(f"`{argument}`: got a URL, expected a local file; download it first")
        subject = f"`{argument}`: got {quote(os.fsdecode(path))}, which"
        return _load_file(read_file(path, subject), subject, argument)
    raise RequestError(
        f"`{argument}`: got {type(source).__name__}, expected a path, bytes, a Pillow image or a numpy array"
    )


def default_height_width(
    image: LoadedImage, height: int | None = None, width: int | None = None, *, factor: int = 8
) -> tuple[int, int]:
    """Return height and width, those of the image if not given, each rounded down to a multiple of `factor`.

    Source: `VaeImageProcessor.get_default_height_width`.

    Args:
        factor: pixels per latent (`vae_scale_factor`).

    Raises:
        RequestError: a side is shorter than `factor`.
    """
    height = image.height if height is None else height
    width = image.width if width is None else width
    if min(height, width) < factor:
        raise RequestError(
            f"`{image.argument}`: got {width} × {height} pixels, expected at least {factor} × {factor}; enlarge it"
        )
    return height - height % factor, width - width % factor


def resize(
    image: Image.Image,
    height: int,
    width: int,
    *,
    mode: ResizeMode = "default",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    argument: str = "image",
) -> Image.Image:
    """Resize an RGB image as `VaeImageProcessor.resize` does.

    Args:
        mode: `default` ignores the aspect ratio; `fill` keeps it and repeats the outermost rows or columns on both
            sides; `crop` keeps it and crops both sides.
        argument: the name of the argument, for error messages.

    Raises:
        RequestError: the image is too narrow or too large to be resized in this mode.
    """
    if mode == "default":
        return image.resize((width, height), resample)
    ratio, image_ratio = width / height, image.width / image.height
    if ratio < image_ratio if mode == "fill" else ratio > image_ratio:
        scaled_width, scaled_height = width, image.height * width // image.width
    else:
        scaled_width, scaled_height = image.width * height // image.height, height
    if not 0 < scaled_width * scaled_height <= MAX_PIXELS:
        raise RequestError(
            f"`{argument}`: got {image.width} × {image.height} pixels to {mode} {width} × {height}, expected a less "
            "different aspect ratio; crop it first"
        )
    scaled = image.resize((scaled_width, scaled_height), resample)
    left, top = width // 2 - scaled_width // 2, height // 2 - scaled_height // 2
    result = Image.new("RGB", (width, height))
    result.paste(scaled, (left, top))
    if mode == "fill" and ratio < image_ratio and top > 0:
        bottom = scaled.height
        result.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        result.paste(scaled.resize((width, top), box=(0, bottom, width, bottom)), (0, top + scaled_height))
    elif mode == "fill" and ratio > image_ratio and left > 0:
        right = scaled.width
        result.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        result.paste(scaled.resize((left, height), box=(right, 0, right, height)), (left + scaled_width, 0))
    return result


def image_to_pixels(
    image: LoadedImage,
    height: int | None = None,
    width: int | None = None,
    *,
    factor: int = 8,
    region: CropRegion | None = None,
    mode: ResizeMode = "default",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Floats:
    """Convert an image to float32 [1, 3, height, width] in −1…1, bit for bit as `VaeImageProcessor.preprocess` does.

    Args:
        height, width: in pixels; rounded down to a multiple of `factor`, as are those of the image or of the region if
            not given.
        factor: pixels per latent (`vae_scale_factor`).
        region: part of the image to use (`find_crop_region`).
        mode, resample: as of `resize`.

    Raises:
        RequestError: the size is too small, or a region or another mode was given for a float array.
    """
    values = _resized_values(image, height, width, factor, region, mode, resample)
    if values.shape[1] == 1:
        values = np.repeat(values, 3, axis=1)
    return 2 * values - 1


def mask_to_pixels(
    mask: LoadedImage,
    height: int | None = None,
    width: int | None = None,
    *,
    factor: int = 8,
    region: CropRegion | None = None,
    mode: ResizeMode = "default",
) -> Floats:
    """Convert a mask to float32 [1, 1, height, width] of 0 (keep) and 1 (repaint), as the inpainting pipelines do.

    Source: `VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)`: resize, convert to
    luminance, and threshold at 0.5.

    Args:
        height, width, factor, region, mode: as of `image_to_pixels`.

    Raises:
        RequestError: as `image_to_pixels`, or a float array has three channels.
    """
    if mask.values is not None and mask.values.shape[-1] != 1:
        raise RequestError(
            f"`{mask.argument}`: got a float array of shape {mask.values.shape}, expected (height, width)"
        )
    values = _resized_values(mask, height, width, factor, region, mode, Image.Resampling.LANCZOS, grayscale=True)
    return (values >= 0.5).astype(np.float32)


def apply_mask(pixels: Floats, mask: Floats) -> Floats:
    """Return the masked image [1, 3, H, W]: pixels [1, 3, H, W] set to 0 (grey) where the mask [1, 1, H, W] is 1."""
    return pixels * (mask < 0.5)


def mask_to_latents(mask: Floats, *, factor: int = 8) -> Floats:
    """Resize a mask [1, 1, H, W] to the size of the latents, [1, 1, H / factor, W / factor], by nearest neighbour.

    Source: `prepare_mask_latents` of diffusers' `StableDiffusionInpaintPipeline`.
    """
    height, width = mask.shape[-2:]
    return interpolate_nearest(mask, height // factor, width // factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class InpaintingInputs:
    """Image and mask, prepared for inpainting.

    Attributes:
        pixels: float32 [1, 3, H, W] in −1…1, the input of the image encoder for the initial latents.
        mask: float32 [1, 1, H, W], 1 where the image is repainted.
        masked_pixels: `pixels` with 0 where the image is repainted, the input of the encoder for a denoiser with
            extra input channels.
        latent_mask: float32 [1, 1, H / factor, W / factor].
        region: the part of the image that is repainted; None without `padding_mask_crop`. The finished image then
            goes through `apply_overlay`.
    """

    pixels: Floats
    mask: Floats
    masked_pixels: Floats
    latent_mask: Floats
    region: CropRegion | None


def prepare_inpainting(
    image: LoadedImage,
    mask_image: LoadedImage,
    height: int,
    width: int,
    *,
    factor: int = 8,
    padding_mask_crop: int | None = None,
) -> InpaintingInputs:
    """Prepare image and mask as diffusers' `StableDiffusionInpaintPipeline` does.

    Args:
        height, width: in pixels; without a size in the request, the bundle's, not the image's.
        factor: pixels per latent (`vae_scale_factor`).
        padding_mask_crop: repaint only the masked region, enlarged by this many pixels on each side and to the aspect
            ratio of the result. Image and mask must then have one size.

    Raises:
        RequestError: the sizes differ, the mask is empty, or a float array was given, all with `padding_mask_crop`;
            or as `image_to_pixels` and `mask_to_pixels`.
    """
    region: CropRegion | None = None
    mode: ResizeMode = "default"
    if padding_mask_crop is not None:
        _check_same_size(image, mask_image)
        region, mode = find_crop_region(mask_image, height, width, padding=padding_mask_crop), "fill"
    pixels = image_to_pixels(image, height, width, factor=factor, region=region, mode=mode)
    mask = mask_to_pixels(mask_image, height, width, factor=factor, region=region, mode=mode)
    return InpaintingInputs(
        pixels=pixels,
        mask=mask,
        masked_pixels=apply_mask(pixels, mask),
        latent_mask=mask_to_latents(mask, factor=factor),
        region=region,
    )


def find_crop_region(mask_image: LoadedImage, height: int, width: int, *, padding: int = 0) -> CropRegion:
    """Return the smallest region around a mask with the aspect ratio `width / height`, as far as the image allows.

    Source: `VaeImageProcessor.get_crop_region`. A pixel belongs to the mask if it is not black.

    Args:
        padding: pixels added on each side before the aspect ratio is matched.

    Raises:
        RequestError: the mask is black, or the padding negative.
    """
    if padding < 0:
        raise RequestError(f"`padding_mask_crop`: got {padding}, expected a whole number of pixels, at least 0")
    mask = np.asarray(mask_image.image.convert("L")) > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise RequestError(
            f"`{mask_image.argument}`: got a black mask, expected white where the image is to be repainted; leave out "
            "`padding_mask_crop` or mark a region"
        )
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, mask_image.width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, mask_image.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _enlarge(top, bottom, int((right - left) / ratio - (bottom - top)), mask_image.height)
    else:
        left, right = _enlarge(left, right, int((bottom - top) * ratio - (right - left)), mask_image.width)
    return left, top, right, bottom


def apply_overlay(
    image: Image.Image, original: LoadedImage, mask_image: LoadedImage, region: CropRegion | None = None
) -> Image.Image:
    """Insert a finished image into the original, which is kept where the mask is black and blended where it is grey.

    Source: `VaeImageProcessor.apply_overlay`.

    Args:
        image: the finished image; without a region, of the size of the original.
        region: the part of the original that `image` shows (`InpaintingInputs.region`).

    Returns:
        An RGB image of the size of the original.

    Raises:
        RequestError: the sizes differ.
    """
    _check_same_size(original, mask_image)
    if region is not None:
        left, top, right, bottom = region
        canvas = Image.new("RGB", original.image.size)
        canvas.paste(resize(image, bottom - top, right - left, mode="crop", argument=original.argument), (left, top))
        image = canvas
    elif image.size != original.image.size:
        raise RequestError(
            f"`{original.argument}`: got {original.width} × {original.height} pixels for a finished image of "
            f"{image.width} × {image.height}, expected one size; resize it"
        )
    # Pillow blends in premultiplied alpha (RGBa); the way there and back rounds as in diffusers.
    kept = Image.new("RGBa", original.image.size)
    kept.paste(original.image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask_image.image.convert("L")))
    result = image.convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")


def _load_file(data: bytes, subject: str, argument: str) -> LoadedImage:
    with decode_image(data, subject) as opened:
        image, parameters = _convert_to_rgb(opened, argument), read_texts(opened).get(PARAMETERS)
    return LoadedImage(argument=argument, image=image, digest=f"sha256:{hash_bytes(data)}", parameters=parameters)


def _convert_to_rgb(image: Image.Image, argument: str) -> Image.Image:
    _check_pixel_count(image.width, image.height, argument)
    if image.mode.startswith(("I", "F")):
        raise RequestError(
            f"`{argument}`: got an image of mode {image.mode}, with 16 or 32 bits per channel, expected 8; scale its "
            "values to 0…255 and save it as 8-bit greyscale or RGB"
        )
    image.load()  # the texts of a PNG may follow its pixels
    profile = image.info.get("Raw profile type exif")  # ImageMagick's form, which Pillow reads where there is no EXIF
    if isinstance(profile, str) and image.info.get("exif") is None:
        check_exif(bytes.fromhex("".join(profile.split("\n")[3:])))
    return ImageOps.exif_transpose(image).convert("RGB")


def _load_array(array: NDArray[Any], argument: str) -> LoadedImage:
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise RequestError(
            f"`{argument}`: got an array of shape {array.shape}, expected (height, width), (height, width, 1) or "
            "(height, width, 3) of one image"
        )
    _check_pixel_count(array.shape[1], array.shape[0], argument)
    values = None
    if np.issubdtype(array.dtype, np.floating):
        values = _check_range(array, argument).reshape(*array.shape[:2], -1)
        pixels = np.round(values * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8:
        pixels = array
    else:
        raise RequestError(f"`{argument}`: got an array of {array.dtype}, expected uint8 in 0…255 or float in 0…1")
    pixels = np.ascontiguousarray(np.broadcast_to(pixels.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))
    return LoadedImage(
        argument=argument,
        image=Image.fromarray(pixels),
        digest=_pixel_digest(pixels if values is None else values),
        values=values,
    )


def _check_range(array: NDArray[Any], argument: str) -> Floats:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise RequestError(
            f"`{argument}`: got float values from {low:g} to {high:g}, expected 0 to 1; scale them, or convert them to "
            "uint8 in 0…255"
        )
    return array.astype(np.float32)


def _check_pixel_count(width: int, height: int, argument: str) -> None:
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"`{argument}`: got {width} × {height} pixels, expected at most {MAX_PIXELS:,} in all; reduce it"
        )


def _check_same_size(image: LoadedImage, mask: LoadedImage) -> None:
    if image.image.size != mask.image.size:
        raise RequestError(
            f"`{mask.argument}`: got {mask.width} × {mask.height} pixels for an `{image.argument}` of "
            f"{image.width} × {image.height}, expected one size; resize one of them"
        )


def _pixel_digest(pixels: NDArray[Any]) -> str:
    header = f"{pixels.dtype} {pixels.shape}\n".encode()
    return f"sha256:{hash_bytes(header + pixels.tobytes())}"


def _resized_values(
    image: LoadedImage,
    height: int | None,
    width: int | None,
    factor: int,
    region: CropRegion | None,
    mode: ResizeMode,
    resample: Image.Resampling,
    grayscale: bool = False,
) -> Floats:
    """Return float32 [1, 1 or 3, height, width] in 0…1."""
    if image.values is not None:
        if region is not None or mode != "default":
            raise RequestError(
                f"`{image.argument}`: got a float array, expected a file, a Pillow image or a uint8 array with "
                "`padding_mask_crop`; convert it to uint8"
            )
        height, width = default_height_width(image, height, width, factor=factor)
        return interpolate_nearest(image.values.transpose(2, 0, 1)[None], height, width)
    source = image.image if region is None else image.image.crop(region)
    height = source.height if height is None else height
    width = source.width if width is None else width
    height, width = default_height_width(image, height, width, factor=factor)
    resized = resize(source, height, width, mode=mode, resample=resample, argument=image.argument)
    values = np.asarray(resized.convert("L") if grayscale else resized).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(values.reshape(height, width, -1).transpose(2, 0, 1))[None]


def _enlarge(low: int, high: int, added: int, limit: int) -> tuple[int, int]:
    """Add pixels on both sides of low…high, and shift the result into 0…limit; what still exceeds the limit is lost."""
    low, high = low - added // 2, high + added - added // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)
