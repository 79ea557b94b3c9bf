"""`latentrt run` as a user sees it: the files it writes, the lines it prints, refusals and their exit codes."""

from __future__ import annotations

import re
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
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.sample import bundle_path
from latentrt.cli.output import Stream
from latentrt.errors import OutputError
from latentrt.images.metadata import ImageRecord, read_metadata
from tests.runtime.cli.conftest import Caller, Done
from tests.runtime.small_bundle import change_byte, edit_manifest

SAMPLE = bundle_path()
QUICK = ("--steps", "2", "--seed", "7", "--sampler", "euler", "--device", "cpu")


def assert_refused(done: Done, code: int, *fragments: str) -> None:
    assert done.code == code, done.err
    for fragment in fragments:
        assert fragment in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def record_of(place: Path) -> ImageRecord:
    record = read_metadata(place).record
    assert record is not None
    return record


def copy_of_sample(place: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, place / "bundle"))


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_an_image_carries_its_record(latentrt: Caller, tmp_path: Path, name: str) -> None:
    prompt = "a red circle, “quoted”\nin two lines"
    done = latentrt("run", SAMPLE, prompt, *QUICK, "-o", tmp_path / name)
    assert done.code == 0, done.err
    assert f"{tmp_path / name}: seed 7, euler, 2 steps, safety block: clear" in done.out
    assert done.err.splitlines()[-1] == "all on ONNX Runtime on the CPU"
    record = record_of(tmp_path / name)
    assert record.prompt == prompt
    assert record.bundle_digest == Bundle.open(SAMPLE).digest
    inspected = latentrt("inspect", tmp_path / name)
    assert inspected.code == 0
    assert record.bundle_digest in inspected.out


def test_quiet_prints_nothing(latentrt: Caller, tmp_path: Path) -> None:
    assert latentrt("run", SAMPLE, "a star", *QUICK, "--quiet", "-o", tmp_path / "out.png") == Done(0, "", "")


def test_a_range_of_seeds_gives_an_image_each(latentrt: Caller, tmp_path: Path) -> None:
    call = ("run", SAMPLE, "a star", "--steps", "2", "--sampler", "ddim", "--device", "cpu")
    assert latentrt(*call, "--seed", "5..6", "-o", tmp_path / "many.png").code == 0
    assert latentrt(*call, "--seed", "6", "-o", tmp_path / "one.png").code == 0
    many, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("many-1.png", "one.png"))
    assert np.abs(many - one).max() <= 1  # a batch may order float32 sums otherwise, and the decoder rounds


def test_a_random_seed_is_recorded(latentrt: Caller, tmp_path: Path) -> None:
    call = ("run", SAMPLE, "a star", "--steps", "1", "--device", "cpu", "-o", tmp_path / "out.png")
    printed, recorded = latentrt(*call, "--seed", "-1").out, record_of(tmp_path / "out.png").seed
    assert f"seed {recorded}," in printed
    assert recorded != -1


def test_prompts_seeds_and_images_together(latentrt: Caller, tmp_path: Path) -> None:
    call = (
        "run",
        SAMPLE,
        "a star",
        "a circle",
        "--steps",
        "1",
        "--device",
        "cpu",
        "-o",
        tmp_path / "out.png",
        "--overwrite",
    )
    assert latentrt(*call, "--seed", "7,9").code == 0
    records = [record_of(tmp_path / f"out-{index}.png") for index in range(2)]
    assert [(record.prompt, record.seed) for record in records] == [("a star", 7), ("a circle", 9)]
    assert latentrt(*call, "--seed", "7", "--count", "2").code == 0
    records = [record_of(tmp_path / f"out-{index}.png") for index in range(4)]
    expected = [("a star", 7), ("a star", 8), ("a circle", 9), ("a circle", 10)]
    assert [(record.prompt, record.seed) for record in records] == expected
    assert_refused(latentrt(*call, "--seed", "7,8,9"), 2, "--seed: got 3 seeds for 2 prompts")


def test_a_sampler_by_another_tool_s_name_and_its_options(latentrt: Caller, tmp_path: Path) -> None:
    out = ("--seed", "7", "--device", "cpu", "-o", tmp_path / "out.png", "--overwrite")
    options = ("--sampler-option", "solver_order=3", "--sampler-option", "lambda_min_clipped=-Infinity")
    done = latentrt("run", SAMPLE, "a star", "--sampler", "DPM++ 2M Karras", "--steps", "3", *options, *out)
    assert done.code == 0, done.err
    assert "dpmpp_2m use_karras_sigmas solver_order=3 lambda_min_clipped=-Infinity, 3 steps" in done.out
    recorded = record_of(tmp_path / "out.png").options
    assert recorded["sampler"] == "dpmpp_2m"
    expected = {"use_karras_sigmas": True, "solver_order": 3, "lambda_min_clipped": "-Infinity"}
    assert expected.items() <= recorded["sampler_options"].items()

    done = latentrt("run", SAMPLE, "a star", "--sampler", "euler", "--sampler-option", "timesteps=[900,400]", *out)
    assert done.code == 0, done.err
    assert "euler timesteps=[900, 400], 2 steps" in done.out


