"""The JSON documents of the commands follow the schemas in docs/cli-json."""

from __future__ import annotations

import json
from pathlib import Path

import click
import jsonschema
import pytest

from latentrt.cli import main as cli
from latentrt.cli.config import list_commands
from latentrt.cli.schemas import DOCUMENTS, make_schema, write_schemas
from tests.documents import validated
from tests.runtime.cli.conftest import Caller

FOLDER = Path(__file__).parents[3] / "docs" / "cli-json"
QUICK = ("--steps", "1", "--device", "cpu")


def test_every_command_has_a_document() -> None:
    root = click.Context(cli._group, info_name="latentrt")
    names = {" ".join(context.command_path.split()[1:]) for context, _ in list_commands(root, every=True)}
    assert names - {"run"} == DOCUMENTS.keys() - {"run"}


def test_the_schemas_in_the_documentation_are_those_of_the_code(tmp_path: Path) -> None:
    """`python -m latentrt.cli.schemas docs/cli-json` writes them."""
    write_schemas(tmp_path)
    made, shown = ({path.name: path.read_text() for path in folder.iterdir()} for folder in (tmp_path, FOLDER))
    assert made == shown


@pytest.mark.parametrize("command", DOCUMENTS)
def test_the_schemas_are_schemas(command: str) -> None:
    schema = make_schema(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == f"latentrt {command} --json"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema)


@pytest.mark.parametrize(
    "arguments",
    [
        ("completion", "bash"),
        ("config", "--all"),
        ("doctor",),
        ("doctor", "sample"),
        ("inspect", "sample"),
        ("samplers",),
        ("samplers", "DPM++ 2M Karras"),
        ("schedule", "--sampler", "heun", "--steps", "3"),
        ("schedule", "--sampler", "ddpm", "--option", "thresholding=true"),
        ("verify", "sample"),
        ("demo", "a star", "--steps", "1"),
        ("compare", "--samplers", "euler,pndm", *QUICK),
        ("bench", "sample", "--runs", "1", "--size", "32", *QUICK),
    ],
    ids=" ".join,
)
def test_a_command_prints_its_document_alone(
    latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    done = latentrt(*arguments, "--json")
    assert done.code == 0, done.err
    validated(arguments[0], done.out)
    assert done.out.isascii()


def test_an_image_is_inspected_with_the_same_schema(latentrt: Caller, tmp_path: Path) -> None:
    place = tmp_path / "out.png"
    assert latentrt("run", "sample", "a star \x07", *QUICK, "-o", place).code == 0
    document = validated("inspect", latentrt("inspect", place, "--json").out)
    assert document["record"]["prompt"] == "a star \x07"
    place.write_text(json.dumps({}))
    assert latentrt("inspect", place, "--json").code == 2
