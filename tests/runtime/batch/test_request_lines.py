from __future__ import annotations

import io
import itertools
import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.batch import request_lines
from latentrt.batch.request_lines import MAX_LINE_BYTES, RequestFile, RequestLine
from latentrt.errors import RequestError
from latentrt.request import OPTIONS


def read(path: Path, content: bytes | str) -> list[RequestLine]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = RequestFile(str(path))
    try:
        lines = list(file.lines())
        assert list(file.lines()) == lines, "they can be read again"
        return lines
    finally:
        file.close()


def test_a_prompt_on_each_line(tmp_path: Path) -> None:
    place = tmp_path / "prompts.txt"
    text = "\ufeffa star\r\n\n  # not this\n#nor this\n  a red circle, “quoted”  \n{not json}\n\t\nlast"
    lines = read(place, text)
    assert [line.values for line in lines] == [
        {"prompt": "a star"},
        {"prompt": "a red circle, “quoted”"},
        {"prompt": "{not json}"},
        {"prompt": "last"},
    ]
    assert [line.place for line in lines] == [f"{place}, line {number}" for number in (1, 5, 6, 8)]
    assert {line.output for line in lines} == {None}


def test_an_object_on_each_line(tmp_path: Path) -> None:
    values = {"prompt": "a star", "seed": [1, 2], "sampler_options": {"lambda_min_clipped": float("-inf")}}
    more = {"prompt": None, "image": "a.png", "karras": True, "latents": None}
    lines = read(tmp_path / "a.jsonl", f"{json.dumps(values | {'output': 'a/b.png'})}\n\n{json.dumps(more)}")
    assert [line.values for line in lines] == [values, more]
    assert [line.output for line in lines] == ["a/b.png", None]
    assert lines[1].place.endswith("a.jsonl, line 3")


def test_every_option_is_a_field(tmp_path: Path) -> None:
    names = [name for name, option in OPTIONS.items() if option.check.kind not in ("python", "path")]
    (line,) = read(tmp_path / "a.ndjson", json.dumps(dict.fromkeys(names, 1)))
    assert [*line.values] == names


PLACE = "line 2"
# What no line may name.
OUTPUTS: tuple[Any, ...] = (
    *("/etc/x.png", "../x.png", "a/../../x.png", "", 7, [], "a\n"),
    *("C:\\x.png", "C:x.png", "..\\x.png", "\\\\h\\s\\x"),
)


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ("7", "expected a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "twice"),
        ('{"guidance_scale": NaN}', "NaN"),
        ('{"seed": 99999999999999999999}', "64 bits"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"promt": "a"}', "did you mean 'prompt'"),
        ('{"prompt": "a", "\\u001b[31m": 1}', "\\x1b"),
        ('{"latents": [1]}', "only Python"),
        ('{"generator": 1}', "only Python"),
        ('{"image": ["a.png"]}', "image: got ['a.png']"),
        ('{"mask_image": {}}', "mask_image: got"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", "nested deeper"),
        ('{"seed": [' + "1," * 20_000 + "1]}", "values, the limit"),
        *((json.dumps({"output": each}), "output: got") for each in OUTPUTS),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, fragment: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(tmp_path / "a.jsonl", f'{{"prompt": "a"}}\n{line}\n')
    assert f"a.jsonl, {PLACE}" in str(refused.value)
    assert fragment in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"ok\n\xff\xfe"), ("a.jsonl", b'{}\n{"prompt": "\xff"}')])
def test_a_line_that_is_not_utf_8(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(RequestError, match=f"{PLACE} is not UTF-8"):
        read(tmp_path / name, content)


@given(st.binary(max_size=60))
def test_any_bytes_are_requests_or_refused(content: bytes) -> None:
    stream = io.BytesIO(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        refusals = []
        try:
            for line in RequestFile("-").lines():
                assert isinstance(line.values, dict)
        except RequestError as error:
            refusals.append(str(error))
        assert all(each.startswith("standard input, line ") for each in refusals)


def test_a_line_without_end_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = 0

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            nonlocal read_bytes
            buffer[:] = b"a" * len(buffer)
            read_bytes += len(buffer)
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    with pytest.raises(RequestError, match="line 1 is longer than 1,048,576 bytes"):
        next(RequestFile("-").lines())
    assert read_bytes < 2 * MAX_LINE_BYTES


@pytest.mark.parametrize("first", ["a star", '{"prompt": "a star"}'])
def test_a_pipe_without_end_is_read_lazily(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Text or JSON, by its first line."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "w") as stream:
            for _ in range(20_000):
                try:
                    stream.write(f"{first}\n")
                except BrokenPipeError:
                    return

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        file = RequestFile("-")
        assert not file.seekable
        lines = file.lines()
        assert {line.values["prompt"] for line in itertools.islice(lines, 10_000)} == {"a star"}
        tracemalloc.start()
        for _ in itertools.islice(lines, 10_000):
            pass
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        file.close()
        assert not stdin.closed
    thread.join()


@pytest.mark.parametrize("line", ["a star", '{"prompt": "a star"}'])
def test_a_pipe_with_a_name(tmp_path: Path, line: str) -> None:
    """As of a process substitution: `--prompts <(make-requests)`."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(f"{line}\n",))
    writer.start()
    file = RequestFile(str(tmp_path / "pipe"))
    assert not file.seekable
    assert [line.values for line in file.lines()] == [{"prompt": "a star"}]
    file.close()
    writer.join()


def test_standard_input_begins_where_another_program_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a heading\na star\n")
    with open(tmp_path / "a.txt") as stdin:
        os.lseek(stdin.fileno(), len("a heading\n"), os.SEEK_SET)
        monkeypatch.setattr(sys, "stdin", stdin)
        file = RequestFile("-")
        for _ in range(2):
            assert [line.values for line in file.lines()] == [{"prompt": "a star"}]


def test_a_file_is_closed_where_standard_input_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert [line.values for line in read(tmp_path / "a.txt", "a star")] == [{"prompt": "a star"}]


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.txt", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(RequestError, match="`prompts`: got"):
            RequestFile(str(path))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="it is closed"):
        RequestFile("-")


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lines, "MAX_FILE_BYTES", 10)
    (tmp_path / "a.txt").write_text("a star\n" * 2)
    with pytest.raises(RequestError, match="of 14 bytes, expected at most 10"):
        RequestFile(str(tmp_path / "a.txt"))