def test_every_kind_of_option_reaches_the_record(latentrt: Caller, tmp_path: Path) -> None:
    options = ("--guidance-end", "0.5", "--deep-cache", "2", "--decoder", "preview", "--karras", "--clip-skip", "1")
    call = ("run", SAMPLE, "a star", *QUICK, "-n", "blue", "--low-memory", "-o", tmp_path / "out.png")
    done = latentrt(*call, *options)
    assert done.code == 0, done.err
    record = record_of(tmp_path / "out.png")
    expected = {"guidance_end": 0.5, "deep_cache": 2, "decoder": "preview", "karras": True, "clip_skip": 1}
    assert expected.items() <= record.options.items()
    assert record.negative_prompt == "blue"
    assert "guidance_start" not in record.options


# Images.


@pytest.fixture
def source(latentrt: Caller, tmp_path: Path) -> Path:
    """An image that carries parameters."""
    place = tmp_path / "in.png"
    assert latentrt("run", SAMPLE, "a green heart", "--steps", "5", *QUICK[2:], "-o", place).code == 0
    return place


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White on the right half."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_image_to_image(latentrt: Caller, source: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.png"
    done = latentrt("run", SAMPLE, "a red circle", *QUICK, "--image", source, "--strength", "0.6", "-o", place)
    assert done.code == 0, done.err
    record = record_of(place)
    assert (record.task, record.options["strength"], record.given) == ("image-to-image", 0.6, ())
    assert {*record.inputs} == {"image"}
    assert record.inputs["image"].digest == f"sha256:{hash_bytes(source.read_bytes())}"
    carried = record.inputs["image"].parameters
    assert carried == read_metadata(source).parameters
    assert carried is not None
    assert carried.startswith("a green heart")
    assert "Denoising strength: 0.6" in (read_metadata(place).parameters or "")
    with Image.open(source) as before, Image.open(place) as after:
        assert before.size == after.size
        assert (np.asarray(before) != np.asarray(after)).any()


def test_inpainting(latentrt: Caller, source: Path, mask: Path, tmp_path: Path) -> None:
    place = tmp_path / "out.webp"
    call = ("run", SAMPLE, "a red circle", *QUICK, "--image", source, "--mask", mask, "-o", place)
    done = latentrt(*call)
    assert done.code == 0, done.err
    record = record_of(place)
    assert record.task == "inpainting"
    assert {name: each.digest for name, each in record.inputs.items()} == {
        "image": f"sha256:{hash_bytes(source.read_bytes())}",
        "mask_image": f"sha256:{hash_bytes(mask.read_bytes())}",
    }
    assert (record.inputs["image"].parameters, record.inputs["mask_image"].parameters) == (
        read_metadata(source).parameters,
        None,
    )
    assert latentrt(*call, "--padding-mask-crop", "4", "--overwrite").code == 0
    assert record_of(place).options["padding_mask_crop"] == 4


