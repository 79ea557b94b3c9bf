"""The training loop of a component.

AdamW with a warm-up and a cosine, an average of the weights, a state on disk at intervals. The randomness of step k
depends on the seed and k alone, so an interrupted and resumed run makes the same weights as an uninterrupted one: on
the same machine, with the same number of threads, and on a CPU (some of a GPU's kernels add in no fixed order).
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
    """A state on disk cannot be resumed by this run."""


@dataclass(frozen=True)
class Workshop:
    """The environment of a training.

    Args:
        folder: the folder of the states.
        console: the console for progress bars.
        device: torch's name of the device.
    """

    folder: Path
    console: Console
    device: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """The hyperparameters of one training.

    Args:
        name: the component's name; its state is `<name>.pt`.
        steps: the number of updates.
        learning_rate: the peak learning rate.
        warmup: the number of updates until the peak; after it, a cosine decays to 0.
        average: the decay of the running average of the weights; 0 for none.
        seed: the seed of the randomness, together with the number of the step.
        save_every: the number of updates between two states on disk.
        compiled: whether to compile the step.
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
        """Return the plan with `length` times as many steps, at least two."""
        steps = max(2, round(self.steps * length))
        return replace(self, steps=steps, warmup=min(self.warmup, steps // 4))

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@dataclass(frozen=True)
class Randomness:
    """The generators of one step: numpy's for images and words, torch's (on the CPU) for noise."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Randomness:
        numbers = np.random.default_rng([seed, step])
        return cls(numbers, torch.Generator().manual_seed(int(numbers.integers(2**63))))


def train(
    plan: Plan, model: nn.Module, loss: Callable[[Randomness], Tensor], workshop: Workshop, *, learns_from: str = ""
) -> float:
    """Train a model in place, from its last state in the workshop's folder; return the total time in seconds.

    Args:
        plan: the hyperparameters.
        model: the model; it ends with the average of its weights if the plan has one.
        loss: returns the loss of one step, from its randomness.
        workshop: folder, console and device.
        learns_from: the digest of the frozen weights that the loss depends on.

    Raises:
        StateError: the state on disk is of another plan or device, or of a run with other frozen weights.
        RuntimeError: a gradient is not finite; the last state is left intact.
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
                progress = {"step": step + 1, "seconds": seconds, "made_by": _describe_run(plan, workshop, learns_from)}
                weights = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_atomically(progress | weights, _place(plan, workshop))
    if average:
        model.load_state_dict(average)
    return seconds


def check_state(plan: Plan, workshop: Workshop, *, learns_from: str | None = None) -> dict[str, Any]:
    """Return the last state of a component; empty if there is none.

    Args:
        learns_from: the digest of the frozen weights that the loss depends on; None if not known yet.

    Raises:
        StateError: the state cannot be read, or resuming from it would give other weights than starting anew.
    """
    path = _place(plan, workshop)
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=workshop.device)
        found = dict(state["made_by"])
    # torch raises many kinds of errors for a damaged file.
    except Exception as error:
        raise StateError(f"{path} cannot be read as a state ({type(error).__name__}); remove it") from None
    expected = _describe_run(plan, workshop, learns_from or found.get("learns_from", ""))
    differences = [
        f"{key} {found.get(key)!r}, expected {value!r}" for key, value in expected.items() if found.get(key) != value
    ]
    if differences:
        raise StateError(f"{path} is of another run: got {'; '.join(differences)}; remove it or train elsewhere")
    return state


def digest(*modules: nn.Module) -> str:
    """Return a short digest of the weights of modules."""
    values = (value.detach().cpu().numpy() for module in modules for value in module.state_dict().values())
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()[:16]


def save_atomically(value: Any, path: Path) -> None:
    """Save with torch so that the file is complete or absent."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def _place(plan: Plan, workshop: Workshop) -> Path:
    return workshop.folder / f"{plan.name}.pt"


def _describe_run(plan: Plan, workshop: Workshop, learns_from: str) -> dict[str, Any]:
    """Return everything that the trained weights depend on, except the code."""
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
            if not console.is_terminal and (step + 1) % LOG_EVERY == 0:  # a progress bar is unreadable in a log
                console.log(f"{plan.name}: {step + 1} of {plan.steps}, loss {smooth:.4f}")
    console.log(f"{plan.name}: {plan.steps} steps, loss {smooth:.4f}")
