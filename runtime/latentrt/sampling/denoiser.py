"""How is the denoiser asked, once for each row of the table?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, ToldShapes, run
from latentrt.backends.split_denoiser import DEEP_FEATURES, InParts, ReusesFeatures
from latentrt.bundle.tensors import check_feeds
from latentrt.errors import BackendError
from latentrt.request import Order
from latentrt.sampling.guidance import guide
from latentrt.sampling.schedule import Latents
from latentrt.text.clip import Conditioning

__all__ = ["Asking", "check_finite"]


@dataclass
class _Told:
    """What the denoiser is told of some of the pictures, with guidance and without; and the deep features it gave last,
    the negative half first where it was guided then."""

    conditioning: Conditioning
    alone: NDArray[np.float32]
    deep_features: NDArray[np.float32] | None = None


class Asking:
    """Asks the denoiser for the (guided) model output of every picture, row after row.

    Args:
        denoiser: the whole one, or one in parts.
        timesteps: of all rows.
        conditionings: what it is told of the prompts; one evaluation each.

    Raises:
        BackendError: the order reuses deep features, and what runs the denoiser here cannot.
        EngineError: nothing here runs one of the shapes that the rows will have.
    """

    def __init__(
        self,
        denoiser: Session,
        timesteps: NDArray[np.float32],
        conditionings: Sequence[Conditioning],
        order: Order,
    ) -> None:
        self._denoiser = denoiser.begin(timesteps) if isinstance(denoiser, InParts) else denoiser
        self._rows, self._row, self._order = len(timesteps), 0, order
        self._told = [_Told(told, _positive_half(told.embeddings, order)) for told in conditionings]
        if order.approximation.deep_cache > 1 and not isinstance(self._denoiser, ReusesFeatures):
            raise BackendError(
                f"found deep_cache {order.approximation.deep_cache}, and what runs the denoiser here runs it whole; "
                "--device cpu and --device openvino run it in parts"
            )

    def expect(self, shape: tuple[int, ...]) -> None:
        """Tell the denoiser, before the first row, what it will be fed for latents of this shape.

        Raises:
            EngineError: nothing here runs that.
        """
        if not isinstance(self._denoiser, ToldShapes):
            return
        for guided in sorted({self._guides(row) for row in range(self._rows)}):
            for told in self._told:
                embeddings = told.conditioning.embeddings if guided else told.alone
                batch = len(embeddings)
                fed = {"sample": (batch, *shape[1:]), "timestep": (batch,), "encoder_hidden_states": embeddings.shape}
                self._denoiser.expect(fed)

    def __call__(self, timestep: np.float32, sample: Latents) -> Latents:
        """The next row's model output, float32 [pictures, channels, height, width], of that timestep and sample."""
        row, self._row = self._row, self._row + 1
        outputs = np.empty_like(sample)
        for told in self._told:
            pictures = told.conditioning.pictures
            outputs[pictures] = self._ask(told, row, timestep, sample[pictures])
        return outputs

    def _ask(self, told: _Told, row: int, timestep: np.float32, part: Latents) -> Latents:
        order = self._order
        guided = self._guides(row)
        if guided:
            part = np.concatenate([part, part])  # (2B, C, h, w): the negative half first, as in the embeddings
        feeds = {
            "sample": part,
            "timestep": np.full(len(part), timestep, np.float32),
            "encoder_hidden_states": told.conditioning.embeddings if guided else told.alone,
        }
        predicted: Latents = self._run(told, feeds, reuse=order.approximation.reuses(row))["noise_pred"]
        check_finite(predicted, timestep)
        return guide(predicted, order.guidance_scale, order.guidance_rescale) if guided else predicted

    def _guides(self, row: int) -> bool:
        return self._order.guided and self._order.approximation.guides(row, self._rows)

    def _run(self, told: _Told, feeds: Arrays, *, reuse: bool) -> Arrays:
        features, count = told.deep_features, len(feeds["sample"])
        # A row without guidance before one with it has nothing for its negative half.
        if reuse and features is not None and len(features) >= count and isinstance(self._denoiser, ReusesFeatures):
            check_feeds(self._denoiser.inputs, feeds)
            return self._denoiser.run_reusing(feeds, features[-count:])
        outputs = run(self._denoiser, **feeds)
        told.deep_features = outputs.get(DEEP_FEATURES)
        return outputs


def _positive_half(embeddings: NDArray[np.float32], order: Order) -> NDArray[np.float32]:
    """What the denoiser is told without guidance; read-only, as the whole is."""
    return embeddings[len(embeddings) // 2 :] if order.guided else embeddings


def check_finite(values: Latents, timestep: np.float32) -> None:
    """Half overflows without a word, and what is not a number would be decoded to a black picture that looks clear."""
    if not np.isfinite(values).all():
        raise BackendError(
            f"timestep {timestep:g} gave values that are not finite numbers; lower the guidance scale, or export the "
            "bundle in float32"
        )
