"""The pipeline: from a request to images.

    pipeline = Pipeline.load("my-bundle")
    image = pipeline("a red circle on a blue background", seed=7).image

The family (`families/`) turns the request into samples: text becomes embeddings, a seed noise, a sampler a table of
coefficients. The loop (`sampling/loop.py`) advances the samples row by row. The family decodes the last latents, and
the safety classifier sees the pixels before anyone else does.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from latentrt.backends.models import Components, closed_error
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.printable import quote
from latentrt.bundle.sample import find_bundle
from latentrt.decode import safety
from latentrt.errors import MissingAttributeError, RequestError
from latentrt.families import open_family
from latentrt.images.files import to_images
from latentrt.migration import attribute_advice
from latentrt.progress_bar import ProgressBar
from latentrt.request import OPTIONS, CallOptions, Request, Whole
from latentrt.resolve import ResolvedRequest, require_preview_decoder, resolve
from latentrt.result import OutputType, Result, check_output_type, make_result
from latentrt.sampling.loop import Sample, Step, prepare, step
from latentrt.timings import Stopwatch, measured

if TYPE_CHECKING:
    from PIL import Image

    from latentrt.backends.openvino import PerformanceHint
    from latentrt.backends.placement import ComputePrecision, Device, Placement
    from latentrt.decode.safety import Verdict
    from latentrt.families.family import Pixels
    from latentrt.sampling.schedule import Latents

__all__ = ["Pipeline", "Step", "call_signature"]

log = logging.getLogger("latentrt")

StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]
PreviewCallback = Callable[[Step, "list[Image.Image]"], None]


class _AdvisesOnAttributes(type):
    """The type of `Pipeline`, which says what to do in place of diffusers' class methods, such as `from_pretrained`."""

    if not TYPE_CHECKING:  # or type checkers would take any name for an attribute

        def __getattr__(cls, name: str) -> Any:
            raise _missing_attribute(f"type object {cls.__name__!r}", name)


