"""Image preprocessing of the models beside the VAE: CLIP image encoders, and DPT depth estimators with their output.

diffusers calls these processors the `feature_extractor` of a pipeline. Both are reproduced as transformers computes
them with Pillow (`CLIPImageProcessorPil`, `DPTImageProcessorPil`; before transformers 5 the slow processors), not as
torchvision does, whose bicubic resampling rounds differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.bundle.manifest import Preprocessing
from latentrt.errors import RequestError
from latentrt.images.files import MAX_PIXELS
from latentrt.images.inputs import LoadedImage
from latentrt.images.interpolation import interpolate_bicubic

__all__ = ["ClipPreprocessing", "depth_to_latents", "preprocess"]

Floats = NDArray[np.float32]
Channels = tuple[float, float, float]

_CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ClipPreprocessing:
    """Preprocessing of a CLIP image encoder: resize the shortest edge, crop the centre, normalize.

    Used for image variation, Stable unCLIP and IP-Adapter. The defaults are those of `CLIPImageProcessor`.

    Attributes:
        shortest_edge: in pixels, after resizing.
        crop: edge of the square in pixels, at most `shortest_edge`.
        mean, std: of each channel, in 0…1.
        resample: Pillow's filter.
    """

    shortest_edge: int = 224
    crop: int = 224
    mean: Channels = _CLIP_MEAN
    std: Channels = _CLIP_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.shortest_edge:
            raise ValueError(f"got crop={self.crop}, expected 1 to shortest_edge={self.shortest_edge}")

    def pixel_values(self, image: LoadedImage) -> Floats:
        """Convert an image to float32 [1, 3, crop, crop].

        Raises:
            RequestError: the image is so narrow that its longer edge would become too long.
        """
        short, long = sorted((image.width, image.height))
        long = int(self.shortest_edge * long / short)
        if self.shortest_edge * long > MAX_PIXELS:
            raise RequestError(
                f"`{image.argument}`: got {image.width} × {image.height} pixels, expected a less narrow image; crop it"
            )
        portrait = image.width <= image.height
        width, height = (self.shortest_edge, long) if portrait else (long, self.shortest_edge)
        resized = image.image.resize((width, height), self.resample)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        return _normalize(resized.crop((left, top, left + self.crop, top + self.crop)), self.mean, self.std)


def preprocess(image: LoadedImage, preprocessing: Preprocessing) -> Floats:
    """Resize and normalize an image with a bundle's preprocessing, to float32 [1, 3, height, width].

    With `DPTImageProcessor` of transformers this is the preprocessing of a depth estimator that takes images of one
    size.
    """
    size = preprocessing.width, preprocessing.height
    resized = image.image.resize(size, Image.Resampling[preprocessing.resample.upper()])
    return _normalize(resized, preprocessing.mean, preprocessing.std)


def depth_to_latents(depth_map: NDArray[np.floating], height: int, width: int, *, factor: int = 8) -> Floats:
    """Resize a depth map to the size of the latents and scale it to −1…1.

    Source: `prepare_depth_map` of diffusers' `StableDiffusionDepth2ImgPipeline`.

    Args:
        depth_map: [H, W] or [1, H, W], an estimator's output or given by the user; any scale, near is large.
        height, width: of the result in pixels.
        factor: pixels per latent (`vae_scale_factor`).

    Returns:
        float32 [1, 1, height / factor, width / factor].

    Raises:
        RequestError: the map has another shape or values that are not finite, or is constant, which leaves its scale
            undefined (diffusers divides by 0).
    """
    depth = np.asarray(depth_map)
    if depth.ndim == 3 and len(depth) == 1:
        depth = depth[0]
    if depth.ndim != 2 or not depth.size or not np.issubdtype(depth.dtype, np.floating):
        raise RequestError(f"`depth_map`: got {depth.dtype} of shape {depth.shape}, expected float (height, width)")
    with np.errstate(over="ignore"):
        depth = depth.astype(np.float32)
    if not np.isfinite(depth).all():
        raise RequestError("`depth_map`: got NaN or infinity, expected finite float32 values")
    resized = interpolate_bicubic(depth[None, None], height // factor, width // factor)
    low, high = resized.min(), resized.max()
    if low == high:
        raise RequestError(f"`depth_map`: got the depth {low:g} everywhere, expected at least two depths")
    return np.asarray(2 * (resized - low) / (high - low) - 1, np.float32)


def _normalize(image: Image.Image, mean: Channels, std: Channels) -> Floats:
    """Convert an RGB image to float32 [1, 3, height, width]."""
    # As transformers does: rescale in float64, round to float32, normalize in float32.
    values: Floats = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    offset, scale = (np.asarray(channels, dtype=np.float32) for channels in (mean, std))
    return np.ascontiguousarray(((values - offset) / scale).transpose(2, 0, 1))[None]
