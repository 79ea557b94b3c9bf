"""Files of prompts: lines that are no request, ask for too much, or name files elsewhere.

A case is a file, which `latentrt run --prompts` reads. It either generates images in its own folder, or ends with an
error of ours before the first.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentrt.batch.request_lines import MAX_LINE_BYTES
from latentrt.errors import LatentRTError
from latentrt.request import OPTIONS
from tests.attack.command_line import find_error

__all__ = ["Case", "cases", "run"]

_CHEAP = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 1}
_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 1.5, 10**7, 2**63, 2**64, 10**30, -1e308, 1e308, float("inf"), float("nan"), True, None),
    *("", "x", "\0", "\x1b]0;x\x07", "\u202e", "a" * 10_000, "/etc/passwd", "../x.png"),
    *([], [None], ["x"], [[1]], [1e308] * 1000, {}, {"x": []}, {"x": {"y": 1}}),
)


@dataclass(frozen=True)
class Case:
    """A file of prompts.

    Attributes:
        make: makes the content when the case runs: some are large.
        name: of the file, whose extension says what it holds.
        options: of the command.
    """

    make: Callable[[], bytes]
    name: str = "prompts.jsonl"
    options: tuple[str, ...] = ()


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case."""
    for name, data in _raw().items():
        for file in ("prompts.jsonl", "prompts.txt"):
            yield f"{name} in {file}", Case(partial(bytes, data), file)
    for keyword in (*OPTIONS, "output", "", "\x1b[2J", "a" * 999):
        for index, value in enumerate(_VALUES):
            yield f"{keyword[:30]}, value {index}", Case(partial(_lines, [{"prompt": "a", keyword: value}]))
    for index, output in enumerate(_outputs()):
        yield f"output {index}", Case(partial(_lines, [{"prompt": "a", "output": output}]))
        # No argument has NUL; a user may choose another folder, and standard output.
        if "\0" not in output and output != "-" and not output.startswith(("..", "/", "a/../..")):
            yield f"template {index}", Case(partial(_lines, [{"prompt": "a"}]), options=("-o", output))
    for index, prompt in enumerate(_prompts()):
        line = {"prompt": prompt, "output": "{sampler}/{prompt}.png"}
        yield f"prompt {index} in a name", Case(partial(_lines, [line]))
    for name, lines in _many().items():
        yield name, Case(partial(_lines, lines))


def run(case: Case, folder: Path) -> LatentRTError | None:
    """Generate the images of a file.

    Raises:
        AssertionError: a file was written outside the folder, or an image despite an error.
    """
    shutil.rmtree(folder / "inside", ignore_errors=True)
    work = folder / "inside" / "work"
    work.mkdir(parents=True)
    prompts = folder / "inside" / case.name
    prompts.write_bytes(case.make())
    flags = ("--steps", "1", "--size", "64", "--seed", "1", "--format", "png", "--batch-size", "4")
    with contextlib.chdir(work):
        error = find_error("run", "sample", "--prompts", str(prompts), "--safety", "off", *flags, *case.options)
    assert [*folder.iterdir()] == [folder / "inside"], "something outside the folder"
    assert {*(folder / "inside").iterdir()} == {work, prompts}, "something beside the folder"
    written = [each for each in work.rglob("*") if not each.is_dir()]
    assert not (error and written), f"{len(written)} files despite {error}"
    assert error or written, "neither a file nor an error"
    return error


def _lines(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(_CHEAP | each).encode() + b"\n" for each in lines)


