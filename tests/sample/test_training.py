"""Training is deterministic, also when it is interrupted and resumed."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from sample import denoiser, text_encoder
from sample.train import NEEDS, PLANS, main
from sample.training import Plan, Randomness, StateError, Workshop, train

PLAN = Plan("model", steps=12, learning_rate=1e-2, warmup=3, average=0.9, save_every=5)


class StoppedError(Exception):
    pass


def train_small(folder: Path, plan: Plan = PLAN, *, stop_before: int | None = None, learns_from: str = "") -> nn.Linear:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    calls = 0

    def loss(randomness: Randomness) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == stop_before:
            raise StoppedError
        x = torch.randn(8, 4, generator=randomness.torch)
        y = torch.from_numpy(randomness.numpy.normal(size=(8, 1))).float()
        value: Tensor = (model(x) - y).square().mean()
        return value

    train(plan, model, loss, Workshop(folder, Console(file=io.StringIO())), learns_from=learns_from)
    return model


def test_two_runs_are_equal(tmp_path: Path) -> None:
    first, second = train_small(tmp_path / "a"), train_small(tmp_path / "b")
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, train_small(tmp_path / "c", replace(PLAN, seed=1)).weight)


@pytest.mark.parametrize("stopped", [2, 5, 9, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stopped: int) -> None:
    with pytest.raises(StoppedError):
        train_small(tmp_path / "stopped", stop_before=stopped)
    assert (tmp_path / "stopped" / "model.pt").exists() == (stopped >= 5)
    resumed, whole = train_small(tmp_path / "stopped"), train_small(tmp_path / "whole")
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = train_small(tmp_path)
    again = train_small(tmp_path, stop_before=0)
    assert torch.equal(whole.weight, again.weight)


def test_a_model_ends_with_the_average_of_its_weights(tmp_path: Path) -> None:
    average, last = train_small(tmp_path / "a"), train_small(tmp_path / "b", replace(PLAN, average=0.0))
    assert not torch.equal(average.weight, last.weight)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"plan": replace(PLAN, steps=13)}, "steps 12, expected 13"),
        ({"plan": replace(PLAN, compiled=True)}, "compiled False, expected True"),
        ({"learns_from": "other weights"}, "learns_from '', expected 'other weights'"),
    ],
)
def test_a_state_of_another_run_is_refused(tmp_path: Path, other: dict[str, Any], difference: str) -> None:
    train_small(tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(StateError, match=rf"model\.pt .*: got {difference}; remove it"):
        train_small(tmp_path, **other)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    train_small(tmp_path)
    whole = (tmp_path / "model.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"dear"):
        (tmp_path / "model.pt").write_bytes(damaged)
        with pytest.raises(StateError, match=r"model\.pt cannot be read .*\(\w+\); remove it"):
            train_small(tmp_path)


def test_a_gradient_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        train(
            PLAN, model, lambda _: model(torch.full((1, 1), torch.nan)).sum(), Workshop(tmp_path, Console(quiet=True))
        )
    assert torch.equal(model.weight, before)
    assert not [*tmp_path.iterdir()]


def test_a_shorter_plan_warms_up_faster() -> None:
    plan = Plan("model", steps=1000, learning_rate=1e-3, warmup=200)
    assert (plan.times(0.1).steps, plan.times(0.1).warmup) == (100, 25)
    assert (plan.times(2).steps, plan.times(2).warmup) == (2000, 200)
    assert (plan.times(1e-6).steps, plan.times(1e-6).warmup) == (2, 0)


def test_the_rate_warms_up_and_falls() -> None:
    rates = [PLAN.rate(step) for step in range(12)]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def command(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_folder_that_is_not_a_checkpoint_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = command("--work", tmp_path / "work", "--output", tmp_path)
    assert done.exit_code == 1
    assert "expected a checkpoint" in done.output
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["letter.txt"]
    assert not [*(tmp_path / "work").iterdir()]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    done = command("--work", tmp_path / "work", "--output", tmp_path / "file" / "checkpoint")
    assert done.exit_code == 1
    assert "Error: [Errno" in done.output
    assert not [*(tmp_path / "work").iterdir()]


@pytest.mark.parametrize("length", ["0", "-1", "1e9"])
def test_an_impossible_length_is_refused(tmp_path: Path, length: str) -> None:
    done = command("--work", tmp_path / "work", "--output", tmp_path / "checkpoint", "--length", length)
    assert done.exit_code == 2
    assert not [*tmp_path.iterdir()]


def test_every_state_is_checked_before_the_first_step(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "denoiser.pt").write_text("dear")
    done = command("--work", work, "--output", tmp_path / "checkpoint", "--eager")
    assert done.exit_code == 1
    assert "denoiser.pt cannot be read" in done.output
    assert [path.name for path in work.iterdir()] == ["denoiser.pt"]


def test_a_missing_compiler_is_reported_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    done = command("--work", tmp_path / "work", "--output", tmp_path / "checkpoint")
    assert done.exit_code == 1
    assert (
        "torch cannot compile here (no C++ compiler found), expected a C++ compiler; train with --eager" in done.output
    )
    assert not [*(tmp_path / "work").iterdir()]


def test_an_unavailable_device_is_reported_before_states_are_read(tmp_path: Path) -> None:
    done = command("--work", tmp_path / "work", "--output", tmp_path / "checkpoint", "--device", "nonsense")
    assert done.exit_code == 1
    assert "got --device nonsense" in done.output
    assert not (tmp_path / "work").exists()


def test_an_interrupted_run_prints_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_encoder, "train_text_encoder", stopped)
    done = command("--work", tmp_path / "work", "--output", tmp_path / "checkpoint", "--eager")
    assert done.exit_code == 130
    assert "the same command resumes" in done.output
    assert not (tmp_path / "checkpoint").exists()


def weights_of(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    return {
        (path.parent.name, name): value
        for path in checkpoint.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


def scaling_factor(checkpoint: Path) -> float:
    return float(json.loads((checkpoint / "vae" / "config.json").read_text())["scaling_factor"])


SHORT = ("--length", "0.0003", "--eager")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `work` and `checkpoint`, after two steps of every component."""
    folder = tmp_path_factory.mktemp("whole")
    done = command("--work", folder / "work", "--output", folder / "checkpoint", *SHORT)
    assert done.exit_code == 0, done.output
    for component in NEEDS:
        assert re.search(rf"{component}: \d+\.", done.output)  # minutes
    return folder


