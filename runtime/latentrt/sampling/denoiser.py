"""Evaluates a denoiser for a batch of samples: builds and pads the batch, and hoists loop-invariant work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.bundle.tensors import TensorSpec, check_feeds
from latentrt.errors import BackendError

if TYPE_CHECKING:
    from latentrt.sampling.loop import Sample

__all__ = ["DEEP_FEATURES", "Conditioning", "Denoiser", "Evaluation", "SplitDenoiser", "WholeDenoiser"]

T = TypeVar("T")

DEEP_FEATURES, KEYS_AND_VALUES = "deep_features", "cross_attention_kv"

# Number of batches whose stacked inputs are kept; a request has one or two (guided and unguided rows) for each number
# of chunks of its prompts.
_MAX_BATCHES = 4
# Time embeddings that are kept: a few kilobytes each, per residual block (60 kB in Stable Diffusion XL).
_MAX_TIME_EMBEDDINGS = 1024
# Timesteps of an evaluation's schedule that are embedded at once, from the current one on.
_TIMESTEPS_AHEAD = 64


class Conditioning:
    """Inputs of the denoiser beside latents and timestep, for one evaluation of one sample; no batch axis.

    Args:
        inputs: by the denoiser's input names.
        concat: float32 [C', H, W], channels that follow the latents' own (inpainting, InstructPix2Pix, upscalers).

    All arrays are made read-only, so that a backend may keep them on its device.
    """

    __slots__ = ("concat", "inputs")

    def __init__(self, inputs: Mapping[str, NDArray[Any]], concat: NDArray[np.float32] | None = None) -> None:
        self.inputs, self.concat = dict(inputs), concat
        for array in (*self.inputs.values(), *([] if concat is None else [concat])):
            array.setflags(write=False)


class Evaluation:
    """One of a sample's evaluations, and the arrays that a denoiser keeps for it from row to row.

    Args:
        latents: shape of the sample's latents, (C, H, W).
        timesteps: float32 [N], of all rows of the sample's schedule.

    Attributes:
        signature: equal for evaluations that fit in one batch.
        kept: arrays without batch axis: deep features, keys and values of cross-attention.
    """

    __slots__ = ("_digests", "conditioning", "kept", "signature", "timesteps")

    def __init__(self, conditioning: Conditioning, latents: tuple[int, ...], timesteps: NDArray[np.float32]) -> None:
        self.conditioning, self.timesteps = conditioning, timesteps
        channels = latents[0] + (0 if conditioning.concat is None else conditioning.concat.shape[0])
        shapes = tuple((name, array.shape) for name, array in conditioning.inputs.items())
        self.signature = ((channels, *latents[1:]), shapes)
        self.kept: dict[str, Arrays] = {}
        self._digests: dict[tuple[str, ...], bytes] = {}

    def digest(self, names: tuple[str, ...]) -> bytes:
        """Return a key that is equal for evaluations of one denoiser whose inputs of these names are equal."""
        if names not in self._digests:
            arrays = (self.conditioning.inputs[name] for name in names)
            self._digests[names] = b"".join(array.tobytes() for array in arrays)
        return self._digests[names]


class Denoiser(ABC):
    """A denoiser graph inside one loop. It belongs to one thread; the sessions behind it are shared.

    Args:
        inputs: of the whole graph.
        latents, timestep, output: names of the latents' and the timestep's input, and of the output.

    Attributes:
        reuses_features: whether `evaluate` can take deep features of an earlier row (DeepCache).
    """

    reuses_features = False

    def __init__(self, inputs: tuple[TensorSpec, ...], *, latents: str, timestep: str, output: str) -> None:
        self.inputs, self.latents, self.timestep, self.output = inputs, latents, timestep, output
        self._stacks: dict[str, _RecentBatches[NDArray[Any]]] = {}
        self._sizes: dict[Any, tuple[int, ...] | None] = {}
        self._prepared: dict[Any, set[int]] = {}

    def evaluate(
        self,
        evaluations: Sequence[Evaluation],
        latents: Sequence[NDArray[np.float32]],
        timesteps: Sequence[np.float32],
        *,
        reuse: bool = False,
    ) -> NDArray[np.float32]:
        """Return the denoiser's outputs, float32 [B, C, H, W], for B evaluations of one signature.

        Args:
            evaluations: of one or several samples.
            latents: the scaled latents of each, float32 [C, H, W].
            timesteps: of each.
            reuse: compute the shallow layers only, on deep features of an earlier row.

        Raises:
            BackendError: an output is not finite, or the backend failed.
            EngineError: no engine covers these shapes.
        """
        outputs, count = [], len(evaluations)
        for first, end, size in _split_batch(count, self._sizes_to_use(evaluations[0].signature, count)):
            batch, feeds = self._gather(evaluations[first:end], latents[first:end], timesteps[first:end], size)
            arrays = self._evaluate(feeds, batch, reuse=reuse)
            if DEEP_FEATURES in arrays:
                for evaluation, features in zip(batch, arrays[DEEP_FEATURES], strict=True):
                    evaluation.kept[DEEP_FEATURES] = {DEEP_FEATURES: features}
            outputs.append(arrays[self.output][: end - first])
        result: NDArray[np.float32] = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
        if not np.isfinite(result).all():
            nonfinite = next(index for index, output in enumerate(result) if not np.isfinite(output).all())
            raise not_finite(timesteps[nonfinite])
        return result

    def _all_sizes(self, signature: tuple[Any, ...], count: int) -> tuple[int, ...] | None:
        """Return the batch sizes that the backend has for `count` evaluations of a signature, ascending; None: any."""
        if signature not in self._sizes:
            self._sizes[signature] = self._batch_sizes(self.shapes(signature, count))
        return self._sizes[signature]

    def _sizes_to_use(self, signature: tuple[Any, ...], count: int) -> list[int] | None:
        """Return the batch sizes to pad to, ascending; None: any.

        They are the powers of two, the largest size, and the sizes that were prepared. A backend keeps buffers for a
        few sizes at a time, so a batch that samples join and leave must not have another size each time.
        """
        sizes = self._all_sizes(signature, count)
        if sizes is None:
            return None
        prepared = self._prepared.get(signature, ())
        return [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1] or size in prepared]

    def prepare(self, evaluations: Sequence[Evaluation]) -> None:
        """Load or compile the model for these evaluations in one batch; batches of this size are not padded further.

        Raises:
            EngineError: no engine covers their shapes.
        """
        signature, count = evaluations[0].signature, len(evaluations)
        for _, _, size in _split_batch(count, self._all_sizes(signature, count)):
            self._prepare(self.shapes(signature, size))
            self._prepared.setdefault(signature, set()).add(size)

    def step_on_device(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Advance the samples that a device can hold by one row; return the others."""
        return samples

    def close(self) -> None:
        """Release the resources of this loop; latents on a device are fetched to the host."""

    def shapes(self, signature: tuple[Any, ...], batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the denoiser's inputs for `batch` evaluations of a signature."""
        latents, inputs = signature
        shapes: dict[str, tuple[int, ...]] = {self.latents: (batch, *latents), self.timestep: (batch,)}
        return shapes | {name: (batch, *shape) for name, shape in inputs}

    def _gather(
        self,
        evaluations: Sequence[Evaluation],
        latents: Sequence[NDArray[np.float32]],
        timesteps: Sequence[np.float32],
        size: int,
    ) -> tuple[Sequence[Evaluation], Arrays]:
        """Return a batch of `size` evaluations and its feeds; the last evaluation is repeated to fill it."""
        more = size - len(evaluations)
        if more:
            evaluations = [*evaluations, *[evaluations[-1]] * more]
            latents, timesteps = [*latents, *[latents[-1]] * more], [*timesteps, *[timesteps[-1]] * more]
        conditionings = [evaluation.conditioning for evaluation in evaluations]
        if conditionings[0].concat is not None:
            latents = [np.concatenate([x, each.concat]) for x, each in zip(latents, conditionings, strict=True)]
        feeds: Arrays = {self.latents: np.stack(latents), self.timestep: np.array(timesteps, np.float32)}
        for name in conditionings[0].inputs:
            feeds[name] = self._stack(name, [each.inputs[name] for each in conditionings])
        check_feeds(self.inputs, feeds)
        return evaluations, feeds

    def _stack(self, name: str, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Stack read-only arrays; the same objects give the same array object, which a device need not copy again."""
        if name not in self._stacks:
            self._stacks[name] = _RecentBatches()
        return self._stacks[name].get(arrays, _stack_read_only)

    @abstractmethod
    def _batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the batch sizes that the backend has for these shapes; None: any."""

    @abstractmethod
    def _prepare(self, shapes: Shapes) -> None:
        """Load or compile the model for inputs of these shapes."""

    @abstractmethod
    def _evaluate(self, feeds: Arrays, evaluations: Sequence[Evaluation], *, reuse: bool) -> Arrays:
        """Run the graph on a checked batch.

        Args:
            feeds: of the whole denoiser, padded.
            evaluations: one for each row of the batch.
            reuse: take deep features from the evaluations.
        """


class _RecentBatches(Generic[T]):
    """Values of the last batches, by the identity of the objects in them."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, ...], tuple[Sequence[Any], T]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, members: Sequence[Any], make: Callable[[Sequence[Any]], T]) -> T:
        """Return the value of a batch, made at its first use."""
        key = tuple(map(id, members))
        if key not in self._values:
            made = make(members)
            while len(self._values) >= _MAX_BATCHES:
                self._values.pop(next(iter(self._values)))
            self._values[key] = (members, made)  # the members are referenced, so that their ids are not reused
        found = self._values[key] = self._values.pop(key)  # moved to the end: the least recently used goes first
        return found[1]


def _stack_read_only(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    stacked = np.stack(arrays)
    stacked.setflags(write=False)
    return stacked


class WholeDenoiser(Denoiser):
    """A denoiser that is one graph."""

    def __init__(self, session: Session, *, latents: str, timestep: str, output: str) -> None:
        super().__init__(session.inputs, latents=latents, timestep=timestep, output=output)
        self.session = session

    def _batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return self.session.batch_sizes(shapes)

    def _prepare(self, shapes: Shapes) -> None:
        self.session.prepare(shapes)

    def _evaluate(self, feeds: Arrays, evaluations: Sequence[Evaluation], *, reuse: bool) -> Arrays:
        return self.session.run(feeds)


class SplitDenoiser(Denoiser):
    """A denoiser in parts (`latentrt.bundle.manifest.Part`), of which only `body` runs at each row.

    `time_embedding` runs once for many timesteps of the current samples, `cross_attention_kv` once for each
    conditioning; `shallow_body` replaces `body` where deep features are reused.

    Args:
        open_part: loads a part by name.
        time_inputs: inputs of `time_embedding` beside the timestep, constant for each evaluation: a guidance weight, or
            vectors such as a pooled text and micro-conditioning.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        open_part: Callable[[str], Session],
        *,
        latents: str,
        timestep: str,
        output: str,
        time_inputs: Sequence[str] = (),
        reuses_features: bool = False,
    ) -> None:
        super().__init__(inputs, latents=latents, timestep=timestep, output=output)
        self._open_part, self.reuses_features = open_part, reuses_features
        self._time_inputs = tuple(time_inputs)
        self._places: dict[tuple[float, bytes], int] = {}
        self._rows: Arrays = {}
        self._batches_kv: _RecentBatches[Arrays] = _RecentBatches()

    def _batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return None  # parts run on CPUs, which take any batch size

    def _prepare(self, shapes: Shapes) -> None:
        """Do nothing: parts are prefetched, or loaded by the first step."""

    def _evaluate(self, feeds: Arrays, evaluations: Sequence[Evaluation], *, reuse: bool) -> Arrays:
        available = {**feeds, **self._embed_timesteps(feeds, evaluations), **self._keys_and_values(evaluations)}
        if reuse:
            features = [evaluation.kept[DEEP_FEATURES][DEEP_FEATURES] for evaluation in evaluations]
            available[DEEP_FEATURES] = np.stack(features)
        part = self._open_part("shallow_body" if reuse else "body")
        return part.run({spec.name: available[spec.name] for spec in part.inputs})

    def _embed_timesteps(self, feeds: Arrays, evaluations: Sequence[Evaluation]) -> Arrays:
        """Return the time embedding's projections of each evaluation's timestep and its other inputs."""
        timesteps = feeds[self.timestep].tolist()
        keys = [(t, each.digest(self._time_inputs)) for t, each in zip(timesteps, evaluations, strict=True)]
        if not self._places.keys() >= set(keys):
            self._extend_time_embeddings(timesteps, evaluations)
        places = [self._places[key] for key in keys]
        return {name: rows[places] for name, rows in self._rows.items()}

    def _extend_time_embeddings(self, timesteps: Sequence[float], evaluations: Sequence[Evaluation]) -> None:
        """Embed the timesteps of evaluations, and the next ones of their schedules.

        Those from before are kept while there are few, as other samples of the loop may need them.
        """
        ahead = max(1, min(_TIMESTEPS_AHEAD, _MAX_TIME_EMBEDDINGS // len(evaluations)))
        wanted: dict[tuple[float, bytes], Evaluation] = {}
        for timestep, evaluation in zip(timesteps, evaluations, strict=True):
            digest, schedule = evaluation.digest(self._time_inputs), evaluation.timesteps.tolist()
            first = schedule.index(timestep) if timestep in schedule else 0
            for each in (timestep, *schedule[first : first + ahead]):
                wanted.setdefault((each, digest), evaluation)
        if len(self._places.keys() | wanted.keys()) > _MAX_TIME_EMBEDDINGS:
            self._places, self._rows = {}, {}
        new = {key: evaluation for key, evaluation in wanted.items() if key not in self._places}
        inputs: Arrays = {self.timestep: np.array([timestep for timestep, _ in new], np.float32)}
        for name in self._time_inputs:
            inputs[name] = np.stack([each.conditioning.inputs[name] for each in new.values()])
        rows = self._open_part("time_embedding").run(inputs)
        if self._rows:
            rows = {name: np.concatenate([self._rows[name], array]) for name, array in rows.items()}
        known = len(self._places)
        self._rows, self._places = rows, self._places | {key: known + place for place, key in enumerate(new)}

    def _keys_and_values(self, evaluations: Sequence[Evaluation]) -> Arrays:
        """Return the keys and values of cross-attention of a batch, computed once for each evaluation's conditioning.

        The same evaluations give the same array objects.
        """
        return self._batches_kv.get(evaluations, self._stack_keys_and_values)

    def _stack_keys_and_values(self, evaluations: Sequence[Evaluation]) -> Arrays:
        missing = [evaluation for evaluation in evaluations if KEYS_AND_VALUES not in evaluation.kept]
        if missing:
            self._compute_keys_and_values(missing)
        kept = [evaluation.kept[KEYS_AND_VALUES] for evaluation in evaluations]
        return {name: np.stack([each[name] for each in kept]) for name in kept[0]}

    def _compute_keys_and_values(self, evaluations: Sequence[Evaluation]) -> None:
        part = self._open_part(KEYS_AND_VALUES)
        conditionings = [evaluation.conditioning for evaluation in evaluations]
        made = part.run(
            {
                spec.name: self._stack(spec.name, [each.inputs[spec.name] for each in conditionings])
                for spec in part.inputs
            }
        )
        for index, evaluation in enumerate(evaluations):
            evaluation.kept[KEYS_AND_VALUES] = {name: array[index] for name, array in made.items()}


def _split_batch(count: int, sizes: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    """Yield batches of these sizes (None: any): index of the first evaluation, end (exclusive), size to pad to."""
    first = 0
    while first < count:
        left = count - first
        size = left if not sizes else next((size for size in sizes if size >= left), sizes[-1])
        end = first + min(size, left)
        yield first, end, size
        first = end


def not_finite(timestep: np.float32) -> BackendError:
    """Return the error for a row whose values are not finite, as float16 overflows silently."""
    return BackendError(
        f"timestep {timestep:g} gave values that are not finite numbers; lower `guidance_scale`, or export the bundle "
        "in float32"
    )
