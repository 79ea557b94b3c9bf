"""How is one part trained?

AdamW with a warm-up and a cosine, an average of the weights, a state on disk from time to time. What step k sees
follows from the seed and k alone, so a run that was stopped and resumed makes the same weights as one that was not.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from latentrt.atomic_file import write_atomically

LOG_EVERY = 50

__all__ = ["Plan", "Randomness", "train"]


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Args:
        name: of the part; its state is `<name>.pt`.
        steps: updates in all.
        learning_rate: at its highest.
        warmup: updates until then; after it a cosine falls to 0.
        average: share of the running average of the weights that each update keeps; 0 keeps none.
        seed: what the run draws comes from it and from the number of the step.
        save_every: updates between two states on disk.
    """

    name: str
    steps: int
    learning_rate: float
    warmup: int = 200
    average: float = 0.0
    seed: int = 0
    save_every: int = 500

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@dataclass(frozen=True)
class Randomness:
    """What one step draws from: numpy's generator for pictures and words, torch's (on the CPU) for noise."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Randomness:
        numbers = np.random.default_rng([seed, step])
        return cls(numbers, torch.Generator().manual_seed(int(numbers.integers(2**63))))


def train(plan: Plan, model: nn.Module, loss: Callable[[Randomness], Tensor], folder: Path, console: Console) -> float:
    """Train a model in place, from where `folder` says it was left; return the seconds it took in all.

    Args:
        plan: how long and how fast; a state that another plan left is refused.
        model: its weights become the average where the plan asks for one.
        loss: one step's loss, of what the randomness draws.
        folder: of the states.
        console: for the bar.
    """
    path = folder / f"{plan.name}.pt"
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()} if plan.average else {}
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(plan):
            raise SystemExit(
                f"{path} was left by {state['plan']}, expected {asdict(plan)}; remove it or train elsewhere"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, seconds = state["average"], state["step"], state["seconds"]
    for step, bar in _steps(plan, first, console):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(Randomness.of(plan.seed, step))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average:
            _blend(average, model, min(plan.average, (1 + step) / (10 + step)))
        seconds += time.perf_counter() - began
        bar(float(value.detach()))
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            state = {
                "plan": asdict(plan),
                "step": step + 1,
                "seconds": seconds,
                "model": model.state_dict(),
                "average": average,
                "optimizer": optimizer.state_dict(),
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(path, buffer.getvalue())
    if average:
        model.load_state_dict(average)
    return seconds


@torch.no_grad()
def _blend(average: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    state = model.state_dict()
    floats = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [state[name] for name in floats], 1 - keep)
    for name in state.keys() - set(floats):
        average[name].copy_(state[name])


def _steps(plan: Plan, first: int, console: Console) -> Iterator[tuple[int, Callable[[float], None]]]:
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if first >= plan.steps:
        return
    smooth = math.nan
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(plan.name, total=plan.steps, completed=first, loss=math.nan)

        def bar(loss: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            progress.update(task, advance=1, loss=smooth)

        for step in range(first, plan.steps):
            yield step, bar
            if not console.is_terminal and (step + 1) % LOG_EVERY == 0:  # a bar is no use in a log
                console.log(f"{plan.name}: {step + 1} of {plan.steps}, loss {smooth:.4f}")
    console.log(f"{plan.name}: {plan.steps} steps, loss {smooth:.4f}")
