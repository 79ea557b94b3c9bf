"""How is the denoiser asked, once for each row of the table?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentrt.conditioning import Conditioning
from latentrt.errors import BackendError
from latentrt.guidance import guide
from latentrt.request import Order
from latentrt.schedule import Latents
from latentrt.session import Session, run

__all__ = ["ask", "check_finite"]


def ask(
    denoiser: Session,
    sample: Latents,
    timestep: np.float32,
    conditionings: Sequence[Conditioning],
    order: Order,
) -> Latents:
    """The (guided) model output for every picture: one evaluation, or one for each number of tokens."""
    outputs = np.empty_like(sample)
    for told in conditionings:
        part = sample[told.pictures]
        if order.guided:
            part = np.concatenate([part, part])  # (2B, C, h, w): the negative half first, as in the embeddings
        feeds = {"timestep": np.full(len(part), timestep, np.float32), "encoder_hidden_states": told.embeddings}
        predicted: Latents = run(denoiser, sample=part, **feeds)["noise_pred"]
        check_finite(predicted, timestep)
        if order.guided:
            predicted = guide(predicted, order.guidance_scale, order.guidance_rescale)
        outputs[told.pictures] = predicted
    return outputs


def check_finite(values: Latents, timestep: np.float32) -> None:
    """Half overflows without a word, and what is not a number would be decoded to a black picture that looks clear."""
    if not np.isfinite(values).all():
        raise BackendError(
            f"timestep {timestep:g} gave values that are not finite numbers; lower the guidance scale, or export the "
            "bundle in float32"
        )
