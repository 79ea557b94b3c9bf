"""Inputs on which a graph or an engine is compared with its reference.

The inputs of a component are made from their sources (`latentrt.bundle.manifest.InputSpec`), as realistic as a
checkpoint alone allows: prompts, synthetic images, and other components' outputs for them. The exporter and the engine
builder use the same functions, so both compare on the same arrays.

The arrays behind the sources are collected in one mapping:

- `tokens:COMPONENT`: int64 (P, length), a chunk of each prompt (`tokenize_prompts`);
- `option:NAME`: the largest value of a request option;
- `alphas_cumprod:DENOISER`: (T,), the training noise schedule;
- `latents`: float32 (N, C, H, W), encoded images in the scale of the sampling loop (`collect_outputs`);
- `COMPONENT.OUTPUT`: an output of another component for its reference shapes (`collect_outputs`); joined outputs are
  in it one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import InputSpec, LatentSpace, Role
from latentrt.bundle.tensors import TensorSpec, sized

__all__ = [
    "PROMPTS",
    "UPSTREAM_ROLES",
    "collect_outputs",
    "join_outputs",
    "make_gate_inputs",
    "make_image_pixels",
    "make_images",
    "make_masks",
    "reference_shapes",
    "tokenize_prompts",
]

Arrays = dict[str, NDArray[Any]]

PROMPTS = (
    "a photograph of an astronaut riding a horse on the moon, 35mm film, dramatic light, highly detailed",
    "",
    "oil painting of a stormy sea with a lighthouse; thick brush strokes, by a dutch master of the 17th century",
    "a red circle on a blue background",
)
# The roles of components whose outputs are sources of others.
UPSTREAM_ROLES: frozenset[Role] = frozenset({"text-encoder", "image-encoder", "encoder", "depth-estimator"})
# The sizes of the axes for which upstream components are run once.
_REFERENCE_SIZES = {
    "chunks": 5,
    "batch": 1,
    "images": 1,
    "height": 32,
    "width": 40,
    "pixel_height": 256,
    "pixel_width": 320,
}
# In thousandths of the training timesteps: from nearly all noise to nearly none.
_TIMESTEPS = (981, 21, 401, 801)
_NOISE_LEVELS = (20, 0, 250, 100)
_GUIDANCE_WEIGHTS = (6.5, 0.0, 13.1, 3.0)
# Original height and width, top and left of the crop, target height and width: a square, a small image enlarged, a wide
# crop of a tall image, a large one.
_MICRO_CONDITIONINGS = (
    (1024, 1024, 0, 0, 1024, 1024),
    (480, 640, 0, 64, 768, 1152),
    (2048, 1365, 512, 0, 640, 1536),
    (4096, 4096, 96, 32, 1024, 1024),
)
_AESTHETIC_SCORES = (6.0, 2.5, 5.3, 7.9)  # of a refiner, in place of the target size
_MAX_OPTION_VALUES = 3


def make_gate_inputs(
    name: str, inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, NDArray[Any]]
) -> Arrays:
    """Make a component's inputs of the given shapes; the same arrays every time.

    Args:
        name: of the component.
        inputs: its inputs.
        shapes: the shape of each input.
        arrays: the arrays behind the sources, see above.
    """
    feeds: Arrays = {}
    is_denoiser = any(spec.source in ("timestep", "c-noise") for spec in inputs)
    for spec in inputs:
        shape = shapes[spec.name]
        made: NDArray[Any]
        match spec.source:
            case "latents":
                made = _tile_latents(arrays["latents"], shape)
                if is_denoiser:
                    made = _add_noise(made, arrays["latents"].shape[1], arrays[f"alphas_cumprod:{name}"])
                else:
                    made = _standardize_rows(made)
            case "timestep":
                made = _make_timesteps(shape[0], len(arrays[f"alphas_cumprod:{name}"]))
            case "c-noise":
                made = _make_c_noise(shape[0], arrays[f"alphas_cumprod:{name}"])
            case "guidance-weight":
                made = np.resize(_GUIDANCE_WEIGHTS, shape)
            case "micro-conditioning":
                made = _make_micro_conditioning(shape)
            case "tokens":
                made = np.resize(arrays[f"tokens:{name}"], shape)
            case "image" | "images":
                made = make_images(*shape[:3]) if spec.dtype == "uint8" else make_image_pixels(shape)
            case "mask":
                made = make_masks(shape[0], *shape[2:])
            case "noise-level":
                made = np.resize(_NOISE_LEVELS, shape)
            case option if option.startswith("option:"):
                made = np.arange(shape[0]) % min(_MAX_OPTION_VALUES, int(arrays[option]) + 1)
            case _:
                made = _resize_output(join_outputs(spec, arrays), shape)
        feeds[spec.name] = np.ascontiguousarray(made, spec.dtype)
    return feeds


def reference_shapes(inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an upstream component's inputs whose outputs are sources of other components."""
    return {spec.name: sized(spec, _REFERENCE_SIZES) for spec in inputs}


def collect_outputs(name: str, role: Role, outputs: Mapping[str, NDArray[Any]], space: LatentSpace) -> Arrays:
    """Return the arrays that an upstream component adds to those behind the sources.

    Args:
        name, role: of the component.
        outputs: of the component for its reference shapes, in the order of its signature. The first output of an
            encoder is the mean of the latent distribution.
        space: the latent space of the component's model.
    """
    found = {f"{name}.{output}": array for output, array in outputs.items()}
    if role == "encoder":
        mean = next(iter(outputs.values()))
        found["latents"] = space.normalize(mean)
    return found