def test_invalid_combinations_of_image_options_are_refused(
    latentrt: Caller, source: Path, mask: Path, tmp_path: Path
) -> None:
    call = ("run", SAMPLE, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(latentrt(*call, "--mask", mask), 2, "--mask", "without --image")
    assert_refused(latentrt(*call, "--strength", "0.5"), 2, "--strength", "without --image")
    assert_refused(latentrt(*call, "--padding-mask-crop", "4"), 2, "--padding-mask-crop", "without --mask")
    crop = ("--image", source, "--padding-mask-crop", "4")
    assert_refused(latentrt(*call, *crop), 2, "--padding-mask-crop", "without --mask")
    assert_refused(latentrt(*call, "--image", source, "--strength", "0.1"), 2, "--strength: got 0.1", "--steps")
    assert_refused(latentrt(*call, "--image-guidance-scale", "2"), 2, "--image-guidance-scale")
    assert not (tmp_path / "out.png").exists()


def test_an_image_for_a_bundle_that_takes_none(latentrt: Caller, source: Path, mask: Path, tmp_path: Path) -> None:
    bundle = copy_of_sample(tmp_path)
    edit_manifest(bundle, lambda tree: tree.update(tasks=["text-to-image"]))
    call = ("run", bundle, "a star", *QUICK, "-o", tmp_path / "out.png", "--image", source)
    assert_refused(latentrt(*call), 2, "cannot do image-to-image", "text-to-image")
    assert_refused(latentrt(*call, "--mask", mask), 2, "cannot do inpainting")


def test_an_image_that_is_too_large_is_named(latentrt: Caller, tmp_path: Path) -> None:
    Image.new("RGB", (2000, 64)).save(tmp_path / "wide.png")
    call = ("run", SAMPLE, "a star", *QUICK, "-o", tmp_path / "out.png", "--image", tmp_path / "wide.png")
    assert_refused(latentrt(*call), 2, "--image: got 2000 × 64 pixels", "--height")


def test_an_image_that_cannot_be_read(latentrt: Caller, tmp_path: Path) -> None:
    call = ("run", SAMPLE, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(latentrt(*call, "--image", tmp_path / "none.png"), 2, "--image: got", "none.png")
    (tmp_path / "text.png").write_text("no image")
    assert_refused(latentrt(*call, "--image", tmp_path / "text.png"), 2, "--image: got", "text.png")


# Refusals.


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--height", "101"), ("--height: got 101", "100 and 104")),
        (("-H", "101"), ("-H: got 101", "100 and 104")),
        (("--size", "64x101"), ("--size: got 101", "100 and 104")),
        (("--size", "101x64"), ("--size: got 101", "100 and 104")),
        (("--width", "100000"), ("--width: got 100000",)),
        (("--steps", "0"), ("--steps: got 0, expected a whole number",)),
        (("--steps", "1001"), ("--steps: got 1001",)),
        (("--guidance-scale", "nan"), ("--guidance-scale: got nan",)),
        (("--guidance-scale", "1e9"), ("--guidance-scale: got 1000000000.0",)),
        (("--guidance-start", "0.5", "--guidance-end", "0.25"), ("--guidance-start: got 0.5", "--guidance-end 0.25")),
        (("--strength", "7"), ("--strength: got 7.0",)),
        (("--eta", "2"), ("--eta: got 2.0",)),
        (("--clip-skip", "9"), ("--clip-skip: got 9",)),
        (("--deep-cache", "0"), ("--deep-cache: got 0",)),
        (("--decoder", "half"), ("--decoder: got 'half'", "tiled")),
        (("--seed", "9..5"), ("--seed: got an empty range",)),
        (("--seed", "1..99999999999"), ("--seed", "expected at most 1,000,000 seeds")),
        (("--seed", "-2"), ("--seed: got -2",)),
        (("--seed", f"0..{10**30}"), ("--seed", "expected at most 1,000,000 seeds")),
        (("--count", "0"), ("--count: got 0",)),
        (("--count", "1000001"), ("got 1,000,001 images",)),
        (("--batch-size", "33"), ("--batch-size: got 33",)),
        (("--safety", "maybe"), ("--safety: got 'maybe'", "block, blur, report, off")),
        (("--device", "npu"), ("--device: got 'npu'", "openvino")),
        (("--device", "cpu", "--provider", "cpu"), ("--device cpu", "--provider cpu")),
        (("--precision", "float8"), ("--precision: got 'float8'", "float32, bfloat16, int8")),
        (("--device", "cuda", "--precision", "float32"), ("--precision: got float32 with cuda",)),
        (("--sampler", "eular"), ("dpmpp_2m, dpmpp_2m_inverse, dpmpp_2s",)),
        (("--sampler", "heun", "--sampler-option", "solver_order=3"), ("solver_order",)),
        (("--sampler", "heun", "--sampler-option", "count=9"), ("count",)),
        (("--sampler", "flow_euler"), ("flow_euler",)),
        (("--sampler", "repaint"), ("repaint",)),
        (("--sampler", "ddim", "--karras"), ("karras",)),
        (("--sampler-option", "strength=0.5"), ("--sampler-option: got 'strength'", "--strength")),
        (("--digest", "abc"), ("sha256:",)),
    ],
)
def test_a_refusal_spells_options_as_the_command_line_does(
    latentrt: Caller, tmp_path: Path, options: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    done = latentrt("run", SAMPLE, "a star", *options, "-o", tmp_path / "out.png")
    assert_refused(done, 2, *fragments)
    assert done.err.startswith("error: ")
    assert not re.search(r"`\w+`", done.err), "a keyword of Python"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--steps", "many"), "--steps: got 'many', expected a whole number"),
        (("--steps", "2.5"), "--steps: got '2.5', expected a whole number"),
        (("--height", "64px"), "--height: got '64px', expected a whole number"),
        (("-W", "64px"), "-W: got '64px', expected a whole number"),
        (("-Wx",), "-W: got 'x', expected a whole number"),
        (("--size", "64*64"), "--size: got '64*64', expected WIDTHxHEIGHT such as 768x512, or 512 for a square"),
        (("--guidance-scale", "5,5"), "--guidance-scale: got '5,5', expected a number"),
        (("--strength", "half"), "--strength: got 'half'"),
        (("--padding-mask-crop=x",), "--padding-mask-crop: got 'x'"),
        (("--count", "two"), "--count: got 'two'"),
        (("--threads", "0"), "--threads: got '0', expected a whole number of at least 1"),
        (("--seed", "seven"), "--seed: got 'seven', expected a number, a list such as 7,9,11"),
        (("--seed", "7,x"), "--seed: got '7,x'"),
        (("--seed", "7..x"), "--seed: got '7..x'"),
        (("--sampler-option", "solver_order"), "--sampler-option: got 'solver_order', expected NAME=VALUE"),
        (("--log-level", "warn"), "--log-level: got 'warn', expected one of debug, info, warning, error; did you mean"),
        (("--no-such-option",), "got --no-such-option, expected an option of latentrt run; "),
        (("--guidance-scal", "5"), "got --guidance-scal, expected an option of latentrt run; did you mean --guidance-"),
        (
            ("--num-inference-steps", "5"),
            "got --num-inference-steps, expected an option of latentrt run; did you mean --st",
        ),
        (
            ("--negative_prompt", "x"),
            "got --negative_prompt, expected an option of latentrt run; did you mean --neg",
        ),
        (("-z",), "got -z, expected an option of latentrt run; latentrt run --help lists them"),
        (("--steps",), "--steps: got no value, expected a whole number"),
        (("--low-memory=1",), "--low-memory: got a value, expected none"),
        (("-q", "-v"), "got -q and -v, expected one of the two"),
        (("-W", "64", "--size", "64"), "got --size and -W, expected one of the two"),
    ],
)
def test_a_malformed_value_is_one_sentence(
    latentrt: Caller, tmp_path: Path, options: tuple[str, ...], fragment: str
) -> None:
    done = latentrt("run", SAMPLE, "a star", "-o", tmp_path / "out.png", *options)
    assert_refused(done, 2)
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(f"error: {fragment}")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_needed(latentrt: Caller, tmp_path: Path) -> None:
    assert_refused(latentrt("run", SAMPLE, "-o", tmp_path / "out.png"), 2, "PROMPT")


