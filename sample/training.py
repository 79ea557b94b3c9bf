"""How is one part trained?

AdamW with a warm-up and a cosine, an average of the weights, a state on disk from time to time. What step k sees
follows from the seed and k alone, so a run that was stopped and resumed makes the same weights as one that was not: on
one machine, with one number of threads, and on a CPU (some of a GPU's kernels add in no fixed order).
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from latentrt.bundle.atomic_file import write_atomically

LOG_EVERY = 50

__all__ = ["Plan", "Randomness", "StateError", "Workshop", "check_state", "digest", "save_atomically", "train"]


class StateError(Exception):
    """A state on disk that this run cannot go on from."""


@dataclass(frozen=True)
class Workshop:
    """Where and how parts are trained.

    Args:
        folder: of the states.
        console: for the bars.
        device: torch's name of it.
    """

    folder: Path
    console: Console
    device: str = "cpu"


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
        compiled: whether the step is compiled.
    """

    name: str
    steps: int
    learning_rate: float
    warmup: int = 200
    average: float = 0.0
    seed: int = 0
    save_every: int = 500
    compiled: bool = False

    def times(self, length: float) -> Plan:
        """The plan with `length` times as many steps, at least two."""
        steps = max(2, round(self.steps * length))
        return replace(self, steps=steps, warmup=min(self.warmup, steps // 4))

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


def train(
    plan: Plan, model: nn.Module, loss: Callable[[Randomness], Tensor], workshop: Workshop, *, learns_from: str = ""
) -> float:
    """Train a model in place, from where the workshop's folder says it was left; return the seconds it took in all.

    Args:
        plan: how long and how fast.
        model: its weights become the average where the plan asks for one.
        loss: one step's loss, of what the randomness draws.
        workshop: where and how.
        learns_from: the digest of the frozen weights that the loss depends on.

    Raises:
        StateError: there is a state, of another plan or workshop, or of a run that learned from other weights.
        RuntimeError: a gradient is not finite; the last state stays as it is.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()} if plan.average else {}
    first, seconds = 0, 0.0
    state = check_state(plan, workshop, learns_from=learns_from)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, seconds = state["average"], state["step"], state["seconds"]
    with closing(_steps(plan, first, workshop.console)) as steps:
        for step, bar in steps:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            value = loss(Randomness.of(plan.seed, step))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            if average:
                _blend(average, model, min(plan.average, (1 + step) / (10 + step)))
            seconds += time.perf_counter() - began
            bar(float(value.detach()))
            if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
                progress = {"step": step + 1, "seconds": seconds, "made_by": _made_by(plan, workshop, learns_from)}
                weights = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_atomically(progress | weights, _place(plan, workshop))
    if average:
        model.load_state_dict(average)
    return seconds


def check_state(plan: Plan, workshop: Workshop, *, learns_from: str | None = None) -> dict[str, Any]:
    """The state that a part was left in; empty where there is none.

    Args:
        learns_from: None where that is not known yet.

    Raises:
        StateError: the state cannot be read, or going on from it would make other weights than beginning anew.
    """
    path = _place(plan, workshop)
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=workshop.device)
        found = dict(state["made_by"])
    # Whatever a damaged file makes torch raise: it cannot be read.
    except Exception as error:
        raise StateError(f"{path} is no state that can be read ({type(error).__name__}); remove it") from None
    expected = _made_by(plan, workshop, learns_from or found.get("learns_from", ""))
    differences = [
        f"{key} {found.get(key)!r}, expected {value!r}" for key, value in expected.items() if found.get(key) != value
    ]
    if differences:
        raise StateError(f"{path} was left by another run: {'; '.join(differences)}; remove it or train elsewhere")
    return state


def digest(*modules: nn.Module) -> str:
    """A short digest of the weights of modules, which tells those that a part learned from from others."""
    values = (value.detach().cpu().numpy() for module in modules for value in module.state_dict().values())
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()[:16]


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save`, such that the file is there as a whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def _place(plan: Plan, workshop: Workshop) -> Path:
    return workshop.folder / f"{plan.name}.pt"


def _made_by(plan: Plan, workshop: Workshop, learns_from: str) -> dict[str, Any]:
    """What the weights depend on, as far as a state knows it; the recipe's own code it does not know."""
    return {**asdict(plan), "device": workshop.device, "learns_from": learns_from}


@torch.no_grad()
def _blend(average: dict[str, Tensor], model: nn.Module, keep: float) -> None:
    state = model.state_dict()
    floats = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [state[name] for name in floats], 1 - keep)
    for name in state.keys() - set(floats):
        average[name].copy_(state[name])


def _steps(plan: Plan, first: int, console: Console) -> Generator[tuple[int, Callable[[float], None]], None, None]:
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
