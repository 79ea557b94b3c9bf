"""How do a predictor and a corrector fit in one row?

A step is predicted from the last latent; with the model's output there it is corrected, and the next is predicted from
what was corrected. Predictor and corrector keep the same part of the latent and add the same noise, so the correction
is a sum over what is remembered, and the next prediction carries it along:

    x_k'    = x_k + Σ_j (C_j − P_{j−1}) · h_{k−j}           corrected
    x_{k+1} = A · x_k' + Σ_j P_j · h_{k−j} + …              predicted
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["corrected_weights"]

Float64s = NDArray[np.float64]


def corrected_weights(
    keep: Float64s, predictor: Float64s, corrector: Float64s, corrects: NDArray[np.bool_]
) -> Float64s:
    """The column b of both.

    Args:
        keep: A of each row's prediction, [N].
        predictor: P of each row: the weights of what is remembered, newest first, [N, M].
        corrector: C of each row, of the step that led to it, [N, M + 1].
        corrects: whether a row corrects, [N].

    Returns:
        [N, M + 1].
    """
    before = np.vstack([np.zeros(predictor.shape[1]), predictor[:-1]])  # what predicted this row's latent
    correction = corrector.copy()
    correction[:, 1:] -= before
    correction[~corrects] = 0
    weights = keep[:, np.newaxis] * correction
    weights[:, :-1] += predictor
    return weights
