"""Is an engine the graph it was built of? Run on the GPU, beside ONNX Runtime on the CPU, before it is accepted.

The inputs are the gate's (`latentrt.bundle.gate_inputs`): prompts, pictures, and what they become on the way through
the bundle's own submodules, in the smallest, the usual and the largest shapes of the engine's profile. The measures and
the bounds are the ones that the graph met beside torch, which its manifest states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, run
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.gate import NOT_COMPARED, difference, message
from latentrt.bundle.gate_inputs import PROMPTS, pictures, tiled
from latentrt.bundle.manifest import GateResult, Precision
from latentrt.engines.record import EngineIdentity, ShapeRange
from latentrt.errors import BuildError
from latentrt.sampling.samplers.ddim import DDIM
from latentrt.text.tokenizer import Tokenizer

__all__ = ["GateInputs", "check_engine"]

# TF32 has half's ten bits of fraction: what float32 is allowed, times what half is allowed beside it
# (`latentrt_export.gates.verify`).
_TF32_FACTOR = 100.0
_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")

OpenReference = Callable[[str, Precision], Session]


class GateInputs:
    """Real inputs of each submodule, in any shape.

    Args:
        bundle: whose submodules make them.
        reference: opens a submodule's graph on ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, reference: OpenReference) -> None:
        self._bundle, self._reference = bundle, reference

    def feeds(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Inputs of these shapes, the same ones every time."""
        rng = np.random.default_rng(0)
        match component:
            case "text_encoder":
                return self._text(*shapes["input_ids"])
            case "unet":
                return self._noisy(shapes["sample"], shapes["encoder_hidden_states"][1], rng)
            case "vae_decoder" | "preview_decoder":
                return {"latents": self._encoded(shapes["latents"])}
            case "vae_encoder":
                batch, _, height, width = shapes["pixels"]
                return {"pixels": _scaled(pictures(rng, batch, height, width))}
            case _:
                return {"pixels": np.ascontiguousarray(pictures(rng, *shapes["pixels"][:3]))}

    def _text(self, batch: int, length: int) -> Arrays:
        layers = self._bundle.manifest.limits.max_clip_skip
        skips = np.arange(batch, dtype=np.int64) % min(3, layers + 1)
        return {"input_ids": np.resize(self._ids, (batch, length)), "clip_skip": skips}

    def _noisy(self, shape: tuple[int, ...], tokens: int, rng: np.random.Generator) -> Arrays:
        """Encoded pictures with the noise of some timesteps, from nearly all to nearly none, beside encoded prompts."""
        timestep = np.resize(np.array([981.0, 21.0, 401.0, 801.0], np.float32), shape[0])
        alpha_bar = self._alphas_cumprod[timestep.astype(np.int64) % len(self._alphas_cumprod)][:, None, None, None]
        noisy = np.sqrt(alpha_bar) * self._encoded(shape) + np.sqrt(1 - alpha_bar) * rng.standard_normal(shape)
        text = self._embeddings  # (P, 77, D)
        wanted = (shape[0], tokens // text.shape[1], *text.shape[1:])
        embeddings = np.resize(text, wanted).reshape(shape[0], tokens, -1)
        return {"sample": noisy.astype(np.float32), "timestep": timestep, "encoder_hidden_states": embeddings}

    def _encoded(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        batch, _, height, width = shape
        return tiled(self._latents, batch, height, width)

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        record = self._bundle.manifest.tokenizers["text_encoder"]
        tokenizer = Tokenizer.from_json(self._bundle.read(record.file), record)
        return np.concatenate([tokenizer.chunks(prompt)[:1] for prompt in PROMPTS])

    @cached_property
    def _embeddings(self) -> NDArray[np.float32]:
        encoder = self._reference("text_encoder", "float32")
        clip_skip = np.zeros(len(self._ids), np.int64)
        states: NDArray[np.float32] = run(encoder, input_ids=self._ids, clip_skip=clip_skip)["hidden_states"]
        return states

    @cached_property
    def _latents(self) -> NDArray[np.float32]:
        geometry = self._bundle.manifest.latent_spaces["unet"]
        side = 32 * geometry.downscale
        pixels = _scaled(pictures(np.random.default_rng(1), 2, side, side))
        means = [run(self._reference("vae_encoder", "float32"), pixels=one[None])["mean"] for one in pixels]
        latents: NDArray[np.float32] = np.concatenate(means) * np.float32(geometry.scale)
        return latents

    @cached_property
    def _alphas_cumprod(self) -> NDArray[np.float32]:
        config = self._bundle.manifest.schedulers["unet"].config
        noise = DDIM.read({key: value for key, value in config.items() if key in _NOISE_KEYS})
        return noise.alphas_cumprod()


def check_engine(
    engine: Session, identity: EngineIdentity, bundle: Bundle, reference: OpenReference
) -> tuple[GateResult, ...]:
    """Run an engine beside ONNX Runtime.

    Args:
        engine: loaded, on the GPU.
        identity: what it was built of and for.
        reference: opens a submodule's graph on ONNX Runtime.

    Returns:
        A figure for each output and shape.

    Raises:
        BuildError: a figure is above its bound, or is not a number; the engine must not be accepted.
    """
    name = identity.component
    inputs, graph = GateInputs(bundle, reference), reference(name, "float32")
    figures = []
    for shapes in _cases(identity.profile):
        feeds = inputs.feeds(name, shapes)
        expected, found = run(graph, **feeds), run(engine, **feeds)
        figures += [
            _figure(identity, bundle, output, shapes, expected[output], found[output])
            for output in expected
            if output not in NOT_COMPARED
        ]
    return tuple(figures)


def _cases(profile: Mapping[str, ShapeRange]) -> list[dict[str, tuple[int, ...]]]:
    """The smallest, the usual and the largest shapes; each once."""
    cases: list[dict[str, tuple[int, ...]]] = []
    for which in ("min", "opt", "max"):
        case = {name: getattr(shapes, which) for name, shapes in profile.items()}
        if case not in cases:
            cases.append(case)
    return cases


def _figure(
    identity: EngineIdentity,
    bundle: Bundle,
    output: str,
    shapes: dict[str, tuple[int, ...]],
    expected: NDArray[Any],
    found: NDArray[Any],
) -> GateResult:
    gates = bundle.manifest.components[identity.component].graphs[identity.precision].gate
    gate = next((gate for gate in gates if gate.output == output), None)
    if gate is None:
        raise BuildError(
            f"{identity.component}: the manifest states no bound for {output}, so its engine cannot be judged; export "
            "the bundle again"
        )
    bound = gate.bound * _TF32_FACTOR if identity.options.tf32 and gate.metric != "levels" else gate.bound
    figure = difference(expected, found, gate.metric)
    if not figure <= bound:
        wrong = message(expected, found, figure, gate.metric, "ONNX Runtime's")
        raise BuildError(
            f"{identity.component}: the engine's {output} {wrong} for inputs of shape {shapes}; the bound is "
            f"{bound:g}. The engine was not kept"
        )
    return GateResult(output=output, shapes=shapes, metric=gate.metric, value=figure, bound=bound)


def _scaled(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in −1 … 1."""
    return np.ascontiguousarray((pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32))