@pytest.mark.parametrize("device", [("--device", "cuda"), ("--provider", "rocm")])
def test_a_device_that_is_not_there_is_named_by_its_option(
    latentrt: Caller, monkeypatch: pytest.MonkeyPatch, device: tuple[str, str]
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    call = ("run", SAMPLE, "a star", "--steps", "2")
    assert_refused(latentrt(*call, *device), 7, f"{device[0]}: got ", device[1], "CPUExecutionProvider")


def test_a_misspelt_sample_is_found(latentrt: Caller) -> None:
    assert_refused(latentrt("run", "sampel", "a star", *QUICK), 4, "sampel does not exist", "did you mean sample?")


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(latentrt: Caller, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    call = ("run", SAMPLE, "a star", "--steps", "900", "-o")
    assert_refused(latentrt(*call, tmp_path / "file" / "out.png"), 8, "out.png")
    assert_refused(latentrt(*call, tmp_path / "out.gif"), 8, ".png")
    long = "a" + "\u3000" * 9_999  # one token
    assert_refused(latentrt("run", SAMPLE, long, "-n", long, *call[3:], tmp_path / "out.jpg"), 8, "65,533")


def test_no_bundle(latentrt: Caller, tmp_path: Path) -> None:
    assert_refused(latentrt("run", tmp_path / "none", "a star"), 4, "does not exist")
    (tmp_path / "model_index.json").write_text("{}")
    assert_refused(latentrt("run", tmp_path, "a star"), 4, "latentrt export")


def test_a_bundle_without_a_classifier_runs_unchecked_only_by_name(
    latentrt: Caller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = copy_of_sample(tmp_path)
    edit_manifest(bundle, lambda tree: tree["components"].pop("safety_checker"))
    call = ("run", bundle, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(latentrt(*call), 6, "--safety-checker PATH", "--safety off")
    assert not (tmp_path / "out.png").exists()
    assert latentrt(*call, "--safety", "off").code == 0
    assert "switched off" in caplog.text
    assert record_of(tmp_path / "out.png").safety.policy == "off"


# Files that a text-to-image run with the full decoder does not read; `latentrt verify` reads them all.
UNREAD = ("vae_encoder/", "preview_decoder/", "LICENSE", "MODEL_CARD.md", "export-report.json")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in Bundle.open(SAMPLE).manifest.files
        if not name.startswith(UNREAD) and not name.startswith("vae_decoder/slice")
    ],
)
def test_a_changed_byte_stops_the_run_before_a_parser_sees_it(latentrt: Caller, tmp_path: Path, name: str) -> None:
    bundle = copy_of_sample(tmp_path)
    change_byte(bundle / name)
    done = latentrt("run", bundle, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert_refused(done, 4, name)
    assert not (tmp_path / "out.png").exists()


def test_a_pinned_digest(latentrt: Caller, tmp_path: Path) -> None:
    digest = Bundle.open(SAMPLE).digest
    pinned = ("--digest", digest, "-o", tmp_path / "out.png")
    assert latentrt("run", SAMPLE, "a star", *QUICK, *pinned).code == 0
    bundle = copy_of_sample(tmp_path)
    edit_manifest(bundle, lambda tree: tree["defaults"].update(guidance_scale=1.0))
    assert_refused(latentrt("run", bundle, "a star", *QUICK, *pinned), 4, digest)


def test_a_bundle_in_a_hub_cache_runs_through_its_links(latentrt: Caller, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for number, source in enumerate(path for path in sorted(SAMPLE.rglob("*")) if path.is_file()):
        blob = repository / "blobs" / str(number)
        shutil.copyfile(source, blob)
        link = snapshot / source.relative_to(SAMPLE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(source.relative_to(SAMPLE).parts) + 1)) / "blobs" / blob.name)
    done = latentrt("run", snapshot, "a star", *QUICK, "-o", tmp_path / "out.png")
    assert done.code == 0, done.err


def test_a_traceback_only_with_debug(latentrt: Caller, tmp_path: Path) -> None:
    call = ("run", SAMPLE, "a star", "--height", "101", "-o", tmp_path / "out.png")
    assert "Traceback" not in latentrt(*call).err
    for arguments in (("--debug", *call), (*call, "--debug")):
        failed = latentrt(*arguments)
        assert "Traceback" in failed.err
        assert failed.code == 2, "as without it"


def test_ctrl_c_ends_a_run_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from latentrt.cli.main import main; main()", "run", str(SAMPLE), "a star"]
    command += ["--steps", "900", "--sampler", "euler", "-o", str(tmp_path / "out.png")]
    command += ["--height", "512", "--width", "512"]  # too much work for any machine to finish first
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(5)  # in the middle of the steps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_backend_or_the_bundle_lacks(latentrt: Caller, tmp_path: Path) -> None:
    call = ("run", SAMPLE, "a star", "-o", tmp_path / "out.png")
    refused = latentrt(*call, "--device", "cpu", "--precision", "bfloat16")
    assert_refused(refused, 7, "--precision: got bfloat16", "--device openvino")
    assert_refused(latentrt(*call, "--precision", "int8"), 7, "--precision: got int8 for a bundle of float16")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.openvino
def test_backends_of_a_cpu_agree(latentrt: Caller, tmp_path: Path) -> None:
    images = []
    for device in ("cpu", "openvino"):
        place = tmp_path / f"{device}.png"
        call = ("run", SAMPLE, "a star", "--steps", "4", "--seed", "7", "--device", device, "-o", place)
        done = latentrt(*call, "--guidance-end", "0.5", "--deep-cache", "2", "--decoder", "preview", "--low-memory")
        assert done.code == 0, done.err
        images.append(np.asarray(Image.open(place)).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 2  # sums in another order, then rounding


@pytest.mark.parametrize("seeds", ["0..1000000000000000000000000000000", "-5..99999999"])
def test_a_range_of_seeds_beyond_the_memory(latentrt: Caller, seeds: str) -> None:
    assert_refused(latentrt("run", SAMPLE, "a star", "--seed", seeds), 2, "expected at most 1,000,000 seeds")


def test_an_image_that_was_saved_is_no_error_wherever_the_report_goes(
    latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stream, text: str) -> int:
        raise OutputError("standard output cannot be written: No space left on device")

    monkeypatch.setattr(Stream, "write", fail)
    assert latentrt("run", SAMPLE, "a star", *QUICK, "-o", tmp_path / "out.png").code == 0
    assert record_of(tmp_path / "out.png").prompt == "a star"