@pytest.mark.slow
def test_the_whole_command(whole: Path) -> None:
    weights = weights_of(whole / "checkpoint")
    assert {component for component, _ in weights} == {
        "text_encoder",
        "unet",
        "vae",
        "safety_checker",
        "preview_decoder",
    }
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert [plan.name for plan in PLANS] == [*NEEDS]


@pytest.mark.slow
def test_a_run_interrupted_twice_makes_the_same_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps of the autoencoder, and while the latents are written; then run again after the end."""
    arguments = ("--work", tmp_path / "work", "--output", tmp_path / "checkpoint", *SHORT)
    step, calls = Randomness.of, 0

    def stopped_step(seed: int, number: int) -> Randomness:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise StoppedError
        return step(seed, number)

    def stopped_save(value: Any, path: Path) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Randomness, "of", stopped_step)
        with pytest.raises(StoppedError):
            command(*arguments)
    assert {path.stem for path in (tmp_path / "work").glob("*.pt")} == {"text_encoder"}
    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "save_atomically", stopped_save)
        with pytest.raises(StoppedError):
            command(*arguments)
    assert {path.stem for path in (tmp_path / "work").glob("*.pt")} == {*NEEDS} - {"denoiser"}
    assert not (tmp_path / "checkpoint").exists()
    expected = weights_of(whole / "checkpoint")
    for _ in range(2):
        assert command(*arguments).exit_code == 0
        found = weights_of(tmp_path / "checkpoint")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert scaling_factor(tmp_path / "checkpoint") == scaling_factor(whole / "checkpoint")


@pytest.mark.slow
def test_a_state_trained_on_other_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    """Other weights of one component invalidate the states of the components trained on it."""
    work = tmp_path / "work"
    work.mkdir()
    for path in (whole / "work").glob("*.pt"):
        (work / path.name).write_bytes(path.read_bytes())
    state = torch.load(work / "autoencoder.pt", weights_only=True)
    state["average"]["decoder.conv_out.bias"] += 1
    torch.save(state, work / "autoencoder.pt")
    done = command("--work", work, "--output", tmp_path / "checkpoint", *SHORT)
    assert done.exit_code == 1
    assert "decoder.pt is of another run: got learns_from" in done.output
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_only_one_component(whole: Path, tmp_path: Path) -> None:
    """Trains it and those it needs, and writes no checkpoint."""
    done = command("--work", tmp_path / "work", "--output", tmp_path / "checkpoint", "--only", "decoder", *SHORT)
    assert done.exit_code == 0, done.output
    assert {path.stem for path in (tmp_path / "work").glob("*.pt")} == {"autoencoder", "decoder"}
    assert not (tmp_path / "checkpoint").exists()
    states = [torch.load(folder / "work" / "decoder.pt", weights_only=True)["average"] for folder in (whole, tmp_path)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
