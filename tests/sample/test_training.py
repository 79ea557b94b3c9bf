"""Training is deterministic, and stopping it changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from sample.train import main
from sample.training import Plan, Randomness, train

PLAN = Plan("part", steps=12, learning_rate=1e-2, warmup=3, average=0.9, save_every=5)


class StoppedError(Exception):
    pass


def trained(folder: Path, plan: Plan = PLAN, *, stop_before: int | None = None) -> nn.Linear:
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

    train(plan, model, loss, folder, Console(file=io.StringIO()))
    return model


def test_two_runs_are_equal(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, trained(tmp_path / "c", Plan(**{**vars(PLAN), "seed": 1})).weight)


@pytest.mark.parametrize("stopped", [2, 5, 9, 11])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, stopped: int) -> None:
    with pytest.raises(StoppedError):
        trained(tmp_path / "stopped", stop_before=stopped)
    assert (tmp_path / "stopped" / "part.pt").exists() == (stopped >= 5)
    resumed, whole = trained(tmp_path / "stopped"), trained(tmp_path / "whole")
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    again = trained(tmp_path, stop_before=0)
    assert torch.equal(whole.weight, again.weight)


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    average, last = trained(tmp_path / "a"), trained(tmp_path / "b", Plan(**{**vars(PLAN), "average": 0.0}))
    assert not torch.equal(average.weight, last.weight)


def test_the_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(SystemExit, match=r"part\.pt was left by .*'steps': 12.*, expected .*'steps': 13"):
        trained(tmp_path, Plan(**{**vars(PLAN), "steps": 13}))


def test_the_rate_warms_up_and_falls() -> None:
    rates = [PLAN.rate(step) for step in range(12)]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = CliRunner().invoke(main, ["--work", str(tmp_path / "work"), "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert "expected a checkpoint or nothing; give another --output" in done.output.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_whole_command(tmp_path: Path) -> None:
    """A few steps of every part make a checkpoint, and the same again makes the same weights."""
    weights = []
    for name in ("a", "b"):
        output = tmp_path / name / "checkpoint"
        arguments = ["--work", str(tmp_path / name / "work"), "--output", str(output), "--length", "0.0001", "--eager"]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "denoiser: 0." in done.output
        weights.append({str(path.relative_to(output)): load_file(path) for path in output.rglob("*.safetensors")})
    assert len(weights[0]) == 4
    for file, tensors in weights[0].items():
        for key, value in tensors.items():
            assert torch.equal(value, weights[1][file][key]), (file, key)
            assert value.dtype == torch.float16
