"""A pipeline of Stable Diffusion XL without one: the sample bundle with another manifest, a second text encoder and a
denoiser that are functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt import Pipeline, Request
from latentrt.backends.models import Components, Models
from latentrt.backends.placement import place_components
from latentrt.backends.session import Session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component, InputSpec
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.resolve import ResolvedRequest
from latentrt.sampling.loop import Sample
from tests.runtime.fake_sessions import FunctionSession

WIDTH, WIDTH_2, POOLED = 128, 6, 5
SIZES: dict[str, Any] = {"height": 64, "width": 96}


class XL:
    """A pipeline whose second text encoder and denoiser are functions that record their inputs."""

    def __init__(self, *, tasks: tuple[str, ...] | None = None, refiner: bool = False, channels: int = 4) -> None:
        bundle = Bundle.open(bundle_path())
        manifest = bundle.manifest
        components, tokenizers = dict(manifest.components), dict(manifest.tokenizers)
        first, unet = components["text_encoder"], components["unet"]
        states, pooled = ("chunks", 77, WIDTH_2), ("chunks", POOLED)
        components["text_encoder_2"] = msgspec.structs.replace(
            first,
            graphs=unet.graphs,  # which are not opened
            outputs=(TensorSpec("hidden_states", "float32", states), TensorSpec("pooled", "float32", pooled)),
        )
        tokenizers["text_encoder_2"] = tokenizers["text_encoder"]
        encoders = ["text_encoder_2"] if refiner else ["text_encoder", "text_encoder_2"]
        width = WIDTH_2 + (0 if refiner else WIDTH)
        components["unet"] = self._denoiser(unet, encoders, width, 5 if refiner else 6, channels)
        if refiner:
            del components["text_encoder"], tokenizers["text_encoder"]
        changed = msgspec.structs.replace(
            manifest,
            family="stable-diffusion-xl",
            tasks=tasks or ("text-to-image", "image-to-image", "inpainting"),
            components=components,
            tokenizers=tokenizers,
            defaults=msgspec.structs.replace(manifest.defaults, force_zeros_for_empty_prompt=not refiner),
        )
        placements = place_components(bundle, "cpu")
        bundle.manifest = changed
        self.encoded: list[NDArray[np.int64]] = []
        self.fed: list[Mapping[str, Any]] = []
        functions = {"text_encoder_2": self._encode, "unet": self._denoise}
        placements["text_encoder_2"] = placements["text_encoder"]
        for name, function in functions.items():
            record = components[name]
            placements[name] = replace(
                placements[name], split=False, open=self._open(record, function), key=(object(),)
            )
        self.pipeline = Pipeline(bundle, Components(placements, models=Models()))

    @staticmethod
    def _denoiser(unet: Component, encoders: list[str], width: int, values: int, channels: int) -> Component:
        latents, timestep, text = unet.inputs
        joined = "+".join(f"{name}.hidden_states" for name in encoders)
        return msgspec.structs.replace(
            unet,
            inputs=(
                msgspec.structs.replace(latents, shape=(latents.shape[0], channels, *latents.shape[2:])),
                timestep,
                msgspec.structs.replace(text, shape=(*text.shape[:2], width), source=joined),
                InputSpec("text_embeds", "float32", ("evaluations", POOLED), "text_encoder_2.pooled"),
                InputSpec("time_ids", "float32", ("evaluations", values), "micro-conditioning"),
            ),
            parts={},
        )

    @staticmethod
    def _open(
        record: Component, function: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> Callable[[str | None], Session]:
        return lambda part: FunctionSession(record.inputs, record.outputs, function)

    def _encode(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        ids = feeds["input_ids"]
        self.encoded.append(ids)
        means = ids.astype(np.float32).mean(axis=1) + feeds["clip_skip"]
        return {
            "hidden_states": np.repeat(
                ids[..., np.newaxis] + feeds["clip_skip"][:, None, None], WIDTH_2, axis=2
            ).astype(np.float32),
            "pooled": np.repeat(means[:, np.newaxis], POOLED, axis=1).astype(np.float32),
        }

    def _denoise(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.fed.append(feeds)
        scale = feeds["time_ids"].sum(axis=1) / 1e4 + feeds["text_embeds"].mean(axis=1) / 1e5
        return {"noise_pred": (feeds["sample"][:, :4] * scale[:, None, None, None]).astype(np.float32)}

    def resolve(self, **values: Any) -> ResolvedRequest:
        options: dict[str, Any] = {"prompt": "a star", "seed": 7, "num_inference_steps": 4, "safety": "off", **SIZES}
        if "image" in values:
            options = {key: value for key, value in options.items() if key not in SIZES}
        return self.pipeline.resolve(Request.of(**{**options, **values}))

    def begin(self, **values: Any) -> list[Sample]:
        return self.pipeline.family.stages[0].begin(self.resolve(**values))
