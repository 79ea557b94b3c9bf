"""`latentrt run` with many images: requests of files and pipes, names, existing files, interruptions."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentrt import Bundle, Pipeline, Result
from latentrt.bundle.sample import bundle_path
from latentrt.cli import run as command
from latentrt.cli.output import Stream
from latentrt.cli.run import RunDocument
from latentrt.errors import BackendError, OutputError
from latentrt.images import files
from latentrt.images.metadata import ImageRecord, read_metadata
from latentrt.resolve import ResolvedRequest
from tests.runtime.cli.conftest import Caller
from tests.runtime.cli.test_run import assert_refused

QUICK = ("--steps", "1", "--sampler", "euler", "--device", "cpu", "--threads", "1")
MAIN = (sys.executable, "-c", "from latentrt.cli.main import main; main()")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Generate grey images in no time; the list gets the seeds of each batch."""
    batches: list[tuple[int, ...]] = []

    class Step:
        total, index = 2, 0

    finish = Pipeline.finish

    def finish_grey(self: Pipeline, request: ResolvedRequest, latents: Any) -> Result:
        batches.append(request.seeds)
        shape = (len(request.seeds), *self.family.latent_space.shape(request.height, request.width))
        result = finish(self, request, np.zeros(shape, np.float32), "latent")
        return replace(result, images=[Image.new("RGB", (request.width, request.height)) for _ in request.seeds])

    monkeypatch.setattr(Pipeline, "steps", lambda self, request: iter([Step, Step]))
    monkeypatch.setattr(Pipeline, "finish", finish_grey)
    return batches


def names() -> list[str]:
    """Return the paths of all files below the current folder."""
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


def record_of(name: str) -> ImageRecord:
    record = read_metadata(name).record
    assert record is not None
    return record


def lines_of(*requests: Any) -> str:
    Path("requests.jsonl").write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    return "requests.jsonl"


# Requests.


def test_images_of_a_file_are_those_that_their_requests_give_alone(latentrt: Caller) -> None:
    """Prompts of several lengths in one batch, to the bit."""
    prompts = ["a red circle on a blue background", "a star", "a circle " * 50]
    Path("prompts.txt").write_text("# shapes\n\n" + "\n".join(prompts))
    done = latentrt("run", "sample", "--prompts", "prompts.txt", *QUICK, "--seed", "7", "-o", "{seed}.png")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"{seed}.png: seed {seed}, euler, 1 step, safety block: clear" for seed in (7, 8, 9)
    ]
    for seed, prompt in enumerate(prompts, 7):
        assert record_of(f"{seed}.png").prompt == prompt.strip()
        assert (
            latentrt("run", "sample", prompt.strip(), *QUICK, "--seed", seed, "-o", "alone.png", "--overwrite").code
            == 0
        )
        with Image.open(f"{seed}.png") as one, Image.open("alone.png") as other:
            assert np.array_equal(np.asarray(one), np.asarray(other)), prompt


