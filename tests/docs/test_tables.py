"""Tables made from the code: every sampler, option, error and field of a manifest, and names of other tools."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from docs import tables
from latentrt import errors
from latentrt.backends.execution_providers import PROVIDERS
from latentrt.cli.run import run
from latentrt.cli.schemas import DOCUMENTS
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
    text = tables.json_documents(ROOT / "docs" / "cli-json")
    missing = [command for command in DOCUMENTS if f"## latentrt {command} --json\n" not in text]
    assert missing == []
    assert "| `size_bytes` | whole number | yes |" in text


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


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    """`…` stands for a value; what is between two of them is in one message."""
    page = (ROOT / "docs" / "howto" / "troubleshooting.md").read_text()
    quoted = [text for text in re.findall(r"^\| `([^|]+)` +\|", page, re.MULTILINE) if " " in text]
    assert len(quoted) > 20
    paths = [path for package in ("runtime", "export", "engines") for path in (ROOT / package).rglob("*.py")]
    # Texts that the code writes in pieces are joined.
    code = re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in paths))
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("…") if len(piece.strip()) > 3]
        assert [piece for piece in pieces if piece not in code] == [], message
