"""The pipeline: from a request to images.

    pipeline = Pipeline.load("my-bundle")
    image = pipeline("a red circle on a blue background", seed=7).images[0]

The family (`families/`) turns the request into samples: text becomes embeddings, a seed noise, a sampler a table of
coefficients. The loop (`sampling/loop.py`) advances the samples row by row. The family decodes the last latents, and
the safety classifier sees the pixels before anyone else does.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from latentrt.backends.models import Components
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.decode import safety
from latentrt.families import open_family
from latentrt.request import OPTIONS, Request
from latentrt.resolve import ResolvedRequest, resolve
from latentrt.result import OutputType, Result, check_output_type, make_result
from latentrt.sampling.loop import Sample, Step, prepare, step

if TYPE_CHECKING:
    from latentrt.backends.openvino import PerformanceHint
    from latentrt.backends.placement import ComputePrecision, Device, Placement
    from latentrt.sampling.schedule import Latents

__all__ = ["Pipeline", "Step", "call_signature"]

log = logging.getLogger("latentrt")

StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


class Pipeline:
    """A loaded bundle that generates images. Graphs are loaded when first needed and kept; threads may share it.

    Args:
        bundle: to generate from.
        components: its sessions; `Pipeline.load` places each component where it runs best.

    Attributes:
        runs_on: what runs each component (`backend`, `device`) and why (`reason`).
    """

    def __init__(self, bundle: Bundle, components: Components) -> None:
        self.bundle, self.components = bundle, components
        self.family = open_family(bundle, components)
        self.runs_on: Mapping[str, Placement] = MappingProxyType(components.placements)

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
        """Open a bundle on the best backend of this machine, or on the one that is named.

        Args:
            path: the bundle's folder; None opens the sample bundle that ships with the package.
            device: `auto`: engines for this GPU, else ONNX Runtime on it, else the CPU, by OpenVINO where it is
                installed and else by ONNX Runtime; `cpu`, `cuda` (ONNX Runtime), `openvino` or `tensorrt` (engines
                only) are used or refused.
            digest: `sha256:…` of the manifest, to run this bundle and no other; without it hashes detect damage, not
                forgery.
            threads: on the CPU; one per core if None.
            provider: one of ONNX Runtime's execution providers by its name, in place of a device.
            precision: what a CPU computes in: `float32`, `bfloat16` (OpenVINO) or `int8` (the default of an int8
                bundle; otherwise float32 is).
            performance_hint: of OpenVINO: `latency`, or `throughput` where several threads generate at once.
            low_memory: release each component as soon as its work is done, and decode in slices where that helps.

        Raises:
            BundleError: there is no bundle, or it is damaged, or not the pinned one.
            BackendError, EngineError: the named device is not available.
        """
        from latentrt.backends.placement import Preferences, place_components

        preferences = Preferences(
            threads=threads, precision=precision, performance_hint=performance_hint, low_memory=low_memory
        )
        bundle = Bundle.open(bundle_path() if path is None else path, digest)
        placements = place_components(bundle, device, provider=provider, preferences=preferences)
        for component, placement in placements.items():
            log.info("%s runs on %s", component, placement)
        return cls(bundle, Components(placements, low_memory=low_memory))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        **options: Any,
    ) -> Result:
        """Generate images. `options` are the keywords of `latentrt.request`, diffusers' where diffusers has one.

        Args:
            output_type: `pil`; `np` for float32 pixels in 0 … 1 [images, height, width, 3]; `latent`, unclassified.
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": …}) after each step; a dict that it
                returns may hold other latents to go on with.

        Raises:
            RequestError: the request is impossible. SafetyError: the images could not be checked.
        """
        check_output_type(output_type)
        request = self.resolve(Request.of(prompt=prompt, **options))
        for each in self.steps(request):
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, each.index, each.timestep, {"latents": each.latents}) or {}
                each.latents = changed.get("latents", each.latents)
        return self.finish(request, each.latents, output_type)

    def resolve(self, request: Request) -> ResolvedRequest:
        """Decide everything that a request leaves open, a random seed included.

        Raises:
            RequestError: this bundle cannot do it.
            SafetyError: the images are to be checked, and the bundle has no classifier.
        """
        if isinstance(request, ResolvedRequest):
            return request
        resolved = resolve(request, self.bundle.manifest, self.family)
        safety.require_classifier(self.bundle.manifest, resolved.policy)
        return resolved

    def steps(self, request: Request) -> Generator[Step, None, None]:
        """Generate step by step: the sampling loop as a generator. Progress, previews and streams consume it; leaving
        it early cancels.

        Args:
            request: a request, or one that `resolve` returned.

        Raises:
            RequestError, SafetyError: as for `resolve`, before any work.
        """
        resolved = self.resolve(request)
        family, components = self.family, self.components
        self.bundle.check(family.files(resolved))  # before any work, everything that the run reads
        if components.on_cpu:
            family.prefetch_first(resolved)
        with components.run():
            for stage in family.stages:
                samples: list[Sample] = stage.begin(resolved)
                denoiser = stage.open_denoiser()
                try:
                    prepare(samples, denoiser)
                    while not samples[0].done:
                        step(samples, denoiser)
                        made = Step(samples)
                        if made.index == 0 and components.on_cpu:
                            family.prefetch_last(resolved)
                        yield made
                        made.write_back()
                finally:
                    denoiser.close()
                    components.done_with(stage.name)

    def finish(self, request: ResolvedRequest, latents: Latents, output_type: OutputType = "pil") -> Result:
        """Decode the last latents and apply the request's safety policy.

        Args:
            request: as `resolve` returned it.
            latents: of the last step.
            output_type: as for the call.

        Raises:
            SafetyError: the classifier failed; nothing is handed out.
        """
        check_output_type(output_type)
        if request.policy == "off":
            log.warning("the safety check is switched off; the images' metadata says so")
        placement = self.runs_on.get(self.family.denoiser)
        backend = None if placement is None else placement.title
        if output_type == "latent":
            return make_result(self.bundle, self.family, request, latents, None, "latent", backend)
        verdicts, classifier = None, self.family.classifier()
        with self.components.run():
            pixels = self.family.finish(request, latents)
            if request.policy != "off":
                assert classifier is not None, "resolve requires one"
                verdicts = safety.judge(lambda: self.components.session(classifier), pixels)
                self.components.done_with(classifier)
        pixels = safety.apply_policy(request.policy, pixels, verdicts or ())
        pixels = self.family.compose(request, pixels)
        return make_result(self.bundle, self.family, request, pixels, verdicts, output_type, backend)


def call_signature() -> inspect.Signature:
    """Return the signature of `Pipeline.__call__` with every option of a request in place of `**options`."""
    own = inspect.signature(Pipeline.__call__)
    fixed = ("self", "prompt", "output_type", "callback_on_step_end")
    options = [
        inspect.Parameter(each.keyword, inspect.Parameter.KEYWORD_ONLY, default=each.default)
        for each in OPTIONS.values()
        if each.keyword not in fixed
    ]
    return own.replace(parameters=[*(own.parameters[name] for name in fixed), *options])


Pipeline.__call__.__signature__ = call_signature()  # type: ignore[attr-defined]
Pipeline.__call__.__doc__ = f"{inspect.getdoc(Pipeline.__call__)}\n\nOptions:\n" + "\n".join(
    f"    {each.keyword}: {each.help}" for each in OPTIONS.values()
)