class Pipeline(metaclass=_AdvisesOnAttributes):
    """A loaded bundle that generates images. Graphs are loaded when first needed and kept; threads may share it.

    A pipeline that `load` made can be pickled and copied: the other one loads the same bundle, by its path and digest.
    `close`, or the end of a `with` block, releases its graphs.

    Args:
        bundle: to generate from.
        components: its sessions; `Pipeline.load` places each component where it runs best.
        progress: whether calls show a progress bar, where a terminal or a notebook shows one.

    Attributes:
        runs_on: what runs each component (`backend`, `device`) and why (`reason`).
        progress: as given; may be set.
    """

    def __init__(self, bundle: Bundle, components: Components, *, progress: bool = True) -> None:
        self.bundle, self.components = bundle, components
        self.family = open_family(bundle, components)
        self.runs_on: Mapping[str, Placement] = MappingProxyType(components.placements)
        self.progress = progress
        self._load_arguments: dict[str, Any] | None = None

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
        progress: bool = True,
    ) -> Self:
        """Open a bundle on the best backend of this machine, or on the one that is named.

        Args:
            path: the bundle's folder; `sample`, or None, opens the sample bundle that ships with the package.
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
            progress: False shows no progress bar, unless a call does.

        Raises:
            BundleError: there is no bundle, or it is damaged, or not the pinned one.
            BackendError, EngineError: the named device is not available.
        """
        from latentrt.backends.placement import Preferences, place_components

        preferences = Preferences(
            threads=threads, precision=precision, performance_hint=performance_hint, low_memory=low_memory
        )
        bundle = Bundle.open(find_bundle("sample" if path is None else path), digest)
        placements = place_components(bundle, device, provider=provider, preferences=preferences)
        for component, placement in placements.items():
            log.info("%s runs on %s", component, placement)
        pipeline = cls(bundle, Components(placements, low_memory=low_memory), progress=progress)
        pipeline._load_arguments = {
            "device": device,
            "threads": threads,
            "provider": provider,
            "precision": precision,
            "performance_hint": performance_hint,
            "low_memory": low_memory,
        }
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool | None = None,
        preview: PreviewCallback | None = None,
        preview_interval: int = 1,
        **options: Unpack[CallOptions],
    ) -> Result:
        """Generate images. `options` are the keywords of `latentrt.request`, diffusers' where diffusers has one.

        Args:
            output_type: `pil`; `np` for float32 pixels in 0 … 1 [images, height, width, 3]; `latent`, unclassified.
            callback_on_step_end: called as (pipeline, index, timestep, {"latents": …}) after each step; a dict that it
                returns may hold other latents to go on with.
            progress: show a progress bar, if stderr is a terminal or this is a notebook; None: as the pipeline's
                `progress`.
            preview: called as (step, images) during sampling, with what the images look like so far (`Step.preview`):
                Pillow images, checked by the safety policy like the result.
            preview_interval: evaluations of the model from one preview to the next.

        Raises:
            RequestError: the request is impossible, or the pipeline is closed.
            SafetyError: the images could not be checked.
        """
        stopwatch = Stopwatch()
        check_output_type(output_type)
        for keyword, callback in (("callback_on_step_end", callback_on_step_end), ("preview", preview)):
            if callback is not None and not callable(callback):
                raise RequestError(f"`{keyword}`: got {quote(callback)}, expected a function")
        preview_interval = Whole(1)("preview_interval", preview_interval)
        request = self.resolve(Request.of(prompt=prompt, **options))
        if preview is not None:
            require_preview_decoder(self.bundle.manifest, "got `preview`")
        shown = self.progress if progress is None else progress
        with (
            self.components.call(),
            ProgressBar(len(request.schedule), enabled=shown) as bar,
            closing(self._steps(request, stopwatch)) as steps,  # or the traceback of a callback's error would keep it
        ):
            for each in steps:
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, each.index, each.timestep, {"latents": each.latents}) or {}
                    each.latents = changed.get("latents", each.latents)
                if preview is not None and (each.index + 1) % preview_interval == 0:
                    preview(each, each.preview())
                bar.advance(each)
            return self.finish(request, each, output_type)

    def __repr__(self) -> str:
        name, tasks = quote(self.bundle.name), ", ".join(self.bundle.manifest.tasks)
        titles = ", ".join(dict.fromkeys(placement.title for placement in self.runs_on.values()))
        return f"<Pipeline {name}: {'closed' if self.components.closed else f'{tasks}; {titles}'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs, once what other threads generate is done. Later calls are refused; closing again is not.

        Graphs that another pipeline of the same bundle uses stay loaded for it.
        """
        self.components.close()

    def __reduce__(self) -> tuple[Callable[..., Pipeline], tuple[type[Pipeline], str, dict[str, Any]]]:
        if self.components.closed:
            raise closed_error()
        if self._load_arguments is None:
            raise RequestError(
                "got a pipeline made of sessions, which cannot be pickled or copied; expected one of Pipeline.load"
            )
        arguments = {**self._load_arguments, "digest": self.bundle.digest, "progress": self.progress}
        return _load_again, (type(self), str(self.bundle.folder), arguments)

    if not TYPE_CHECKING:  # or type checkers would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            raise _missing_attribute(f"{type(self).__name__!r} object", name)

        def __setattr__(self, name: str, value: Any) -> None:
            if attribute_advice(name) is not None:  # diffusers' `pipeline.scheduler = …` would have no effect
                raise _missing_attribute(f"{type(self).__name__!r} object", name)
            super().__setattr__(name, value)

    def resolve(self, request: Request) -> ResolvedRequest:
        """Decide everything that a request leaves open, a random seed included.

        Raises:
            RequestError: this bundle cannot do it.
            SafetyError: the images are to be checked, and the bundle has no classifier.
        """
        if isinstance(request, ResolvedRequest):
            return request
        if not isinstance(request, Request):
            raise RequestError(f"got {quote(request)}, expected a request, such as Request.of(prompt='a red circle')")
        resolved = resolve(request, self.bundle.manifest, self.family)
        safety.require_classifier(self.bundle.manifest, resolved.policy)
        return resolved

    def count_steps(self, request: ResolvedRequest) -> int:
        """Return the number of steps that `steps` yields for a request that `resolve` returned."""
        return len(request.schedule) * len(self.family.stages)

    def steps(self, request: Request) -> Generator[Step, None, None]:
        """Generate step by step: the sampling loop as a generator. Progress, previews and streams consume it; leaving
        it early cancels.

        Args:
            request: a request, or one that `resolve` returned.

        Raises:
            RequestError, SafetyError: as for `resolve`, before any work.
        """
        return self._steps(request, Stopwatch())

    def _steps(self, request: Request, stopwatch: Stopwatch) -> Generator[Step, None, None]:
        resolved = self.resolve(request)
        family, components = self.family, self.components
        preview = partial(self._preview, resolved)
        with components.run():
            self.bundle.check(family.files(resolved))  # before any work, everything that the run reads
            if components.on_cpu:
                family.prefetch_first(resolved)
            for stage in family.stages:
                with stopwatch.measure("sampling"):
                    samples: list[Sample] = stage.begin(resolved)
                with stopwatch.measure("loading"):
                    denoiser = stage.open_denoiser()
                try:
                    with stopwatch.measure("loading"):
                        prepare(samples, denoiser)
                    while not samples[0].done:
                        with stopwatch.measure("sampling"):
                            step(samples, denoiser)
                        made = Step(samples, stopwatch, preview)
                        if made.index == 0 and components.on_cpu:
                            family.prefetch_last(resolved)
                        yield made
                        made.write_back()
                finally:
                    denoiser.close()
                    components.done_with(stage.name)

    def finish(self, request: ResolvedRequest, latents: Step | Latents, output_type: OutputType = "pil") -> Result:
        """Decode the last latents and apply the request's safety policy.

        Args:
            request: as `resolve` returned it.
            latents: the last step, or its latents. The result of a step has the timings of the whole request.
            output_type: as for the call.

        Raises:
            RequestError: the latents are not those of this request.
            SafetyError: the classifier failed; nothing is handed out.
        """
        check_output_type(output_type)
        if not isinstance(request, ResolvedRequest):
            raise RequestError(f"got {quote(request)}, expected a request that `Pipeline.resolve` returned")
        if request.policy == "off":
            log.warning("the safety check is switched off; the images' metadata says so")
        stopwatch = latents.stopwatch if isinstance(latents, Step) else Stopwatch()
        values = latents.latents if isinstance(latents, Step) else latents
        shape = (len(request.seeds), *self.family.latent_space.shape(request.height, request.width))
        if not isinstance(values, np.ndarray) or values.shape != shape:
            got = getattr(values, "shape", type(values).__name__)
            raise RequestError(f"got latents of {got}, expected those of the last step, of shape {shape}")
        placement = self.runs_on.get(self.family.denoiser)
        wrap = partial(
            make_result,
            self.bundle,
            self.family,
            request,
            output_type=output_type,
            backend=None if placement is None else placement.title,
            stopwatch=stopwatch,
        )
        if output_type == "latent":
            return wrap(values, None)
        with self.components.run(), stopwatch.measure("decoding"):
            return wrap(*self._decode(request, values))

    def _decode(self, request: ResolvedRequest, latents: Latents) -> tuple[Pixels, tuple[Verdict, ...] | None]:
        """Return the pixels of latents, with the safety policy applied, and the classifier's verdicts."""
        verdicts, classifier = None, self.family.classifier()
        pixels = self.family.finish(request, latents)
        if request.policy != "off":
            assert classifier is not None, "resolve requires one"
            with measured("safety_check"):
                verdicts = safety.judge(lambda: self.components.session(classifier), pixels)
                self.components.done_with(classifier)
        pixels = safety.apply_policy(request.policy, pixels, verdicts or ())
        return self.family.compose(request, pixels), verdicts

    def _preview(self, request: ResolvedRequest, latents: Latents) -> list[Image.Image]:
        """Return the images of latents by the preview decoder, with the safety policy applied (`Step.preview`)."""
        require_preview_decoder(self.bundle.manifest, "got a call of `Step.preview`")
        pixels, _ = self._decode(
            replace(request, acceleration=replace(request.acceleration, decoder="preview")), latents
        )
        return to_images(pixels)


