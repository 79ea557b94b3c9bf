"""Text → ids → embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.errors import RequestError
from latentrt.request import Order
from latentrt.text.tokenizer import Tokenizer

__all__ = ["Conditioning", "condition"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of some of the pictures, which all have prompts of as many tokens.

    Attributes:
        pictures: their indices in the batch.
        embeddings: float32 [pictures, tokens, width], or [2 · pictures, …] with the negative prompts first where there
            is guidance.
    """

    pictures: NDArray[np.int64]
    embeddings: Floats


def condition(order: Order, tokenizer: Tokenizer, encoder: Session) -> tuple[Conditioning, ...]:
    """What the denoiser is told of the prompts.

    A prompt of more tokens than the encoder takes is encoded in chunks (`Tokenizer.chunks`), which are joined along the
    tokens; of a prompt and its negative one, the shorter is filled up with empty chunks. Prompts of different numbers
    of chunks are kept apart, as filling up would change a picture with the company it is in. `clip_skip` counts for the
    prompts alone, as in diffusers.

    Returns:
        One for each number of chunks among the prompts; together they hold every picture once.
    """
    positive = _Side(order.prompt_embeds, order.prompts, order.clip_skip)
    negative = _Side(order.negative_prompt_embeds, order.negative_prompts) if order.guided else None
    by_chunks: dict[int, list[int]] = {}
    for prompt in range(len(order.seeds) // order.images_per_prompt):
        needed = max(side.chunks(prompt, tokenizer) for side in (positive, negative) if side is not None)
        by_chunks.setdefault(needed, []).append(prompt)
    told = []
    for chunks, prompts in by_chunks.items():
        embeddings = positive.embeddings(prompts, chunks, tokenizer, encoder).repeat(order.images_per_prompt, axis=0)
        if negative is not None:
            _check_length(embeddings, chunks * tokenizer.frame.length, negative)
            other = negative.embeddings(prompts, chunks, tokenizer, encoder).repeat(order.images_per_prompt, axis=0)
            embeddings = _stacked(other, embeddings)
        embeddings.setflags(write=False)  # so that a backend may keep them on its device from step to step
        images = np.arange(order.images_per_prompt)
        told.append(Conditioning(np.concatenate([prompt * len(images) + images for prompt in prompts]), embeddings))
    return tuple(told)


@dataclass(frozen=True)
class _Side:
    """The prompts of a batch, or its negative prompts, given as embeddings or as texts."""

    embeds: Floats | None
    texts: Sequence[str] | None
    clip_skip: int = 0

    def chunks(self, prompt: int, tokenizer: Tokenizer) -> int:
        """How many chunks a prompt fills."""
        if self.embeds is not None:
            tokens: int = self.embeds.shape[1]
            return math.ceil(tokens / tokenizer.frame.length)
        return len(tokenizer.chunks(self._text(prompt)))

    def embeddings(self, prompts: list[int], chunks: int, tokenizer: Tokenizer, encoder: Session) -> Floats:
        """Of some of the prompts, each different text encoded once: float32 [prompts, tokens, width]."""
        if self.embeds is not None:
            return self.embeds[prompts]
        texts = [self._text(prompt) for prompt in prompts]
        different = list(dict.fromkeys(texts))
        ids = np.concatenate([tokenizer.chunks(text, at_least=chunks) for text in different])  # (D · chunks, length)
        outputs = run(encoder, input_ids=ids, clip_skip=np.full(len(ids), self.clip_skip, np.int64))
        states: Floats = outputs["hidden_states"]
        encoded = states.reshape(len(different), chunks * tokenizer.frame.length, states.shape[-1])
        return encoded[[different.index(text) for text in texts]]

    def _text(self, prompt: int) -> str:
        assert self.texts is not None, "an order has embeddings or texts"
        return self.texts[prompt]


def _check_length(positive: Floats, tokens: int, negative: _Side) -> None:
    if negative.embeds is None and positive.shape[1] != tokens:
        raise RequestError(
            f"prompt_embeds: found {positive.shape[1]} tokens, and the negative prompt has {tokens}; expected as many, "
            "or negative_prompt_embeds beside them"
        )


def _stacked(negative: Floats, positive: Floats) -> Floats:
    if negative.shape != positive.shape:
        raise RequestError(
            f"found embeddings of shape {positive.shape} and negative ones of {negative.shape}, expected one shape"
        )
    return np.concatenate([negative, positive])