def join_outputs(spec: InputSpec, arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> NDArray[Any]:
    """Return the array of an input that other components make: their outputs, joined along the last axis.

    Args:
        spec: the input.
        arrays: the arrays behind the sources.
        prefix: of their keys, in front of `COMPONENT.OUTPUT`.
    """
    outputs = [arrays[f"{prefix}{each}"] for each in spec.source.split("+")]
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=-1)


def tokenize_prompts(chunks: Callable[[str], NDArray[np.int64]], prompts: Sequence[str] = PROMPTS) -> NDArray[np.int64]:
    """Return the first chunk of each prompt, int64 (P, length); `chunks` is a tokenizer's."""
    return np.concatenate([chunks(prompt)[:1] for prompt in prompts])


def make_images(batch: int, height: int, width: int) -> NDArray[np.uint8]:
    """Make images with the statistics that matter to a graph: smooth fields, hard edges, saturated colours, some grain.

    Returns:
        uint8 (batch, height, width, 3).
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.uniform(1, 12, (batch, 3, 2)) * np.pi
    phases = rng.uniform(0, 2 * np.pi, (batch, 3))
    fields = np.sin(
        waves[..., 0, None, None] * x + waves[..., 1, None, None] * y + phases[..., None, None]
    )  # (B, 3, H, W)
    edges = np.sign(np.hypot(x - 0.5, y - 0.5) - rng.uniform(0.1, 0.5, (batch, 1, 1, 1)))
    grain = rng.normal(0, 0.05, fields.shape)
    pixels = 127.5 + 127.5 * (0.6 * fields + 0.4 * edges + grain)
    finished: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(finished.transpose(0, 2, 3, 1))


def make_image_pixels(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Make images (`make_images`) of a shape (batch, 3, height, width), float32 in −1 … 1."""
    pixels = make_images(shape[0], *shape[2:]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels / np.float32(127.5) - 1)


def make_masks(batch: int, height: int, width: int) -> NDArray[np.float32]:
    """Make masks of inpainting, 1 where an image is repainted: a box, and in every second row the whole image.

    Returns:
        float32 (batch, 1, height, width).
    """
    masks = np.zeros((batch, 1, height, width), np.float32)
    masks[::2, :, height // 4 : height - height // 4, width // 3 :] = 1
    masks[1::2] = 1
    return masks


def _tile_latents(latents: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Repeat latents, then crop them, to a shape (batch, C, height, width); extra channels begin again at the first."""
    repeats = [-(-wanted // found) for wanted, found in zip(shape, latents.shape, strict=True)]
    batch, channels, height, width = shape
    return np.tile(latents, repeats)[:batch, :channels, :height, :width].astype(np.float32)


def _standardize_rows(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give every second row the mean and variance that latents have at the end of a run: 0 and 1 in each channel.

    A trained autoencoder's latents have about these already. Those of one whose `scaling_factor` does not fit its
    encoder do not, and its decoder would be compared on inputs that no run has.
    """
    made = latents.copy()
    rows = made[1::2]
    mean, deviation = (f(rows, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
    made[1::2] = (rows - mean) / np.where(deviation > 0, deviation, np.float32(1))
    return made


def _make_timesteps(count: int, trained: int) -> NDArray[np.int64]:
    return np.resize(np.array(_TIMESTEPS) * trained // 1000, count)


def _make_c_noise(count: int, alphas_cumprod: NDArray[Any]) -> NDArray[np.float64]:
    """Return c_noise = ln(σ) / 4 of the timesteps, with σ that of latents x0 + σ · ε."""
    alpha_bar = alphas_cumprod[_make_timesteps(count, len(alphas_cumprod))].astype(np.float64)
    return np.log((1 - alpha_bar) / alpha_bar) / 8


def _make_micro_conditioning(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Make the micro-conditioning of each row, of 6 values or of the 5 of a refiner; neighbouring rows differ."""
    rows = np.array(_MICRO_CONDITIONINGS, np.float32)
    if shape[1] == 5:
        rows = np.concatenate([rows[:, :4], np.array(_AESTHETIC_SCORES, np.float32)[:, None]], axis=1)
    return np.resize(rows, shape)


def _add_noise(clean: NDArray[np.float32], channels: int, alphas_cumprod: NDArray[Any]) -> NDArray[np.float64]:
    """Add the noise of each row's timestep to the first `channels` channels, those of the latents."""
    alpha_bar = alphas_cumprod[_make_timesteps(len(clean), len(alphas_cumprod))][:, None, None, None].astype(np.float64)
    latents = clean[:, :channels]
    noise = np.random.default_rng(0).standard_normal(latents.shape)
    noisy = np.sqrt(alpha_bar) * latents + np.sqrt(1 - alpha_bar) * noise
    return np.concatenate([noisy, clean[:, channels:]], axis=1)


def _resize_output(output: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Repeat rows to a shape (rows, …). Where that has more tokens than a row, (rows, tokens, D), several rows of the
    output are joined along the tokens, as the chunks of a prompt are; the last is cut where it exceeds them."""
    if len(shape) == output.ndim == 3 and shape[1] != output.shape[1]:
        chunks = np.resize(output, (shape[0], -(-shape[1] // output.shape[1]), *output.shape[1:]))
        return chunks.reshape(shape[0], -1, shape[2])[:, : shape[1]]
    return np.resize(output, shape)
