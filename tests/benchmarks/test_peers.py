"""`python -m benchmarks.peers`: the measurements and the report of a program, and the handling of one that fails.
No peer is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import peers
from benchmarks.peer_adapters.protocol import Job
from benchmarks.peer_catalogue import CONFIGURATIONS, REFERENCE, select
from benchmarks.peer_environments import ENVIRONMENTS, UnavailableError, last_line
from benchmarks.peer_models import MODELS, convert, file_bytes, plain_checkpoint
from benchmarks.peer_process import measure as measure_peer
from benchmarks.psnr import psnr_db
from latentrt.bundle import sample
from latentrt.sampling import noise

ROOT = Path(__file__).parent.parent.parent
FAKE = "tests.benchmarks.fake_peer"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "noise").write_bytes(noise.Generator(0).normal((1, 4, 8, 8)).tobytes())
    return Job(
        model="",
        options={},
        prompt="a red circle",
        side=64,
        steps=3,
        guidance_scale=7.5,
        threads=1,
        seed=0,
        latents=str(tmp_path / "noise"),
        image_file=str(tmp_path / "image"),
        images=2,
        calls=4,
        began=0.0,
    )


def parse(given: list[str]) -> SimpleNamespace:
    return SimpleNamespace(**peers.main.make_context("peers", given).params)


def measure(job: Job, module: str = FAKE, timeout_s: float = 60) -> dict[str, Any]:
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    folder = Path(job.latents).parent
    return measure_peer(Path(sys.executable), module, job, variables=variables, folder=folder, timeout_s=timeout_s)


def test_every_part_of_a_process_is_measured(job: Job) -> None:
    held = 200 << 20
    found = measure(replace(job, options={"hold_bytes": held, "wait_s": 0.3}))
    assert set(found) == {
        *("load_s", "first_image_s", "image_s", "step_s", "components"),
        *("peak_resident_bytes", "peak_anonymous_bytes"),
    }
    assert 0.3 < found["load_s"] < found["first_image_s"] < 60
    assert len(found["image_s"]) == 2
    assert len(found["step_s"]) == 2 * (job.steps - 1)
    assert min(found["step_s"]) >= 0.001
    assert list(found["components"]) == ["unet"]
    assert len(found["components"]["unet"]) == 4
    assert min(found["components"]["unet"]) >= 0.002
    # Its own memory is anonymous; Python and its libraries are counted in addition.
    assert held < found["peak_anonymous_bytes"] < found["peak_resident_bytes"] < held + (200 << 20)
    assert Path(job.image_file).stat().st_size == 64 * 64 * 3


def test_components_alone_and_those_that_only_the_peer_can_time(job: Job) -> None:
    assert set(measure(replace(job, images=None))) == {
        *("load_s", "components", "peak_resident_bytes", "peak_anonymous_bytes"),
    }
    assert not Path(job.image_file).exists()
    assert measure(replace(job, options={"knows": True}))["components"] == {"vae_decoder": [0.5, 0.5]}
    first_only = measure(replace(job, options={"knows": True}, images=0, calls=0))
    assert first_only["components"] == {"vae_decoder": [0.5]}
    assert first_only["image_s"] == first_only["step_s"] == []


def test_a_process_that_fails_gives_its_reason(job: Job) -> None:
    with pytest.raises(UnavailableError, match=r"^RuntimeError: found no such precision$"):
        measure(replace(job, options={"fail": "found no such precision"}))
    with pytest.raises(UnavailableError, match=r"No module named benchmarks\.nowhere"):
        measure(job, "benchmarks.nowhere")
    with pytest.raises(UnavailableError, match=r"took longer than 0\.5 s"):
        measure(replace(job, options={"wait_s": 60}), timeout_s=0.5)


def test_our_adapter_generates_the_image_of_our_pipeline(job: Job, tmp_path: Path) -> None:
    from latentrt.pipeline import Pipeline

    latents = noise.Generator(0).normal((1, 4, 16, 16))
    (tmp_path / "noise").write_bytes(latents.tobytes())
    base = replace(job, model=str(sample.bundle_path()), steps=2, images=1, calls=1)
    found = measure(replace(base, options={"load": {"device": "cpu"}}), "benchmarks.peer_adapters.ours")
    assert set(found["components"]) == {"text_encoder", "unet", "vae_decoder"}
    assert len(found["step_s"]) == 1
    expected = Pipeline.load(device="cpu", threads=1)(
        job.prompt,
        latents=latents,
        height=job.side,
        width=job.side,
        num_inference_steps=2,
        guidance_scale=7.5,
        sampler="euler",
        sampler_options={"timestep_spacing": "linspace"},
        safety="off",
    ).images[0]
    assert Path(job.image_file).read_bytes() == expected.tobytes()


@pytest.mark.slow
def test_diffusers_adapter_generates_the_same_image_from_the_same_noise(job: Job, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(noise.Generator(0).normal((1, 4, 32, 32)).tobytes())
    base = replace(job, side=128, steps=8, images=1, calls=1)
    theirs = replace(base, model=str(ROOT / "sample/checkpoint"), options={"dtype": "float32"})
    ours = replace(base, model=str(sample.bundle_path()), options={"load": {"device": "cpu"}})
    images = []
    for name, one in (("diffusers_torch", theirs), ("ours", ours)):
        found = measure(one, f"benchmarks.peer_adapters.{name}", 600)
        assert set(found["components"]) == {"text_encoder", "unet", "vae_decoder"}
        images.append(np.fromfile(job.image_file, np.uint8))
    # The bundle's weights are float16.
    assert (psnr_db(*images) or 99) > 35


def test_the_catalogue_names_existing_adapters_environments_and_models() -> None:
    names = [each.name for each in CONFIGURATIONS]
    assert len(set(names)) == len(names)
    assert REFERENCE in names
    for each in CONFIGURATIONS:
        assert each.bits in (8, 16, 32)
        assert importlib.util.find_spec(f"benchmarks.peer_adapters.{each.adapter}") is not None
        assert each.environment in ENVIRONMENTS
        assert each.model in MODELS
        assert each.ours == (each.adapter == "ours") == ENVIRONMENTS[each.environment].ours
    for model in MODELS.values():
        assert model.source in MODELS
        assert model.environment is None or model.environment in ENVIRONMENTS
    assert {each.name for each in select(["GenAI"])} == {name for name in names if "GenAI" in name}
    assert select([]) == CONFIGURATIONS
    with pytest.raises(SystemExit, match="got --only 'tensorflow', expected a part of one of: diffusers float32, "):
        select(["tensorflow"])


def test_the_plain_checkpoint_is_laid_out_as_it_was_published(tmp_path: Path) -> None:
    source = ROOT / "sample/checkpoint"
    weights = load_file(source / "text_encoder/model.safetensors")
    original = {name.removeprefix("text_model."): value for name, value in weights.items()}
    for number, given in enumerate((original, {f"text_model.{name}": value for name, value in original.items()})):
        checkpoint = tmp_path / f"given {number}"
        plain_checkpoint(source, checkpoint)
        save_file(given, checkpoint / "text_encoder/model.safetensors")
        plain_checkpoint(checkpoint, tmp_path / f"plain {number}")
        found = load_file(tmp_path / f"plain {number}/text_encoder/model.safetensors")
        assert set(found) == {f"text_model.{name.removeprefix('text_model.')}" for name in original}
        assert all(np.array_equal(found[f"text_model.{name}"], original[name]) for name in original)
    index = json.loads((tmp_path / "plain 0/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert file_bytes(tmp_path / "plain 0") > file_bytes(source / "unet") + file_bytes(source / "vae")


def test_a_failed_conversion_leaves_no_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(MODELS["onnx"], environment=None, command=("-c", "raise SystemExit('found no such task')"))
    monkeypatch.setitem(MODELS, "onnx", failing)
    with pytest.raises(UnavailableError, match=r"^onnx could not be converted: found no such task$"):
        convert("onnx", tmp_path, ROOT / "sample/checkpoint", lambda name: Path(sys.executable))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_last_line_of_an_output_has_no_paths_of_this_machine() -> None:
    assert last_line(f"Traceback\n  {ROOT}/x.py\nValueError: no\n\n") == "ValueError: no"
    assert last_line(f"cannot read {ROOT}/x") == "cannot read ./x"
    assert last_line("") == "no output"


def test_psnr() -> None:
    black, grey = np.zeros(12, np.uint8), np.full(12, 51, np.uint8)
    assert psnr_db(black, black) is None
    assert psnr_db(grey, black) == pytest.approx(20 * np.log10(5), abs=0.01)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("", "expected a checkpoint"),
        ("checkpoint", "expected a checkpoint"),
        ("c --work w --output o --steps 1", "--steps"),
        ("c --work w --output o --size 500", "--size 500, expected a multiple of 64"),
    ],
)
def test_arguments_that_are_refused(given: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        peers.main(given.split())
    assert refused.value.code == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_is_measured_only_on_a_cpu_that_supports_it(
    has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["checkpoint", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "report.json")]
    bench = peers.Bench(parse(given))
    monkeypatch.setattr(peers, "computes_in_bfloat16", lambda: has)
    monkeypatch.setattr(peers, "make_environment", lambda name, folder: Path(sys.executable))
    monkeypatch.setattr(peers, "describe_environment", lambda name, python: {"packages": {}})
    monkeypatch.setattr(peers, "convert", lambda *given: ROOT / "sample/checkpoint/scheduler")
    for configuration in CONFIGURATIONS:
        bench.prepare(configuration)
    wanting = {each.name for each in CONFIGURATIONS if "bfloat16" in each.name}
    assert wanting
    assert bench.report["skipped"] == ({} if has else dict.fromkeys(wanting, "this CPU does not multiply in bfloat16"))
    assert set(bench.ready) == {each.name for each in CONFIGURATIONS} - ({*()} if has else wanting)


def test_rounds_continue_without_failed_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, measured = tmp_path / "report.json", []
    given = [str(ROOT / "sample/checkpoint"), "--work", str(tmp_path / "work"), "--output", str(output)]
    arguments = parse([*given, "--size", "64", "--rounds", "2", "--images", "1"])

    def environment(name: str, folder: Path) -> Path:
        if name == "optimum-onnx":
            raise UnavailableError("the environment optimum-onnx could not be installed: no network")
        return Path(sys.executable)

    def process(python: Path, module: str, job: Job, **others: Any) -> dict[str, Any]:
        measured.append(Path(job.image_file).name)
        if "GenAI" in job.image_file and len(measured) > 3:
            raise UnavailableError("RuntimeError: out of memory")
        values = np.frombuffer(Path(job.latents).read_bytes(), np.uint8)
        Path(job.image_file).write_bytes(np.resize(values, 64 * 64 * 3).tobytes())
        return {"step_s": [1.0], "image_s": [2.0], "first_image_s": 3.0, "components": {}}

    monkeypatch.setattr(peers, "make_environment", environment)
    monkeypatch.setattr(peers, "describe_environment", lambda name, python: {"packages": {}})
    monkeypatch.setattr(peers, "convert", lambda *given: ROOT / "sample/checkpoint/scheduler")
    monkeypatch.setattr(peers, "measure", process)
    bench = peers.Bench(arguments)
    for configuration in select([REFERENCE, "GenAI float32", "optimum-onnx"]):
        bench.prepare(configuration)
    for number in range(2):
        bench.round(number)
    # In turns; the reference once more for another seed.
    images = [f"{REFERENCE}, noise.u8", f"{REFERENCE}, other.u8", "OpenVINO GenAI float32, noise.u8"]
    assert measured == [*images, images[0], images[2]]
    report = json.loads(output.read_text())
    assert report["skipped"] == {
        "optimum-onnx float32": "the environment optimum-onnx could not be installed: no network",
        "OpenVINO GenAI float32": "RuntimeError: out of memory",
    }
    assert {name: len(each["rounds"]) for name, each in report["configurations"].items()} == {
        REFERENCE: 2,
        "OpenVINO GenAI float32": 1,
    }
    assert report["configurations"][REFERENCE]["rounds"][0]["psnr_db"] is None
    assert 5 < report["psnr_of_another_seed_db"] < 20
    assert str(tmp_path) not in output.read_text()


def test_a_report_contains_its_command(tmp_path: Path) -> None:
    given = ["checkpoint", "--work", str(tmp_path), "--output", str(tmp_path / "report.json")]
    given += ["--steps", "3", "--threads", "2", "--only", "GenAI", "--only", "latentrt OpenVINO"]
    command = peers.Bench(parse(given)).report["command"]
    assert command == (
        "python -m benchmarks.peers scratch/full/checkpoint --work scratch/peers --steps 3 --size 512 --rounds 3 "
        "--images 2 --calls 5 --threads 2 --seed 0 --only GenAI --only 'latentrt OpenVINO'"
    )
    # As the tables show it, it can be run again.
    arguments = [*shlex.split(command)[3:], "--output", "report.json"]
    assert parse(arguments).only == ("GenAI", "latentrt OpenVINO")