def test_lines_of_json_have_any_option_and_a_name(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    path = lines_of(
        {"prompt": "a star", "seed": 3, "output": "stars/{seed}.webp"},
        {"prompt": ["a circle", "a heart"], "num_images_per_prompt": 2, "seed": 10, "width": 96},
        {
            "negative_prompt": "blue",
            "prompt": "a cross",
            "seed": [1, 2],
            "num_images_per_prompt": 2,
            "output": "x/c.png",
        },
        {"prompt": "a square", "num_inference_steps": 3, "guidance_scale": 1},
    )
    done = latentrt("run", "sample", "--prompts", path, *QUICK, "-n", "grey", "--seed", "50", "-o", "{index}.png")
    assert done.code == 0, done.err
    expected = {
        "stars/3.webp": ("a star", 3, "grey"),
        **{f"{1 + place}.png": (["a circle", "a heart"][place // 2], 10 + place, "grey") for place in range(4)},
        "x/c-5.png": ("a cross", 1, "blue"),
        "x/c-6.png": ("a cross", 2, "blue"),
        "7.png": ("a square", 57, None),
    }
    assert names() == sorted([*expected, path])
    for name, (prompt, seed, negative) in expected.items():
        record = record_of(name)
        assert (record.prompt, record.seed, record.negative_prompt) == (prompt, seed, negative)
    assert record_of("1.png").options["width"] == 96
    assert record_of("7.png").options["num_inference_steps"] == 3


def test_seeds_and_counts(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    Path("p.txt").write_text("a\nb\n")
    call = ("run", "sample", "--prompts", "p.txt", *QUICK, "-o", "{index}.png", "--overwrite")
    assert latentrt(*call, "--seed", "5..10").code == 0
    assert [(record_of(f"{index}.png").prompt, record_of(f"{index}.png").seed) for index in range(6)] == [
        *(("a", 5 + index) for index in range(3)),
        *(("b", 8 + index) for index in range(3)),
    ]
    assert latentrt(*call, "--seed", "3", "--count", "40").code == 0
    assert [record_of(f"{index}.png").seed for index in range(80)] == [3 + index for index in range(80)]
    assert latentrt(*call, "--seed", "3,-1").code == 0
    assert record_of("0.png").seed == 3
    assert_refused(latentrt(*call, "--seed", "1..3"), 2, "--seed: got 3 seeds for 2 prompts")
    assert_refused(latentrt(*call, "--seed", "1..3", "--count", "2"), 2, "--seed: got 3 seeds for 4 images")
    assert_refused(latentrt(*call, "--seed", "-5..3"), 2, "--seed: got -5..3")
    assert_refused(latentrt(*call, "--count", "0"), 2, "--count: got 0")
    assert_refused(latentrt(*call, "--count", "600000"), 2, "got 1,200,000 images, expected at most 1,000,000")
    assert_refused(latentrt(*call, "--batch-size", "99"), 2, "--batch-size: got 99")
    assert_refused(latentrt(*call, "a prompt too"), 2, "PROMPT", "--prompts")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ({"prompt": "a", "height": 101}, ("line 2: height: got 101",)),
        ({"prompt": "a", "sampler": "eular"}, ("line 2: ", "dpmpp_2m")),
        ({"prompt": "a", "seed": "seven"}, ("line 2: seed: got 'seven'",)),
        ({"prompt": "a", "seed": [1, 2]}, ("line 2: seed: got 2 seeds for 1 image",)),
        ({"prompt": "a", "num_images_per_prompt": 0}, ("line 2: num_images_per_prompt: got 0",)),
        ({"prompt": []}, ("line 2: prompt: got an empty list",)),
        ({"prompt": 7}, ("line 2: prompt: got int",)),
        ({"prompt": "a" * 10_001}, ("line 2: prompt: got a text of 10,001 characters",)),
        ({"prompt": "a", "image": "none.png"}, ("line 2: image: got", "none.png")),
        ({"prompt": "a", "strength": 0.5}, ("line 2: strength: got 0.5",)),
        ({"prompt": "a", "output": "../a.png"}, ("line 2: output: got '../a.png'",)),
        ({"prompt": "a", "output": "{nothing}.png"}, ("line 2: output: got '{nothing}.png'", "{index}, {seed}")),
        ({"prompt": "a", "promt": "b"}, ("line 2: ", "promt", "(or 'output', the name of its file)")),
        ({"seed": 1}, ("line 2: ", "got none, expected a text")),
    ],
)
def test_an_impossible_line_is_named_before_the_work(
    latentrt: Caller, drawn: list[tuple[int, ...]], line: Any, fragments: tuple[str, ...]
) -> None:
    """Its own fields are spelled as in the file, those of the command line as typed there."""
    path = lines_of({"prompt": "first"}, line, {"prompt": "last"})
    assert_refused(latentrt("run", "sample", "--prompts", path, *QUICK, "-o", "{index}.png"), 2, path, *fragments)
    assert drawn == []
    assert names() == [path]


def test_an_option_of_the_command_line_keeps_its_name_beside_lines(latentrt: Caller) -> None:
    path = lines_of({"prompt": "first"})
    refused = latentrt("run", "sample", "--prompts", path, *QUICK, "-H", "101")
    assert_refused(refused, 2, f"{path}, line 1: -H: got 101")


@pytest.mark.parametrize("option", ["prompt", "negative_prompt"])
def test_a_prompt_of_too_many_tokens_is_named_before_the_work(
    latentrt: Caller, drawn: list[tuple[int, ...]], option: str
) -> None:
    path = lines_of({"prompt": "a star"}, {"prompt": "a star", option: "🦊 " * 2000}, {"prompt": "a heart"})
    done = latentrt("run", "sample", "--prompts", path, *QUICK, "-o", "{index}.png")
    assert_refused(done, 2, f"{path}, line 2: {option}: got", "tokens")
    assert drawn == []


def test_files_that_hold_no_requests(latentrt: Caller) -> None:
    Path("empty.txt").write_text("# nothing\n\n")
    assert_refused(latentrt("run", "sample", "--prompts", "empty.txt"), 2, "--prompts: got a file without requests")
    assert_refused(latentrt("run", "sample", "--prompts", "none.txt"), 2, "--prompts: got 'none.txt'")


def test_a_file_of_too_many_requests_is_read_no_further(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.cli.run.MAX_IMAGES", 3)
    Path("prompts.txt").write_bytes(b"a\n" * 4 + b"\xff\n")  # reading the fifth would fail
    done = latentrt("run", "sample", "--prompts", "prompts.txt", *QUICK)
    assert_refused(done, 2, "got more than 3 images, expected at most 3 in one run; split it")


class Pipe(io.BytesIO):
    """Standard input that cannot be read twice."""

    def seekable(self) -> bool:
        return False


def give_pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(text.encode())))


def test_a_pipe(latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines before an impossible one are generated; the names of existing files are found on the way."""
    give_pipe(monkeypatch, '{"prompt": "a star"}\n{"prompt": "a heart"}\n{"prompt": "x", "height": 101}\n')
    call = ("run", "sample", "--prompts", "-", *QUICK)
    done = latentrt(*call, "--seed", "4")
    assert done.code == 2
    assert "standard input, line 3: height: got 101" in done.err
    assert "2 images done" in done.err
    assert "--skip-existing" in done.err
    assert "--seed" not in done.err, "it is in the command already"
    assert names() == ["out-0.png", "out-1.png"]
    give_pipe(monkeypatch, "a star\na heart\na cross\n")
    done = latentrt(*call, "--seed", "4", "--skip-existing", "-o", "out.png")
    assert done.code == 0, done.err
    assert done.out.startswith("out-2.png: seed 6,")
    assert "1 image in" in done.err
    assert "2 files kept" in done.err
    give_pipe(monkeypatch, "a\nb\n")
    done = latentrt(*call, "-o", "same-{prompt}.png", "--batch-size", "1")
    assert done.code == 0, done.err
    give_pipe(monkeypatch, "c\na\n")
    done = latentrt(*call, "-o", "same-{prompt}.png", "--batch-size", "1")
    assert done.code == 8
    assert "same-c.png" in names()
    give_pipe(monkeypatch, "a\n")
    assert_refused(latentrt(*call, "--seed", "1..3"), 2, "--seed: got several for a pipe")


def test_a_pipe_without_end_is_worked_off_as_it_comes(tmp_path: Path) -> None:
    """In a process of its own, whose reader goes away."""
    arguments = ["run", "sample", "--prompts", "-", *QUICK, "-o", "{index}.png", "--batch-size", "2"]
    process = subprocess.Popen([*MAIN, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(2):
        print("a star", file=process.stdin, flush=True)
    assert process.stdout.readline().startswith("0.png: ")
    assert process.stdout.readline().startswith("1.png: ")
    assert {"0.png", "1.png"} <= {*names()}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


# Names.


def test_names_by_fields(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    template = "{date}/{sampler}-{steps}/{width}x{height}-{guidance_scale:.1f}/{index:03}-{seed}-{prompt}.jpg"
    call = ("run", "sample", "a star, blue", "CON", *QUICK, "--seed", "7,9", "--size", "96x64")
    assert latentrt(*call, "-o", template).code == 0
    folder = f"{date.today().isoformat()}/euler-1/96x64-5.0"
    assert names() == [f"{folder}/000-7-a-star,-blue.jpg", f"{folder}/001-9-CON.jpg"]


def test_several_images_without_a_field_that_tells_them_apart_get_a_number(
    latentrt: Caller, drawn: list[tuple[int, ...]]
) -> None:
    call = ("run", "sample", "a star", *QUICK, "--seed", "1..2")
    assert latentrt(*call, "-o", "a.b.png").code == 0
    assert latentrt(*call, "-o", "{sampler}/x.webp").code == 0
    assert latentrt(*call, "-o", "{steps}", "--format", "jpeg").code == 0
    assert names() == sorted([*("1-0", "1-1"), "a.b-0.png", "a.b-1.png", "euler/x-0.webp", "euler/x-1.webp"])
    with Image.open("1-0") as image:
        assert image.format == "JPEG"


def test_a_folder(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    call = ("run", "sample", "a star", *QUICK, "--seed", "7..8", "-o")
    assert latentrt(*call, "new/").code == 0
    os.mkdir("a{b}")
    assert latentrt(*call, "a{b}", "--format", "webp").code == 0
    path = lines_of({"prompt": "x", "output": "y/{seed}.png"})
    assert latentrt("run", "sample", "--prompts", path, *QUICK, "--seed", "1", "-o", "new/").code == 0
    assert names() == [
        *(f"a{{b}}/0000{index}-{7 + index}.webp" for index in range(2)),
        *(f"new/0000{index}-{7 + index}.png" for index in range(2)),
        "new/y/1.png",
        path,
    ]


@pytest.mark.parametrize(
    ("output", "code", "fragments"),
    [
        ("{nothing}.png", 2, ("--output", "{index}, {seed}, {prompt}, {sampler}, {steps}")),
        ("{seed", 2, ("--output",)),
        ("{seed:q}.png", 2, ("--output",)),
        ("missing/out.png", 8, ("mkdir",)),
        ("{seed}", 8, (".png",)),
        ("out.gif", 8, (".png",)),
        ("", 8, ("--output: got an empty name",)),
        ("x" * 300 + "{seed}.png", 8, ("shorter",)),
        ("file/{seed}.png", 8, ("file/",)),
        ("file/{sampler}/{seed}.png", 8, ("file/",)),
    ],
)
def test_an_impossible_name_is_refused_before_the_work(
    latentrt: Caller, drawn: list[tuple[int, ...]], output: str, code: int, fragments: tuple[str, ...]
) -> None:
    Path("file").touch()
    assert_refused(latentrt("run", "sample", "a star", *QUICK, "--seed", "1..2", "--output", output), code, *fragments)
    assert drawn == []
    assert names() == ["file"]


def test_the_format_agrees_with_the_extension(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    call = ("run", "sample", "a star", *QUICK)
    assert_refused(latentrt(*call, "-o", "a.png", "--format", "jpeg"), 8, "--format: got jpeg", ".png")
    assert_refused(latentrt(*call, "-o", "a", "--format", "gif"), 2, "--format: got 'gif'")
    assert latentrt(*call, "-o", "a.jpg", "--format", "jpeg").code == 0
    assert latentrt(*call, "-o", "a", "--format", "webp").code == 0
    assert latentrt(*call, "--format", "webp").code == 0
    assert names() == ["a", "a.jpg", "out.webp"]
    with Image.open("a") as image:
        assert image.format == "WEBP"


def test_names_that_collide_are_refused_before_the_work(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    """Also where a file system takes upper and lower case for the same."""
    call = ("run", "sample", *QUICK, "-o")
    assert_refused(
        latentrt(*call, "{seed}.png", "a star", "a heart", "--seed", "7,7"), 8, "7.png", "images 0 and 1", "{index}"
    )
    assert_refused(latentrt(*call, "{prompt}.png", "a star", "a heart", "A STAR"), 8, "images 0 and 2")
    path = lines_of(*({"prompt": "x", "output": f"{name}.png"} for name in ("a", "b", "c", "b")))
    assert_refused(latentrt("run", "sample", "--prompts", path, *QUICK), 8, "b.png", "images 1 and 3")
    path = lines_of(*({"prompt": "x", "output": name} for name in ("c/a.png", "c/A.png/b.png")))
    assert_refused(latentrt("run", "sample", "--prompts", path, *QUICK), 8, "c/A.png for an image and c/A.png/b.png")
    assert drawn == []


# Existing files.


def test_a_file_that_is_there_is_refused_replaced_or_kept(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    call = ("run", "sample", "a star", *QUICK, "--seed", "1..5", "-o", "{seed}.png")
    Path("3.png").write_bytes(b"mine")
    assert_refused(latentrt(*call), 8, "3.png exists", "--overwrite", "--skip-existing")
    assert names() == ["3.png"]
    assert drawn == []
    kept = latentrt(*call, "--skip-existing")
    assert kept.code == 0, kept.err
    assert [line.split(":")[0] for line in kept.out.splitlines()] == ["1.png", "2.png", "4.png", "5.png"]
    assert "4 images in" in kept.err
    assert "1 file kept" in kept.err
    assert Path("3.png").read_bytes() == b"mine"
    assert [seed for batch in drawn for seed in batch] == [1, 2, 4, 5]
    assert latentrt(*call, "--overwrite").code == 0
    assert record_of("3.png").seed == 3
    assert_refused(latentrt(*call, "--overwrite", "--skip-existing"), 2, "--overwrite", "--skip-existing")


def test_nothing_is_loaded_where_every_file_is_there(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("run", "sample", "a star", *QUICK, "--seed", "1..40", "-o", "{seed}.png", "--skip-existing")
    assert latentrt(*call).code == 0
    drawn.clear()

    def fail(*arguments: Any) -> Any:
        raise AssertionError("a session was opened")

    monkeypatch.setattr("latentrt.backends.models.Components.session", fail)
    done = latentrt(*call)
    assert done.code == 0, done.err
    assert done.out == ""
    assert done.err.startswith("0 images in ")
    assert "40 files kept" in done.err
    assert drawn == []


def test_skipping_needs_names_that_are_known(latentrt: Caller) -> None:
    call = ("run", "sample", "a star", *QUICK, "--skip-existing")
    assert_refused(latentrt(*call, "-o", "{seed}.png"), 2, "--skip-existing", "--seed")
    path = lines_of({"prompt": "a", "seed": 1}, {"prompt": "a", "seed": -1}, {"prompt": "a"})
    lines = ("run", "sample", "--prompts", path, *QUICK, "--skip-existing", "-o", "{seed}.png")
    assert_refused(latentrt(*lines), 2, f"{path}, line 2: --skip-existing", "give seed")
    assert latentrt(*lines, "--seed", "7").code == 0
    assert names() == ["1.png", "8.png", "9.png", path]
    assert latentrt(*lines, "--seed", "7").err.endswith("3 files kept\n")


def test_lines_with_seeds_of_their_own_are_resumed(latentrt: Caller) -> None:
    path = lines_of(*({"prompt": "a star", "seed": seed} for seed in (3, 4)), {"prompt": "b", "output": "b.png"})
    call = ("run", "sample", "--prompts", path, *QUICK, "-o", "new/", "--skip-existing")
    Path("new").mkdir()
    assert latentrt(*call).code == 0
    assert names() == ["new/00000-3.png", "new/00001-4.png", "new/b.png", path]
    assert latentrt(*call).err.startswith("0 images")


def test_a_random_seed_among_others_is_that_of_the_command(latentrt: Caller) -> None:
    """So the hint of an interrupted run, `--seed N`, gives the same images."""
    path = lines_of({"prompt": "a", "num_images_per_prompt": 2, "seed": [5, -1]})
    assert latentrt("run", "sample", "--prompts", path, *QUICK, "-o", "{seed}.png", "--seed", "7").code == 0
    assert names() == ["5.png", "8.png", path]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sampler", "DPM++ 2M Karras"), "dpmpp_2m_karras.png"),
        (("--sampler", "dpmpp_2m", "--karras"), "dpmpp_2m_karras.png"),
        (("--sampler", "dpmpp_2m_karras", "--no-karras"), "dpmpp_2m.png"),
        (("--sampler", "euler", "--sampler-option", "use_beta_sigmas=true"), "euler_beta.png"),
    ],
)
def test_a_sampler_s_name_has_the_spacing_of_its_sigmas(
    latentrt: Caller, drawn: list[tuple[int, ...]], options: tuple[str, ...], expected: str
) -> None:
    assert latentrt("run", "sample", "a star", "--steps", "3", *options, "-o", "{sampler}.png").code == 0
    assert names() == [expected]


def test_the_default_name_is_the_next_that_is_free(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    call = ("run", "sample", "a star", *QUICK)
    for _ in range(3):
        assert latentrt(*call).code == 0
    assert names() == ["out-1.png", "out-2.png", "out.png"]
    assert latentrt(*call, "--count", "2").code == 0
    assert latentrt(*call, "--count", "2").code == 0
    series = [f"out-{series}-{index}.png" for series in (1, 2) for index in range(2)]
    assert names() == sorted(["out.png", "out-1.png", "out-2.png", *series])
    assert latentrt(*call, "--overwrite").code == 0
    assert len(names()) == 7


def test_a_file_that_appears_during_the_run_is_not_replaced(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Pipeline.finish

    def appear(self: Pipeline, request: ResolvedRequest, latents: Any) -> Result:
        Path("2.png").write_bytes(b"mine")
        return finish(self, request, latents)

    monkeypatch.setattr(Pipeline, "finish", appear)
    call = ("run", "sample", "a star", *QUICK, "--seed", "1..3", "-o", "{seed}.png")
    done = latentrt(*call)
    assert done.code == 8
    assert "1 of 3 images done" in done.err
    Path("2.png").unlink()
    assert latentrt(*call, "--skip-existing").code == 0
    assert Path("2.png").read_bytes() == b"mine"


# Standard output and JSON.


def test_the_bytes_of_an_image_on_standard_output() -> None:
    for name, expected in ((None, "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")):
        more = [] if name is None else ["--format", name]
        arguments = ["run", "sample", "a star", *QUICK, "--seed", "7", "-o", "-", *more]
        done = subprocess.run([*MAIN, *arguments], capture_output=True, check=True)
        with Image.open(io.BytesIO(done.stdout)) as image:
            image.load()
            assert image.format == expected
            assert files.read_texts(image).keys() == {"parameters", "latentrt"}
        assert b"standard output: seed 7, euler, 1 step" in done.stderr
    assert names() == []


def test_standard_output_takes_one_image(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("run", "sample", "a star", *QUICK, "-o", "-")
    assert_refused(latentrt(*call, "--count", "2"), 2, "-o: got - for 2 images")
    assert_refused(latentrt(*call, "--json"), 2, "-o", "--json")
    give_pipe(monkeypatch, "a\nb\n")
    assert_refused(latentrt("run", "sample", "--prompts", "-", *QUICK, "-o", "-"), 2, "-o: got - for several images")
    monkeypatch.setattr(command, "is_terminal", lambda **options: True)
    assert_refused(latentrt(*call), 8, "-o: got -", "terminal")
    assert drawn == []


def test_one_document_of_json(latentrt: Caller, drawn: list[tuple[int, ...]]) -> None:
    call = ("run", "sample", "a “star”\n\x1b", "b", *QUICK, "--seed", "3", "-o", "{seed}.png", "--json")
    done = latentrt(*call)
    report = msgspec.json.decode(done.out, type=RunDocument)
    assert done.out.isascii()
    assert report.digest == Bundle.open(bundle_path()).digest
    assert [(each.path, each.seed, each.prompt, each.index) for each in report.images] == [
        ("3.png", 3, "a “star”\n\x1b", 0),
        ("4.png", 4, "b", 1),
    ]
    first = report.images[0]
    assert (first.width, first.height, first.sampler, first.steps, first.guidance_scale) == (64, 64, "euler", 1, 5)
    assert first.timings.keys() >= {"total_s", "sampling_s"}
    assert (report.totals.done, report.totals.skipped, report.totals.total, report.totals.stopped) == (2, 0, 2, None)
    report = msgspec.json.decode(latentrt(*call, "--skip-existing").out, type=RunDocument)
    assert (report.images, report.totals.skipped) == ([], 2)
    assert_refused(latentrt(*call), 8, "3.png exists")


def test_a_failure_keeps_what_is_done_and_its_exit_code(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Pipeline.finish

    def fail(self: Pipeline, request: ResolvedRequest, latents: Any) -> Result:
        if 4 in request.seeds:
            raise BackendError("it broke")
        return finish(self, request, latents)

    monkeypatch.setattr(Pipeline, "finish", fail)
    call = ("run", "sample", "a star", *QUICK, "--seed", "1..9", "-o", "{seed}.png")
    done = latentrt(*call)
    assert done.code == 7
    assert names() == ["1.png", "2.png", "3.png"]
    assert done.err.splitlines()[-2:] == [
        "3 of 9 images done; for the others, give the same command with --skip-existing",
        "error: it broke",
    ]
    done = latentrt(*call, "--skip-existing", "--json")
    report = msgspec.json.decode(done.out, type=RunDocument)
    assert (report.totals.done, report.totals.skipped, report.totals.total) == (0, 3, 9)
    assert report.totals.stopped == "it broke"


def test_a_full_disk_keeps_what_is_done(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, left = os.fsync, iter([True] * 5)

    def fail(descriptor: int) -> None:
        if not next(left, False):
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    done = latentrt("run", "sample", "a star", *QUICK, "--seed", "1..9", "-o", "{seed}.png")
    assert done.code == 8
    assert "6.png cannot be written" in done.err
    assert "5 of 9 images done" in done.err
    assert names() == [f"{seed}.png" for seed in range(1, 6)]


def test_a_report_that_cannot_be_written_ends_nothing(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stream, text: str) -> int:
        if self._err:
            return len(text)
        raise OutputError("standard output cannot be written: No space left on device")

    monkeypatch.setattr(Stream, "write", fail)
    assert latentrt("run", "sample", "a star", *QUICK, "--seed", "1..9", "-o", "{seed}.png").code == 0
    assert len(names()) == 9
    # The document, though, is the result that was asked for.
    done = latentrt("run", "sample", "a star", *QUICK, "--seed", "10..18", "-o", "{seed}.png", "--json")
    assert done.code == OutputError.exit_code
    assert len(names()) == 18


# Interruptions.


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MAIN, "run", "sample", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_done_and_is_resumed(latentrt: Caller, number: int, code: int) -> None:
    """As the printed line says, with the random seed of the first run."""
    process = start("a red circle", *QUICK, "--steps", "6", "--count", "60", "--batch-size", "2")
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline().startswith("out-")
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    found = re.search(r"(\d+) of 60 images done; .* with --seed (\d+) -o \"(out-{index}.png)\" --skip-existing", err)
    assert found is not None, err
    finished = names()
    assert len(finished) == int(found[1])
    assert 4 <= len(finished) < 60
    seed = int(found[2])
    before = {name: Path(name).stat().st_mtime_ns for name in finished}
    for name in finished:
        with Image.open(name) as image:
            image.load()
    arguments = ("run", "sample", "a red circle", *QUICK[2:], "--steps", "6", "--count", len(finished) + 2)
    done = latentrt(*arguments, "--seed", seed, "-o", found[3], "--skip-existing")
    assert done.code == 0, done.err
    assert len(names()) == len(finished) + 2
    assert {name: Path(name).stat().st_mtime_ns for name in finished} == before
    assert [record_of(f"out-{index}.png").seed for index in range(len(names()))] == list(
        range(seed, seed + len(names()))
    )


def test_json_is_printed_after_an_interruption(tmp_path: Path) -> None:
    process = start("a star", *QUICK, "--steps", "6", "--count", "60", "--batch-size", "2", "--json", "-o", "x/")
    assert process.stdout is not None
    head = "".join(process.stdout.readline() for _ in range(16))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    report = msgspec.json.decode(head + out, type=RunDocument)
    assert len(report.images) == report.totals.done == len(names())
    assert report.totals.stopped == "interrupted"
    assert err.splitlines()[-1] == "interrupted"


# Numbers.


def test_two_hundred_images(latentrt: Caller) -> None:
    """Each as its seed gives it alone; a few are compared."""
    call = ("run", "sample", "a green star left of a blue square", *QUICK)
    done = latentrt(*call, "--seed", "1..200", "-o", "many/{seed:03}.png")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == len(names()) == 200
    for seed in (1, 77, 200):
        assert latentrt(*call, "--seed", seed, "-o", "alone.png", "--overwrite").code == 0
        with Image.open(f"many/{seed:03}.png") as one, Image.open("alone.png") as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))


def peak_of(call: Iterator[Any]) -> int:
    tracemalloc.start()
    try:
        for _ in call:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_images(
    latentrt: Caller, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is 12 KiB of pixels; what stays of it is the hash of its name, and what this test notes."""
    monkeypatch.setattr(files, "save", lambda *arguments: None)

    def work(count: int) -> Iterator[None]:
        Path("p.txt").write_text("".join(f"prompt {number}\n" for number in range(count)))
        done = latentrt("run", "sample", "--prompts", "p.txt", *QUICK, "-q", "-o", "{prompt}-{seed}.png", "--seed", "1")
        yield
        assert done.code == 0, done.err

    peak_of(work(64))  # imports
    few, many = peak_of(work(100)), min(peak_of(work(600)) for _ in range(2))  # the collector runs when it likes
    assert sum(map(len, drawn)) == 1364
    assert many - few < 500 * 1024, (few, many)
