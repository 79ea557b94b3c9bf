"""Tables made from the code: every sampler, option, error and field of a manifest, and names of other tools."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest

from docs import tables
from latentrt import errors
from latentrt.backends.execution_providers import PROVIDERS
from latentrt.bundle.sample import bundle_path
from latentrt.cli.main import main
from latentrt.cli.run import run
from latentrt.cli.schemas import DOCUMENTS
from latentrt.engines.gpu import _NO_DRIVER
from latentrt.request import OPTIONS
from latentrt.sampling import samplers
from tests.docs.blocks import ROOT

SCHEMA = json.loads((files("latentrt.bundle") / "bundle.schema.json").read_text())


def test_every_sampler_is_listed_by_its_class() -> None:
    text = tables.sampler_names()
    assert [name for name in samplers.SAMPLERS if f"`{samplers.SAMPLERS[name].class_name}`" not in text] == []


@pytest.mark.parametrize("tool", tables.OTHER_TOOLS)
def test_a_name_elsewhere_is_the_sampler_that_it_is_listed_as(tool: str) -> None:
    section = tables.sampler_names().split(f"### {tool}\n")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE))
    assert tuple(rows) == tables.OTHER_TOOLS[tool]
    for name, ours in rows.items():
        if ours != "not available":
            found = samplers.choose(name)
            assert ours.startswith(f"`{found.name}`")
            assert all(f"`{key}={value}`" in ours for key, value in found.options.items())


def test_every_option_is_listed() -> None:
    text = tables.option_table()
    assert [keyword for keyword in OPTIONS if f"| `{keyword}` |" not in text] == []
    flags = {flag for parameter in run.params for flag in parameter.opts}
    assert set(re.findall(r"\| `(--[a-z-]+)` \|", text)) <= flags


def test_every_provider_is_listed() -> None:
    lines = tables.provider_table().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(PROVIDERS)


def test_every_error_is_listed_below_its_base() -> None:
    lines = tables.error_table().splitlines()
    assert [name for name in errors.__all__ if sum(f"`{name}`" in line for line in lines) != 1] == []


def test_every_field_of_a_manifest_is_listed() -> None:
    text = tables.manifest_fields(SCHEMA)
    for name, record in SCHEMA["$defs"].items():
        section = text.split(f"### {name}\n")[1].split("\n### ")[0]
        assert [field for field in record.get("properties", {}) if f"| `{field}` |" not in section] == []


def test_every_command_with_a_json_document_is_listed() -> None:
    text = tables.json_documents(ROOT / "docs" / "cli-json", SCHEMA)
    missing = [command for command in DOCUMENTS if f"## latentrt {command} --json\n" not in text]
    assert missing == []
    assert "| `size_bytes` | whole number | yes |" in text
    for row in ("| `digest` | text | yes | of bundle.json |", "| yes | of the request, by their Python keywords |"):
        assert row in text, "described on one line"
    assert "[TensorSpec](bundle.md#tensorspec)" in text
    assert "### Quantiles\n" in text
    assert "prints.\n" not in text, "a sentence that repeats the heading"
    assert "Attributes:" not in text
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number, at least 1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or `null`"),
        ({"enum": ["a", "b"]}, '`"a"` or `"b"`'),
        ({"type": "array", "items": {"$ref": "#/$defs/Part"}}, "list of [Part](#part)"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object: name → number"),
        ({}, "any JSON value"),
    ],
)
def test_types_in_words(schema: dict[str, object], words: str) -> None:
    assert tables._type_of(schema) == words


def test_a_file_that_stays_the_same_is_not_touched(tmp_path: Path) -> None:
    tables.write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    tables.write(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_links_of_a_root_page_are_those_of_its_place_in_the_site(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("[a](SECURITY.md#graphs) [b](docs/cpu.md) [c](sample/MODEL_CARD.md) [d](https://e.f) [g](#h)")
    expected = "[a](security.md#graphs) [b](../cpu.md) [c](../../sample/MODEL_CARD.md) [d](https://e.f) [g](#h)"
    assert tables.root_page(page) == expected


def _templates(path: Path) -> Iterator[str]:
    """Yield the texts of a module, with `…` for each value that is formatted into one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield from map("".join, product(*map(_alternatives, node.values)))


def _alternatives(part: ast.expr) -> list[str]:
    """Return the texts that a part of an f-string may be: both of `'a' if … else 'b'`."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    return [str(branch.value) if isinstance(branch, ast.Constant) else "…" for branch in branches]


TEMPLATES = [
    text
    for package in ("runtime", "export", "engines")
    for path in sorted((ROOT / package).rglob("*.py"))
    for text in _templates(path)
]


def quoted_messages(page: str) -> list[str]:
    """Return the messages in the first cells of a page's tables; `…` stands for any text."""
    cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    quotes = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    return [quote for quote in quotes if "…" in quote or quote.count(" ") > 1]


def as_pattern(quote: str) -> str:
    return ".*".join(map(re.escape, quote.split("…")))


TROUBLES = quoted_messages("howto/troubleshooting.md")


def test_there_are_messages_to_compare() -> None:
    assert len(TROUBLES) > 30


@pytest.mark.parametrize("message", [*TROUBLES, *quoted_messages("howto/fleet.md")])
def test_a_message_that_a_page_quotes_is_one_of_the_code(message: str) -> None:
    """From where a clause begins to where one ends, in one text of the code."""
    assert len(message.replace("…", "").strip()) > 10, "too short to be found among other messages"
    pattern = rf"(?:^|[…:;,.(] ?){as_pattern(message)}(?:$|[…:;,.)\n])"
    assert [text for text in TEMPLATES if re.search(pattern, text, re.DOTALL)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "sample", "a", "-o", "there.png"),
        ("demo", "-o", "there.png"),
        ("run", "sample", "a", "-o", "there.gif"),
        ("run", "sample", "a", "--width", "65"),
        ("run", "sample", "a", "--sampler", "nosuch"),
        ("run", "sample", "a", "--sampler", "euler", "--sampler-option", "nosuch=1"),
        ("run", "nosuch", "a"),
        ("run", "damaged", "a"),
        ("verify", "damaged"),
        ("verify", "sample", "--digest", f"sha256:{'0' * 64}"),
        ("run", "sample", "a", "--device", "tensorrt"),
        ("engines", "why", "sample", "--gpu", "l4"),
        ("build", "sample", "--gpu", "l4"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_what_people_see_is_found_on_the_page(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The words of a real command, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentrt.engines.gpu.find_gpu", lambda: _NO_DRIVER)
    monkeypatch.setattr("latentrt.backends.placement.find_gpu", lambda: _NO_DRIVER)
    Path("there.png").touch()
    shutil.copytree(bundle_path(), "damaged")
    with (tmp_path / "damaged" / "unet" / "model.safetensors").open("r+b") as weights:
        weights.write(b"x")
    with pytest.raises(SystemExit):
        main(list(arguments))
    printed = "".join(capfd.readouterr())
    assert [message for message in TROUBLES if re.search(as_pattern(message), printed, re.DOTALL)], printed
