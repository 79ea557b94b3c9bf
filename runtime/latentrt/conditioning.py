"""Text → ids → embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.request import Order
from latentrt.session import Session, run
from latentrt.tokenizer import Tokenizer

__all__ = ["condition"]

Floats = NDArray[np.float32]


def condition(order: Order, tokenizer: Tokenizer, encoder: Session) -> Floats:
    """What the denoiser is told of the prompts.

    A prompt of more tokens than the encoder takes is encoded in chunks (`Tokenizer.chunks`), which are joined along the
    tokens; the shorter prompts of the batch, the negative ones among them, are filled up with empty chunks. `clip_skip`
    counts for the prompts alone, as in diffusers.

    Returns:
        float32 [pictures, tokens, width], or [2 · pictures, …] with the negative prompts first where there is guidance.
    """
    length = tokenizer.frame.length
    chunks = _chunks_needed(order, tokenizer)
    if order.prompt_embeds is not None:
        positive = order.prompt_embeds
    else:
        assert order.prompts is not None
        positive = _encode(order.prompts, chunks, order.clip_skip, tokenizer, encoder)
    positive = positive.repeat(order.images_per_prompt, axis=0)
    if not order.guided:
        return positive
    if order.negative_prompt_embeds is not None:
        negative = order.negative_prompt_embeds
    else:
        assert order.negative_prompts is not None
        if positive.shape[1] != chunks * length:
            raise RequestError(
                f"prompt_embeds: found {positive.shape[1]} tokens, which no negative prompt has; expected a multiple "
                f"of {length}, or negative_prompt_embeds beside them"
            )
        negative = _encode(order.negative_prompts, chunks, 0, tokenizer, encoder)
    negative = negative.repeat(order.images_per_prompt, axis=0)
    if negative.shape != positive.shape:
        raise RequestError(
            f"found embeddings of shape {positive.shape} and negative ones of {negative.shape}, expected one shape"
        )
    return np.concatenate([negative, positive])


def _chunks_needed(order: Order, tokenizer: Tokenizer) -> int:
    negatives = order.negative_prompts if order.guided else None
    texts = (*(order.prompts or ()), *(negatives or ()))
    embeddings = (order.prompt_embeds, order.negative_prompt_embeds)
    needed = [len(tokenizer.chunks(text)) for text in texts]
    needed += [math.ceil(array.shape[1] / tokenizer.frame.length) for array in embeddings if array is not None]
    return max(needed)


def _encode(texts: Sequence[str], chunks: int, clip_skip: int, tokenizer: Tokenizer, encoder: Session) -> Floats:
    """Encode each different text once: float32 [texts, chunks · length, width]."""
    different = list(dict.fromkeys(texts))
    ids = np.concatenate([tokenizer.chunks(text, at_least=chunks) for text in different])  # (D · chunks, length)
    outputs = run(encoder, input_ids=ids, clip_skip=np.full(len(ids), clip_skip, np.int64))
    states: Floats = outputs["hidden_states"]
    embeddings = states.reshape(len(different), chunks * tokenizer.frame.length, states.shape[-1])
    return embeddings[[different.index(text) for text in texts]]
