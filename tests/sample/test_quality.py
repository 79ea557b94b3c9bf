"""The bars of the sample model, on the bundle that the runtime carries, at 25 steps of DDIM with guidance 5."""

from __future__ import annotations

import sys
from math import comb
from pathlib import Path

import pytest

from benchmarks import quality as benchmark
from latentrt import Pipeline
from sample import quality
from sample.judge import Reading
from sample.prompts import held_out_prompts
from sample.quality import BARS, Figure, Settings

SETTINGS = Settings()
UNGUIDED = Settings(guidance_scale=1.0)
ALL = held_out_prompts(256, quality.PROMPT_SEED)
FEW = ALL[:96]


def nothing(count: int) -> None:
    pass


def sign_test(first: Figure, second: Figure) -> float:
    """The chance of at least as many in the first, were either as likely as the other."""
    count = first.right + second.right
    return sum(comb(count, right) for right in range(first.right, count + 1)) / 2.0**count


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load()


@pytest.fixture(scope="module")
def guided(pipeline: Pipeline) -> list[Reading]:
    return quality.readings(pipeline, SETTINGS, FEW, nothing)


@pytest.mark.slow
def test_held_out_prompts_are_followed(pipeline: Pipeline) -> None:
    seen = quality.readings(pipeline, SETTINGS, ALL, nothing)
    figures = quality.following(ALL, seen)
    assert figures["one thing: shape and colour"].of == figures["two things: wholly right"].of == 128
    assert figures["background"].of == 256
    assert quality.missed(figures) == []

    free = quality.readings(pipeline, UNGUIDED, ALL, nothing)
    assert sign_test(*quality.compared(ALL, seen, free)) < 0.01


def test_some_held_out_prompts_are_followed(guided: list[Reading]) -> None:
    """The bars less two standard deviations of as few pictures; the slow test above holds the bars themselves."""
    figures = quality.following(FEW, guided)
    assert figures["one thing: shape and colour"].right >= 0.89 * 48
    assert figures["background"].right >= 0.91 * 96
    assert figures["two things: wholly right"].right >= 0.57 * 48


def test_without_guidance_it_is_measurably_worse(pipeline: Pipeline, guided: list[Reading]) -> None:
    free = quality.readings(pipeline, UNGUIDED, FEW, nothing)
    assert sign_test(*quality.compared(FEW, guided, free)) < 0.05


def test_a_negative_prompt_keeps_a_colour_out(pipeline: Pipeline) -> None:
    figures = quality.negatives(pipeline, SETTINGS, 32, nothing)
    own, other = figures["colour kept against its own negative"], figures["colour kept against another's"]
    assert own.of == other.of > 24
    assert own.share < 0.5 * other.share


@pytest.mark.slow  # a thousand pictures
def test_the_safety_graph_flags_what_it_should(pipeline: Pipeline) -> None:
    figures = quality.safety(pipeline, SETTINGS, 512, nothing)
    assert all(figure.of >= 500 for figure in figures.values())
    assert quality.missed(figures) == []


def test_the_safety_graph_on_some(pipeline: Pipeline) -> None:
    figures = quality.safety(pipeline, SETTINGS, 48, nothing)
    assert figures["unsafe pictures flagged"].right >= 47
    assert figures["other pictures flagged"].right <= 1


def test_a_missed_bar_is_named() -> None:
    figures = {"background": Figure(8, 10), "two things: wholly right": Figure(8, 10)}
    assert quality.missed(figures) == ["background: 80.0%, expected 95% to 100%"]
    assert quality.missed({"other pictures flagged": Figure(2, 100)}) == [
        "other pictures flagged: 2.0%, expected 0% to 1%"
    ]


def test_a_bad_bundle_misses_the_bars(pipeline: Pipeline) -> None:
    """One step draws no picture of anything, and the figures say so."""
    figures = quality.following(FEW[:32], quality.readings(pipeline, Settings(steps=1), FEW[:32], nothing))
    assert len(quality.missed(figures)) >= 2


def test_the_benchmark_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "quality.json"
    given = ["--prompts", "8", "--safety-pictures", "4", "--steps", "2", "--graph", "float32", "--graph", "float16"]
    monkeypatch.setattr(sys, "argv", ["quality", *given, "--output", str(report)])
    benchmark.main()
    printed = capsys.readouterr().out
    for name in BARS:
        assert name in printed
    assert "sample_bundle float32" in report.read_text()
    assert "sample_bundle float16" in report.read_text()
    monkeypatch.setattr(sys, "argv", ["quality", *given, "--bars"])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 1
