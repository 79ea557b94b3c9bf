"""`latentrt run` as a user sees it: what it writes, what it prints, what it refuses and with which exit code."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt import Bundle
from latentrt.images.metadata import read_metadata
from tests.exported import Exported
from tests.runtime import small_bundle

QUICK = ("--steps", "2", "--seed", "7", "--sampler", "euler")


def latentrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from latentrt.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], code: int, says: str) -> None:
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_a_picture_that_says_what_it_is(sd1: Exported, tmp_path: Path, name: str) -> None:
    done = latentrt("run", sd1.bundle, "a red circle, “quoted”\nin two lines", *QUICK, "-o", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert "seed 7, euler, 2 steps, safety block: clear" in done.stdout
    record = read_metadata(tmp_path / name).record
    assert record is not None
    assert record.prompt == "a red circle, “quoted”\nin two lines"
    assert record.bundle_digest == Bundle.open(sd1.bundle).digest
    inspected = latentrt("inspect", tmp_path / name)
    assert inspected.returncode == 0
    assert record.bundle_digest in inspected.stdout


def test_a_range_of_seeds_is_a_picture_each(sd1: Exported, tmp_path: Path) -> None:
    call = ("run", sd1.bundle, "a star", "--steps", "2", "--sampler", "ddim")
    assert latentrt(*call, "--seed", "5..6", "-o", tmp_path / "many.png").returncode == 0
    assert latentrt(*call, "--seed", "6", "-o", tmp_path / "one.png").returncode == 0
    many, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("many-1.png", "one.png"))
    assert np.abs(many - one).max() <= 1  # a batch may order float32 sums otherwise, and the decoder rounds


def test_a_sampler_by_another_tool_s_name_and_its_options(sd1: Exported, tmp_path: Path) -> None:
    quick = ("--seed", "7", "-o", tmp_path / "out.png")
    options = ("--sampler-option", "solver_order=3", "--sampler-option", "lambda_min_clipped=-Infinity")
    done = latentrt("run", sd1.bundle, "a star", "--sampler", "DPM++ 2M Karras", "--steps", "3", *options, *quick)
    assert done.returncode == 0, done.stderr
    words = "dpmpp_2m use_karras_sigmas solver_order=3 lambda_min_clipped=-Infinity, 3 steps"
    assert words in done.stdout
    record = read_metadata(tmp_path / "out.png").record
    assert record is not None
    assert record.sampler == "dpmpp_2m"
    assert record.sampler_options["use_karras_sigmas"] is True
    assert record.sampler_options["solver_order"] == 3
    assert record.sampler_options["lambda_min_clipped"] == "-Infinity"

    done = latentrt(
        "run", sd1.bundle, "a star", "--sampler", "euler", "--sampler-option", "timesteps=[900,400]", *quick
    )
    assert done.returncode == 0, done.stderr
    assert "euler timesteps=[900, 400], 2 steps" in done.stdout


def test_several_prompts(sd1: Exported, tmp_path: Path) -> None:
    done = latentrt("run", sd1.bundle, "a star", "a circle", *QUICK, "-o", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    records = [read_metadata(tmp_path / f"out-{index}.png").record for index in (0, 1)]
    assert [record.prompt for record in records if record] == ["a star", "a circle"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--height", "100"), "multiple of 8; the nearest: 96 and 104"),
        (("--width", "100000"), "width: found 100000"),
        (("--steps", "0"), "num_inference_steps: found 0"),
        (
            ("--sampler", "heun", "--sampler-option", "solver_order=3"),
            "sampler heun has no option 'solver_order'",
        ),
        (("--sampler", "heun", "--sampler-option", "count=9"), "sampler heun has no option 'count'"),
        (("--sampler", "flow_euler"), "flow_euler for flow models"),
        (("--sampler", "repaint"), "the pipeline does not run"),
        (("--sampler", "eular"), "dpmpp_2m, dpmpp_2m_inverse, dpmpp_2s"),
        (("--sampler", "ddim", "--karras"), "karras"),
        (("--seed", "9..5"), "empty range of seeds"),
        (("--seed", "1..99999999999"), "num_images_per_prompt: found 99999999999"),
        (("--seed", "-1"), "seed: found -1"),
        (("--seed", "seven"), "expected a number, a list such as 7,9,11"),
        (("--images", "33"), "33"),
        (("--safety", "maybe"), "expected one of block, blur, report, off"),
        (("--digest", "abc"), "sha256:"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_impossible_requests(sd1: Exported, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    done = latentrt("run", sd1.bundle, "a star", *options, "-o", tmp_path / "out.png")
    assert_refused(done, 2, says)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(sd1: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(latentrt("run", sd1.bundle, "a star", "-o", tmp_path / "file" / "out.png"), 8, "cannot be written")
    assert_refused(latentrt("run", sd1.bundle, "a star", "-o", tmp_path / "out.gif"), 8, ".png")


def test_what_is_not_a_bundle(tmp_path: Path, sd1: Exported) -> None:
    assert_refused(latentrt("run", tmp_path / "none", "a star"), 4, "does not exist")
    assert_refused(latentrt("run", sd1.checkpoint, "a star"), 4, "latentrt export")


def test_a_bundle_without_a_classifier_is_not_run_unchecked(sd1: Exported, tmp_path: Path) -> None:
    bundle = copied(sd1, tmp_path)
    small_bundle.edit_manifest(bundle, lambda tree: tree["components"].pop("safety_checker"))
    refused = latentrt("run", bundle, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(refused, 6, "--safety-checker PATH")
    assert "--safety off" in refused.stderr
    done = latentrt("run", bundle, "a star", *QUICK, "--safety", "off", "-o", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert "switched off" in done.stderr
    record = read_metadata(tmp_path / "out.png").record
    assert record is not None
    assert record.safety.policy == "off"


def test_a_changed_byte_anywhere_stops_the_run_before_anything_parses_it(sd1: Exported, tmp_path: Path) -> None:
    for name in Bundle.open(sd1.bundle).manifest.files:
        if name.startswith(("vae_encoder", "LICENSE", "MODEL_CARD")):
            continue  # not read in a run; `latentrt verify` reads them all
        bundle = copied(sd1, tmp_path / name.replace("/", "-"))
        small_bundle.change_byte(bundle / name)
        done = latentrt("run", bundle, "a star", *QUICK, "-o", tmp_path / "out.png")
        assert_refused(done, 4, name)
        assert not (tmp_path / "out.png").exists()


def test_a_pinned_digest(sd1: Exported, tmp_path: Path) -> None:
    digest = Bundle.open(sd1.bundle).digest
    out = ("-o", tmp_path / "out.png")
    assert latentrt("run", sd1.bundle, "a star", *QUICK, "--digest", digest, *out).returncode == 0
    bundle = copied(sd1, tmp_path)
    small_bundle.edit_manifest(bundle, lambda tree: tree["defaults"].update(guidance_scale=1.0))
    assert_refused(latentrt("run", bundle, "a star", *QUICK, "--digest", digest, *out), 4, digest)


def test_a_bundle_in_a_hub_cache_is_run_through_its_links(sd1: Exported, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for number, source in enumerate(path for path in sorted(sd1.bundle.rglob("*")) if path.is_file()):
        blob = repository / "blobs" / str(number)
        shutil.copyfile(source, blob)
        link = snapshot / source.relative_to(sd1.bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(source.relative_to(sd1.bundle).parts) + 1)) / "blobs" / blob.name)
    done = latentrt("run", snapshot, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr


def test_a_traceback_only_if_it_is_asked_for(sd1: Exported, tmp_path: Path) -> None:
    call = ("run", sd1.bundle, "a star", "--height", "100", "-o", tmp_path / "out.png")
    assert "Traceback" not in latentrt(*call).stderr
    for asked in (("--debug", *call), (*call, "--debug")):
        failed = latentrt(*asked)
        assert "Traceback" in failed.stderr
        assert failed.returncode == 2, "as without it"


def copied(model: Exported, place: Path) -> Path:
    return Path(shutil.copytree(model.bundle, place / "bundle"))


def test_a_prompt_too_long_for_a_jpeg_is_refused_before_the_work(sd1: Exported, tmp_path: Path) -> None:
    long = "star " * 20_000
    refused = latentrt("run", sd1.bundle, long, "--steps", "1000", "--sampler", "euler", "-o", tmp_path / "out.jpg")
    assert_refused(refused, 8, "65,533")


def test_ctrl_c_ends_a_run_and_leaves_nothing(sd1: Exported, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from latentrt.cli.main import main; main()", "run", str(sd1.bundle), "a star"]
    command += ["--steps", "900", "--sampler", "euler", "-o", str(tmp_path / "out.png")]
    command += ["--height", "512", "--width", "512"]  # so that no machine is through with it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(3)  # in the middle of the steps
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_is_on_record(sd2: Exported, tmp_path: Path) -> None:
    """On both of a CPU's backends, which agree on what is left."""
    left_out = ("--guidance-end", "0.5", "--deep-cache", "2", "--decoder", "preview", "--low-memory")
    pictures = []
    for device in ("cpu", "openvino"):
        place = tmp_path / f"{device}.png"
        call = ("run", sd2.bundle, "a star", "--steps", "4", "--seed", "7", "--device", device, "-o", place)
        done = latentrt(*call, *left_out)
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(place)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2  # sums in another order, then rounding
    record = read_metadata(tmp_path / "cpu.png").record
    assert record is not None
    assert (record.guidance_start, record.guidance_end, record.deep_cache, record.decoder) == (0, 0.5, 2, "preview")
    inspected = latentrt("inspect", tmp_path / "cpu.png").stdout
    assert "deep cache    2" in inspected
    assert "guidance start" not in inspected


def test_a_precision_is_a_cpus(sd1: Exported, tmp_path: Path) -> None:
    call = ("run", sd1.bundle, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(latentrt(*call, "--precision", "float8"), 2, "expected one of float32, bfloat16, int8")
    assert_refused(latentrt(*call, "--device", "cpu", "--precision", "bfloat16"), 7, "OpenVINO does: --device openvino")
    assert_refused(latentrt(*call, "--precision", "int8"), 7, "for a bundle of float32; export it in int8")
    assert not (tmp_path / "out.png").exists()
