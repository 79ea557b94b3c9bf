"""How does a request become pictures? Newcomers start here.

    pipeline = Pipeline.load("my-bundle")
    image = pipeline("a red circle on a blue background", seed=7).images[0]

Text becomes embeddings (`conditioning.py`), a seed becomes noise (`noise.py`), a sampler becomes a table of
coefficients (`samplers/`, `schedule.py`). The loop below asks the denoiser once for each row of the table and lets the
row say what follows. The autoencoder makes pixels of the last latents, and the safety classifier looks at them before
anyone else does.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from latentrt import ahead
from latentrt.backends.sessions import Sessions
from latentrt.backends.submodules import OpenSession, Submodules
from latentrt.bundle.bundle import Bundle
from latentrt.decode import autoencoder, safety
from latentrt.errors import RequestError
from latentrt.request import Order, Request, resolve
from latentrt.result import OutputType, Result, make_result
from latentrt.sample import bundle_path
from latentrt.sampling import noise, samplers, trajectory
from latentrt.sampling.schedule import Latents, Schedule
from latentrt.sampling.step import Step
from latentrt.text.clip import condition
from latentrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from latentrt.backends.cpu_choice import ComputePrecision
    from latentrt.backends.device import Device
    from latentrt.backends.openvino import PerformanceHint
    from latentrt.sampling.approximation import Decoder

__all__ = ["Pipeline", "Step"]

log = logging.getLogger("latentrt")

StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


class Pipeline:
    """A bundle that is ready to draw. Graphs are loaded when they are first needed and kept; threads may share it.

    Args:
        bundle: what to draw from.
        open_session: loads a component's graph by name. Tests put their own here; `Pipeline.load` what runs best.
        low_memory: let each component go as soon as its work is done.

    Attributes:
        runs_on: component → what runs it and why, in words, where that is known.
    """

    def __init__(self, bundle: Bundle, open_session: OpenSession, *, low_memory: bool = False) -> None:
        self.bundle = bundle
        self._sessions = open_session if isinstance(open_session, Sessions) else Sessions({})
        self.runs_on: Mapping[str, str] = self._sessions.choices
        self._submodules = Submodules(open_session, low_memory=low_memory)
        self._tokenizer: Tokenizer | None = None
        self._loading = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: Device = "auto",
        digest: str | None = None,
        threads: int | None = None,
        provider: str | None = None,
        precision: ComputePrecision | None = None,
        performance_hint: PerformanceHint = "latency",
        low_memory: bool = False,
    ) -> Self:
        """Open a bundle to be run on the best that this machine has, or on what is named.

        Args:
            path: the bundle's folder; None opens the sample bundle that comes with the package (`latentrt.sample`).
            device: `auto`: engines for this GPU, else ONNX Runtime on it, else the CPU, by OpenVINO where it is
                installed and else by ONNX Runtime, and `runs_on` says which and why; `cpu`, `cuda` (ONNX Runtime),
                `openvino` or `tensorrt` (engines only) are taken or refused.
            digest: `sha256:…` of its manifest, to run this bundle and no other; without it hashes detect damage, not
                forgery.
            threads: on the CPU; one per core if None.
            provider: one of ONNX Runtime's execution providers by its name, in place of a device.
            precision: what a CPU computes in: `float32`, `bfloat16` (OpenVINO) or `int8` (a bundle of int8, whose
                default it is; otherwise float32 is).
            performance_hint: of OpenVINO: `latency`, or `throughput` where several threads draw at once.
            low_memory: let each submodule go as soon as its work is done, and decode in slices where that helps.

        Raises:
            BundleError: there is no bundle, or it is damaged, or not the one that is pinned.
            BackendError, EngineError: the device that is named cannot be had.
        """
        from latentrt.backends.cpu_choice import Preferences
        from latentrt.backends.device import choose_sessions

        preferences = Preferences(
            threads=threads, precision=precision, performance_hint=performance_hint, low_memory=low_memory
        )
        bundle = Bundle.open(bundle_path() if path is None else path, digest)
        sessions = choose_sessions(bundle, device, provider=provider, preferences=preferences)
        for component, words in sessions.choices.items():
            log.info("%s runs on %s", component, words)
        return cls(bundle, sessions, low_memory=low_memory)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        deep_cache: int = 1,
        decoder: Decoder = "full",
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        latents: NDArray[Any] | None = None,
        prompt_embeds: NDArray[Any] | None = None,
        negative_prompt_embeds: NDArray[Any] | None = None,
        clip_skip: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        karras: bool | None = None,
        safety: str | None = None,
    ) -> Result:
        """Draw. The arguments are those of `Request`, and two more.

        Args:
            output_type: `pil`; `np` for float32 pixels in 0 … 1 [pictures, height, width, 3]; `latent`, unclassified.
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": …}) after each step; a dict that it
                returns may hold other latents to go on with.

        Raises:
            RequestError: the request is impossible. SafetyError: the pictures could not be checked.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            deep_cache=deep_cache,
            decoder=decoder,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            seed=seed,
            sampler=sampler,
            sampler_options=sampler_options,
            karras=karras,
            safety=safety,
        )
        order = self.resolve(request)
        for step in self.steps(order):
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step.index, step.timestep, {"latents": step.latents}) or {}
                step.latents = changed.get("latents", step.latents)
        return self.finish(order, step.latents, output_type)

    def resolve(self, request: Request) -> Order:
        """Decide everything that a request leaves open, a random seed included.

        Raises:
            RequestError: this bundle cannot do it.
            SafetyError: the pictures are to be checked, and the bundle has no classifier.
        """
        order = resolve(request, self.bundle.manifest)
        self._sessions.check(order)
        self.schedule(order)
        safety.require_classifier(self.bundle.manifest, order.safety)
        return order

    def schedule(self, order: Order) -> Schedule:
        """The table of coefficients that an order is drawn by."""
        scheduler = self.bundle.manifest.schedulers["unet"]
        samplers.check_suits(order.sampler, scheduler.class_name)
        steps = samplers.Steps(count=order.steps, eta=order.eta)
        return samplers.schedule(
            order.sampler, scheduler.config, steps, karras=order.karras, options=order.sampler_options
        )

    def steps(self, request: Request | Order) -> Generator[Step, None, None]:
        """Draw step by step: the denoising loop as a generator. Progress, previews and streams consume it; leaving it
        early cancels.

        Args:
            request: what to draw; an `Order` is a request that `resolve` has seen.

        Raises:
            RequestError, SafetyError: as for `resolve`, before any work.
        """
        order = self.resolve(request) if isinstance(request, Request) else request
        schedule = self.schedule(order)
        # At once and before any work, for everything that the run is going to read.
        needed = [
            "text_encoder",
            "unet",
            autoencoder.decoder_of(order),
            *([] if order.safety == "off" else ["safety_checker"]),
        ]
        self.bundle.check([self.bundle.manifest.tokenizers["text_encoder"].file, *self.bundle.files_of(needed)])
        if self._sessions.on_cpu:
            ahead.load_denoiser(self._submodules, order, self.bundle.manifest, schedule)
        try:
            conditionings = condition(order, self._text(), self._submodules("text_encoder"))
        finally:
            self._submodules.done_with("text_encoder")
        generators = [noise.Generator(seed) for seed in order.seeds]
        latents = self._first_latents(order, schedule, generators)
        loop = changed = step = None
        try:
            denoiser = self._submodules("unet")
            loop = trajectory.begin(
                denoiser, schedule, latents, conditionings, order, lambda: noise.draw(generators, latents.shape[1:])
            )
            for k, timestep in enumerate(schedule.t):
                step = Step(k, len(schedule), float(timestep), loop.step(changed))
                if k == 0 and self._sessions.on_cpu:
                    ahead.load_decoder(self._submodules, order, self.bundle.manifest)
                    ahead.load_classifier(self._submodules, order)
                yield step
                changed = None
                if step.looked_at:  # who never looked cannot have changed them
                    changed = step.latents = trajectory.check_changed(step.latents, latents.shape)
        finally:
            try:
                if step is not None:
                    step.settle()
            finally:
                if loop is not None:
                    loop.close()
                self._submodules.done_with("unet")

    def finish(self, order: Order, latents: Latents, output_type: OutputType = "pil") -> Result:
        """Make of the last latents what was asked for, checked as the order's safety policy says.

        Args:
            order: what `resolve` gave.
            latents: what the last step left.
            output_type: as for the call.

        Raises:
            SafetyError: the classifier failed; nothing is handed out.
        """
        if output_type not in ("pil", "np", "latent"):
            raise RequestError(f"found output_type {output_type!r}, expected one of pil, np, latent")
        if order.safety == "off":
            log.warning("the safety check is switched off; the pictures' metadata says so")
        if output_type == "latent":
            return make_result(self.bundle, order, latents, None, "latent", self._sessions.denoiser)
        if self._sessions.on_cpu:
            ahead.load_classifier(self._submodules, order)
        pixels = self._decode(order, latents)
        verdicts = None if order.safety == "off" else safety.judge(lambda: self._submodules("safety_checker"), pixels)
        self._submodules.done_with("safety_checker")
        pixels = safety.apply_policy(order.safety, pixels, verdicts or ())
        return make_result(self.bundle, order, pixels, verdicts, output_type, self._sessions.denoiser)

    def _decode(self, order: Order, latents: Latents) -> NDArray[np.uint8]:
        name = autoencoder.decoder_of(order)
        pixels = autoencoder.decode(self._submodules(name), order, latents, self.bundle.manifest)
        self._submodules.done_with(name)
        return pixels

    def _first_latents(self, order: Order, schedule: Schedule, generators: Sequence[noise.Generator]) -> Latents:
        geometry = self.bundle.manifest.latent_spaces["unet"]
        shape = (geometry.channels, order.height // geometry.downscale, order.width // geometry.downscale)
        standard = noise.draw(generators, shape) if order.latents is None else order.latents
        return schedule.first_latents(standard)

    def _text(self) -> Tokenizer:
        with self._loading:
            if self._tokenizer is None:
                record = self.bundle.manifest.tokenizers["text_encoder"]
                self._tokenizer = Tokenizer.from_json(self.bundle.read(record.file), record)
            return self._tokenizer
