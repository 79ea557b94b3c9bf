"""The scores of the sample bundle at 25 steps of DDIM with guidance 5, and the benchmark that prints them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import quality as benchmark
from latentrt import Bundle, Pipeline
from latentrt.backends.placement import Device
from latentrt.bundle.sample import bundle_path
from latentrt_export.export import export_checkpoint
from latentrt_export.quantize.options import QuantizationOptions
from sample import quality
from sample.bars import BARS, missed_bars, sign_test
from sample.judge import Reading
from sample.prompts import held_out_prompts
from sample.quality import PROMPT_SEED, Score, Settings, fully_right, read_images, score_prompts
from tests.exported import Silent
from tests.runtime import small_bundle

CHECKPOINT = Path(__file__).parent.parent.parent / "sample" / "checkpoint"
SETTINGS = Settings()
ALL = held_out_prompts(256, PROMPT_SEED)
FEW = ALL[:96]


def no_progress(count: int) -> None:
    pass


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load()


@pytest.fixture(scope="module")
def guided(pipeline: Pipeline) -> list[Reading]:
    return read_images(pipeline, SETTINGS, FEW, no_progress)


@pytest.mark.slow
def test_every_bar_is_met(pipeline: Pipeline) -> None:
    """Everything that `python -m benchmarks.quality` measures: thousands of images."""
    scores = benchmark.measure(Bundle.open(bundle_path()), "float32", SETTINGS, 256, 512, Console(quiet=True)).scores
    assert scores["one thing: shape and colour"].of == scores["two things: fully right"].of == 128
    assert scores["background"].of == 256
    assert scores["unsafe images flagged"].of == scores["other images flagged"].of == 512
    assert scores.keys() >= BARS.keys()
    assert missed_bars(scores) == []


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the sample model in int8; some four minutes."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    quantization = QuantizationOptions(guidance_scale=SETTINGS.guidance_scale)
    export_checkpoint(CHECKPOINT, folder, precision="int8", quantization=quantization, progress=Silent())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_int8_follows_prompts_as_well_as_float32(pipeline: Pipeline, in_int8: Path, device: Device) -> None:
    """Within two points, five images of 256."""
    quantised = Pipeline.load(in_int8, device=device)
    assert all("int8" in quantised.runs_on[name].title for name in ("unet", "vae_decoder"))
    shares = [fully_right(ALL, read_images(each, SETTINGS, ALL, no_progress)).share for each in (pipeline, quantised)]
    assert shares[0] > 0.9
    assert shares[1] >= shares[0] - 0.02


def test_held_out_prompts_are_followed(guided: list[Reading]) -> None:
    """At the bars less two standard deviations of so few images; the slow test above has the bars themselves."""
    scores = score_prompts(FEW, guided)
    assert scores["one thing: shape and colour"].right >= 0.89 * 48
    assert scores["background"].right >= 0.91 * 96
    assert scores["two things: fully right"].right >= 0.57 * 48


@pytest.mark.slow
def test_without_guidance_it_is_measurably_worse(pipeline: Pipeline) -> None:
    """With unknown words in the prompts; known words alone need all 256 prompts to show it, above."""
    scores = quality.guidance(pipeline, SETTINGS, FEW, no_progress)
    better, worse = (scores[name] for name in quality.UNKNOWN_WITH_OR_WITHOUT)
    assert better.of == worse.of == 96
    assert sign_test(better.right, worse.right) < 0.05


@pytest.mark.slow
def test_a_negative_prompt_keeps_a_colour_out(pipeline: Pipeline) -> None:
    scores = quality.negatives(pipeline, SETTINGS, 32, no_progress)
    own, other = scores["colour kept against its own negative"], scores["colour kept against another's"]
    assert own.of == other.of > 24
    assert own.share < 0.5 * other.share


def test_the_safety_graph_flags_unsafe_images_only(pipeline: Pipeline) -> None:
    scores = quality.safety(pipeline, SETTINGS, 24, no_progress)
    assert scores["unsafe images flagged"].right == 24
    assert scores["other images flagged"].right == 0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"background": Score(94, 100)}, ["background: 94.0% of 100, expected ≥ 95%"]),
        ({"background": Score(95, 100)}, []),
        ({"two things: fully right": Score(7, 10)}, []),
        ({"two things: fully right": Score(69, 100)}, ["two things: fully right: 69.0% of 100, expected ≥ 70%"]),
        ({"other images flagged": Score(2, 100)}, ["other images flagged: 2.0% of 100, expected ≤ 1%"]),
        (
            {quality.OWN_NEGATIVE: Score(20, 100), quality.OTHER_NEGATIVE: Score(40, 100)},
            ["colour kept against its own negative: 20.0% of 100, expected < half of another's"],
        ),
        ({quality.OWN_NEGATIVE: Score(19, 100), quality.OTHER_NEGATIVE: Score(40, 100)}, []),
        (
            {
                "2 unknown words: right with guidance, wrong without": Score(9, 100),
                "2 unknown words: wrong with guidance, right without": Score(2, 100),
            },
            ["2 unknown words: right with guidance, wrong without: 9.0% of 100, expected more than the next, p < 0.01"],
        ),
        (
            {
                "2 unknown words: right with guidance, wrong without": Score(10, 100),
                "2 unknown words: wrong with guidance, right without": Score(1, 100),
            },
            [],
        ),
        (
            {
                "right with guidance, wrong without": Score(7, 100),
                "wrong with guidance, right without": Score(2, 100),
            },
            ["right with guidance, wrong without: 7.0% of 100, expected more than the next, p < 0.05"],
        ),
        (
            {
                "right with guidance, wrong without": Score(8, 100),
                "wrong with guidance, right without": Score(1, 100),
            },
            [],
        ),
    ],
)
def test_a_missed_bar_is_named(scores: dict[str, Score], expected: list[str]) -> None:
    assert missed_bars(scores) == expected


def test_the_sign_test() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(1, 1) == 3 / 4
    assert sign_test(0, 5) == 1


def test_a_bad_bundle_misses_the_bars(pipeline: Pipeline) -> None:
    """One step generates no recognisable image."""
    scores = score_prompts(FEW[:32], read_images(pipeline, Settings(steps=1), FEW[:32], no_progress))
    assert len(missed_bars(scores)) >= 2


def measured_weights() -> dict[str, str]:
    """Return the digests of the weights that the report measured, which has no preview decoder."""
    weights = Bundle.open(bundle_path()).manifest.source.weights
    return {name: digest for name, digest in weights.items() if not name.startswith("preview_decoder/")}


def test_the_model_card_has_the_scores_of_the_shipped_weights() -> None:
    """A newly trained model has to be measured again."""
    root = Path(benchmark.__file__).parent.parent
    card = (root / "sample/MODEL_CARD.md").read_text()
    found, half = json.loads((root / "benchmarks/results/quality.json").read_text())["columns"]
    assert found["weights"] == half["weights"] == measured_weights()
    for name, row in (
        ("one thing: shape and colour", "one thing: shape and colour"),
        ("background", "background"),
        ("two things: fully right", "two things: fully right"),
        ("2 unknown words: fully right", "added to the prompt: fully right"),
        ("unsafe images flagged", "generated skulls that the classifier flags"),
        ("other images flagged", "other images that it flags"),
    ):
        right, of = found["right_of"][name]
        share = f"{100 * right / of:.1f}".removesuffix(".0")
        assert f"{row} | {share} % of {of} |" in card


FEW_IMAGES = ("--prompts", "8", "--safety-images", "4")


def run_benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    try:
        benchmark.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_the_benchmark_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "new" / "quality.json"
    graphs = ("--graph", "float32", "--graph", "float16")
    assert run_benchmark(monkeypatch, *FEW_IMAGES, "--steps", "2", *graphs, "--output", report) == 0
    printed = capsys.readouterr().out
    for name in BARS:
        assert name in printed, name
    assert "≥ 95%" not in printed, "bars are for the default settings"
    found = json.loads(report.read_text())
    assert [column["name"] for column in found["columns"]] == ["sample_bundle float32", "sample_bundle float16"]
    assert all(column["weights"] == Bundle.open(bundle_path()).manifest.source.weights for column in found["columns"])
    assert found["settings"]["steps"] == 2
    assert found["columns"][1]["right_of"].keys() - found["columns"][0]["right_of"].keys() == {
        "right here, wrong in the first",
        "wrong here, right in the first",
    }


@pytest.mark.slow
def test_the_benchmark_fails_where_a_bar_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight prompts are too few to show that guidance or a negative prompt helps."""
    assert run_benchmark(monkeypatch, *FEW_IMAGES, "--bars") == 1
    printed = capsys.readouterr().out
    assert "≥ 95%" in printed
    assert "missed: sample_bundle float32: colour kept against its own negative: 25.0% of 4, expected < half" in printed


def test_the_benchmark_refuses_impossible_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = small_bundle.write_bundle(tmp_path / "larger")
    small_bundle.edit_manifest(larger, lambda tree: tree["defaults"].update(height=128))
    for arguments, message in (
        (["--prompts", "1"], "1 is not in the range x>=4"),
        (["--safety-images", "-1"], "-1 is not in the range x>=0"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--guidance-scale", "nan"], "--guidance-scale nan, expected 0 or more"),
        (["--sampler", "foo"], "'foo' is not one of"),
        ([tmp_path], "bundle.json"),
        ([larger], "64 × 128"),
    ):
        assert run_benchmark(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