def _raw() -> dict[str, bytes]:
    """Return files that hold no requests, or cost a reader much."""
    line = b'{"prompt": "a", "num_inference_steps": 1, "width": 64, "height": 64}'
    return {
        "empty": b"",
        "blank lines": b" \n\r\n\t\n" * 100_000,
        "comments": b"# a\n" * 300_000,
        "a mark of byte order": b"\xef\xbb\xbf" + line,
        "two marks": b"\xef\xbb\xbf" * 2 + line,
        "UTF-16": line.decode().encode("utf-16"),
        "not UTF-8": b'{"prompt": "\xff"}',
        "half a character at the end": b"a \xe2\x98",
        "NULs": bytes(1000),
        "a carriage return in a line": b"a\rb\n",
        "a line separator": "a\u2028b\n".encode(),
        "one byte too many": b"a" * (MAX_LINE_BYTES + 1),
        "100 MB in a line": b"a" * 100_000_000,
        "spaces of 100 MB": b" " * 100_000_000,
        "a list": b"[" + line + b"]",
        "a number": b"1",
        "a text": b'"a red circle"',
        "an object over two lines": b'{"prompt":\n"a"}',
        "two objects in a line": line + line,
        "half an object": line[: len(line) // 2],
        "a key twice": b'{"prompt": "a", "prompt": "b"}',
        "nested lists": b'{"prompt": ' + b"[" * 500_000,
        "nested and closed": b'{"sampler_options": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        "200,000 empty prompts": b'{"prompt": [' + b'"",' * 200_000 + b'""]}',
        "60,000 keys": b"{" + b"".join(b'"k%06x":1,' % index for index in range(60_000)) + b'"a":1}',
        "a seed of a million digits": b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
        "a seed of 1e999": b'{"prompt": "a", "seed": 1e999}',
        "half a surrogate pair": b'{"prompt": "\\ud800"}',
        "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "too many prompts": b"a\n" * 1_000_001,
        "20,000 requests and a line that is not UTF-8": (line[:-1] + b', "num_images_per_prompt": 2}\n') * 20_000
        + b"\xff",
    }


def _outputs() -> list[str]:
    """Return names and templates of files that no run may write to, or that cannot be."""
    return [
        *("..", "../x.png", "a/../../x.png", "/x.png", "//x.png", "C:\\x.png", "C:x.png", "..\\x.png", "~/x.png", "-"),
        *("a" * 300 + ".png", "b/" * 3000 + "c.png", "\0.png", "\n.png", "\x1b[2J.png", "\u202egnp.png", "\udc80.png"),
        *(".png", "", " ", ".", "./", "x", "x.exe", "x.png/", "CON.png", "x.png:stream", "prompts.jsonl", "{", "}"),
        *("{}", "{prompt!r}.png", "{prompt.__class__}.png", "{prompt[0]}.png", "{0}.png", "{surprise}.png"),
        *("{{prompt}}.png", "{prompt}/{prompt}.png"),
        *("{index:999999999}.png", "{index:\u0669\u0669\u0669}.png", "{index:{seed}}.png", "{prompt:>200}.png"),
        *("{date:%c%x%X}.png", "{date:%n/../..%n}.png", "{date:../../x}.png", "{index:/>9}.png"),
        *("{prompt:.0}.png", "{steps:c}.png", "{guidance_scale:.20}.png", "{seed}" * 100 + ".png", "{prompt}" * 50),
    ]


def _prompts() -> list[str]:
    """Return prompts whose text may be no part of a path."""
    return [
        *("..", ".", "", "/", "../../x", "..\\..\\x", "/etc/passwd", "~", "C:\\x", "a\0b", "a\nb", "\x1b[2J"),
        *(
            "\u202ea",
            "a" * 1000,
            "☃" * 1000,
            "\u0301" * 1000,
            "CON",
            "nul.txt",
            "x.png:stream",
            "-o",
            " ",
            "a.",
            "a ",
            "{seed}",
        ),
        *("%s", "．．／x", "․․/x", "a/./../../../b", "\ufeff", "\U000e0001", "<|endoftext|>"),
    ]


def _many() -> dict[str, list[dict[str, Any]]]:
    """Return files whose requests are too many together, or contradict each other."""
    return {
        "too many images in a line": [{"prompt": "a", "num_images_per_prompt": 10**6 + 1}],
        "too many images in two lines": [{"prompt": "a", "num_images_per_prompt": 500_001}] * 2,
        "two requests of one name": [{"prompt": "a", "output": "x.png"}, {"prompt": "b", "output": "x.png"}],
        "two names that differ in case": [{"prompt": "a", "output": "x.png"}, {"prompt": "b", "output": "X.png"}],
        "a file and a folder of one name": [
            {"prompt": "a", "output": "x.png"},
            {"prompt": "b", "output": "x.png/y.png"},
        ],
        "a wrong request at the end": [{"prompt": "a"}] * 30 + [{"prompt": "a", "width": 65}],
        "an unknown key at the end": [{"prompt": "a"}] * 30 + [{"prompt": "a", "surprise": 1}],
        "images of every size": [{"prompt": "a", "width": 64 + 4 * index} for index in range(4)],
        "a seed of -2 in 1,000 folders": [
            {"prompt": "a", "output": f"{index}/x.png", "seed": -2} for index in range(1000)
        ],
    }
