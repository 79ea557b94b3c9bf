"""The interface between the pipeline and a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.denoiser import Denoiser, SplitDenoiser, WholeDenoiser

if TYPE_CHECKING:
    from latentrt.backends.models import Components
    from latentrt.bundle.bundle import Bundle
    from latentrt.bundle.manifest import LatentSpace, SchedulerRecord
    from latentrt.images.metadata import InputRecord
    from latentrt.request import Request, Sampling, Size, Start
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.loop import Sample
    from latentrt.sampling.schedule import Latents, Schedule

__all__ = ["Family", "Stage"]

Pixels = NDArray[np.uint8]  # [images, height, width, 3]


class Stage(ABC):
    """A denoiser with its scheduler and latent space: one run of the sampling loop.

    Args:
        name: of the denoiser's component.
    """

    def __init__(self, bundle: Bundle, components: Components, name: str) -> None:
        manifest = bundle.manifest
        self.bundle, self.components, self.name = bundle, components, name
        self.scheduler: SchedulerRecord = manifest.schedulers[name]
        self.latent_space: LatentSpace = manifest.latent_spaces[name]

    @abstractmethod
    def begin(self, request: ResolvedRequest) -> list[Sample]:
        """Return the samples of a request, one for each image, before their first row.

        Raises:
            RequestError: an input does not suit the others. BackendError: a component failed.
        """

    def open_denoiser(self) -> Denoiser:
        """Return the denoiser for one loop. A split denoiser's parts are loaded at first use."""
        record, placement = self.bundle.manifest.components[self.name], self.components.placements[self.name]
        sources = {spec.source: spec.name for spec in record.inputs}
        time = sources["c-noise"] if "c-noise" in sources else sources["timestep"]
        names = {"latents": sources["latents"], "timestep": time, "output": record.outputs[0].name}
        if placement.split:
            return SplitDenoiser(
                record.inputs,
                lambda part: self.components.session(self.name, part),
                time_inputs=[spec.name for spec in record.parts["time_embedding"].inputs if spec.name != time],
                reuses_features=placement.reuses_features,
                **names,
            )
        session = self.components.session(self.name)
        if placement.backend in ("tensorrt", "tensorrt_rtx"):
            from latentrt.sampling.device_loop import DeviceDenoiser

            return DeviceDenoiser(session, **names)
        return WholeDenoiser(session, **names)


class Family(ABC):
    """A kind of model: its stages, its tasks, and the way from the last latents to an image.

    Attributes:
        stages: run one after the other. Most families have one.
        embedding_width: width of a token's text embedding.
        pooled_width: width of a pooled text embedding; None for a denoiser that takes none.
        options: keywords of the request's options that this bundle takes and others do not (`Option.only`).
    """

    stages: tuple[Stage, ...]
    embedding_width: int
    pooled_width: int | None = None
    options: frozenset[str] = frozenset()

    def __init__(self, bundle: Bundle, components: Components) -> None:
        self.bundle, self.components = bundle, components

    @property
    def denoiser(self) -> str:
        """Component name of the last stage's denoiser."""
        return self.stages[-1].name

    @property
    def scheduler(self) -> SchedulerRecord:
        """The last stage's scheduler."""
        return self.stages[-1].scheduler

    @property
    def latent_space(self) -> LatentSpace:
        """The last stage's latent space."""
        return self.stages[-1].latent_space

    @abstractmethod
    def task(self, request: Request) -> str:
        """Return the task of a request, such as `text-to-image`, inferred from its inputs.

        Raises:
            RequestError: an input lacks another that it needs.
        """

    def advice(self, task: str) -> str:
        """Return the remedy for a bundle that does not support a task, as an imperative clause."""
        return "export a checkpoint that was trained for it"

    def needs_prompt(self, request: Request) -> bool:
        """Return whether a request without a prompt is rejected."""
        return True

    @abstractmethod
    def load_inputs(self, request: Request) -> Any:
        """Load the input images of a request; None where it has none.

        Raises:
            RequestError: an image cannot be read.
        """

    @abstractmethod
    def size(self, request: Request, inputs: Any) -> Size:
        """Return the size of a request's images: as requested, or as its input image implies."""

    @abstractmethod
    def prepare(self, request: Request, inputs: Any, height: int, width: int) -> Any:
        """Return the input images as `begin` and `compose` need them, at a checked size in pixels."""

    @abstractmethod
    def start(self, request: Request, shape: tuple[int, ...]) -> Start:
        """Return the request's start of sampling with defaults filled in, after checking its latents.

        Args:
            shape: [images, C, H, W] of the latents.

        Raises:
            RequestError: an option is not of this task, or the latents have another shape.
        """

    @abstractmethod
    def schedule(self, task: str, sampling: Sampling, start: Start) -> Schedule:
        """Return the table of coefficients of a request for one of the bundle's tasks.

        Raises:
            RequestError: the sampler does not suit the model, or an option is unsupported.
        """

    @abstractmethod
    def check(self, request: ResolvedRequest) -> None:
        """Reject combinations of options that this family or its backends do not support.

        Raises:
            RequestError: the message names the option.
        """

    def check_prompts(self, request: ResolvedRequest) -> None:
        """Reject prompts that are too long, which a run would reject when it encodes them.

        Raises:
            RequestError: the message names the option.
        """

    @abstractmethod
    def files(self, request: ResolvedRequest) -> list[str]:
        """Return the names of the bundle's files that a request reads."""

    def batch_sizes(self, request: ResolvedRequest) -> tuple[int, ...] | None:
        """Return the numbers of images like those of a request that engines run at once, ascending; None: any."""
        return None

    def prefetch_first(self, request: ResolvedRequest) -> None:
        """Start loading components that the loop needs and `begin` does not."""

    def prefetch_last(self, request: ResolvedRequest) -> None:
        """Start loading the components of `finish`, while the loop runs."""

    @abstractmethod
    def finish(self, request: ResolvedRequest, latents: Latents) -> Pixels:
        """Decode the last latents, float32 [images, C, H, W], to pixels, uint8 [images, height, width, 3]."""

    def input_records(self, request: ResolvedRequest, index: int) -> dict[str, InputRecord]:
        """Return the provenance of the input images of image `index`, by keyword."""
        return {}

    def compose(self, request: ResolvedRequest, pixels: Pixels) -> Pixels:
        """Insert checked pixels into the image that they are a region of (inpainting of a crop)."""
        return pixels

    @abstractmethod
    def classifier(self) -> str | None:
        """Return the component that checks the pixels; None where the bundle has none."""