def _load_again(cls: type[Pipeline], folder: str, arguments: Mapping[str, Any]) -> Pipeline:
    """Return a pipeline that was pickled."""
    return cls.load(folder, **arguments)


def _missing_attribute(owner: str, name: str) -> MissingAttributeError:
    advice = attribute_advice(name)
    return MissingAttributeError(f"{owner} has no attribute {name!r}{f'; {advice}' if advice else ''}")


def call_signature() -> inspect.Signature:
    """Return the signature of `Pipeline.__call__` with every option of a request in place of `**options`."""
    own = inspect.signature(Pipeline.__call__)
    options = {each.keyword: each.default for each in OPTIONS.values() if each.keyword != "prompt"} | {
        "generator": None
    }
    fixed = [
        each
        for name, each in own.parameters.items()
        if name not in options and each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    types = {name: each.__forward_arg__ for name, each in CallOptions.__annotations__.items()}
    further = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types.get(name, inspect.Parameter.empty)
        )
        for name, default in options.items()
    ]
    return own.replace(parameters=[*fixed, *further])


_GENERATOR_HELP = (
    "    generator: In place of `seed`: a torch.Generator (its seed), or a numpy Generator (a seed is drawn)."
)
Pipeline.__call__.__signature__ = call_signature()  # type: ignore[attr-defined]
Pipeline.__call__.__doc__ = f"{inspect.getdoc(Pipeline.__call__)}\n\nOptions:\n" + "\n".join(
    [*(f"    {each.keyword}: {each.help}" for each in OPTIONS.values()), _GENERATOR_HELP]
)
