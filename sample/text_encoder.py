"""Trains the text encoder.

It is trained before the denoiser, with a small reader on top that predicts the scene of a caption: the first thing
(left or above) and the second, their colours and sizes, the layout, the background. The reader attends to the states
like the denoiser, and is discarded. Afterwards the encoder is frozen, like CLIP's in Stable Diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from sample.captions import caption
from sample.models import TEXT_WIDTH
from sample.scenes import COLOURS, PLACES, SHAPES, SIZES, UNSAFE, Scene, forgetful, training_scene
from sample.training import Plan, Randomness, Workshop, train

__all__ = ["PLAN", "Reader", "train_text_encoder"]

OPEN, ABSENT = "open", "absent"
BATCH = 128
PLAN = Plan("text_encoder", steps=1000, learning_rate=1e-3, warmup=200, average=0.998)

THING_SLOTS = {
    "shape": (*SHAPES, UNSAFE, OPEN, ABSENT),
    "colour": (*COLOURS, OPEN),
    "size": (*SIZES, OPEN),
}
SLOTS: dict[str, tuple[str, ...]] = {
    **{f"{order} {name}": choices for order in ("first", "second") for name, choices in THING_SLOTS.items()},
    "background": (*COLOURS, OPEN),
    "layout": (*PLACES, "left of", "above", OPEN),
}


class Reader(nn.Module):
    """A classifier with a learned query per attribute of the scene, one cross-attention, and a linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SLOTS), TEXT_WIDTH))
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.answers = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(choices)) for choices in SLOTS.values())

    def forward(self, states: Tensor) -> list[Tensor]:
        """Return the logits [batch, choices] of each slot for states [batch, tokens, width]."""
        queries = self.queries.expand(len(states), -1, -1)
        read = self.norm(self.attention(queries, states, states, need_weights=False)[0])
        return [answer(read[:, slot]) for slot, answer in enumerate(self.answers)]


def slots_of(scene: Scene) -> list[int]:
    """Return the index of the right class of each slot."""
    slots: dict[str, str | None] = {"background": scene.background, "layout": scene.axis or scene.place}
    for order, index in (("first", 0), ("second", 1)):
        thing = scene.things[index] if index < len(scene.things) else None
        slots[f"{order} shape"] = (thing.shape or OPEN) if thing else ABSENT
        slots[f"{order} colour"] = thing.colour if thing else None
        slots[f"{order} size"] = thing.size if thing and thing.shape != UNSAFE else None
    return [choices.index(slots[name] or OPEN) for name, choices in SLOTS.items()]


def train_text_encoder(encoder: CLIPTextModel, tokenizer: Any, plan: Plan, workshop: Workshop) -> float:
    """Train the encoder in place; return the training time in seconds."""
    device = workshop.device
    model = nn.ModuleDict({"encoder": encoder, "reader": Reader()}).to(device).train()

    def loss(randomness: Randomness) -> Tensor:
        scenes = [forgetful(training_scene(randomness.numpy), randomness.numpy) for _ in range(BATCH)]
        texts = [caption(scene, randomness.numpy) for scene in scenes]
        # With causal attention, later tokens do not change a token's state, so a batch is padded to its longest caption
        # only. The embeddings of positions after the longest of all captions stay untrained; the denoiser is trained
        # with them.
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        answers = model["reader"](model["encoder"](ids.to(device)).last_hidden_state)
        right = torch.tensor([slots_of(scene) for scene in scenes], device=device)
        losses = [nn.functional.cross_entropy(answer, right[:, slot]) for slot, answer in enumerate(answers)]
        return torch.stack(losses).mean()

    seconds = train(plan, model, loss, workshop)
    encoder.eval().requires_grad_(False)
    return seconds
