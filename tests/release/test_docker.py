"""What can be checked of the container files without a container engine."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a container file with their arguments, each on one line."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def copied_from_the_clone(file: Path) -> list[str]:
    """Return the paths that are copied from the build context."""
    lines = [rest.split() for name, rest in instructions(file) if name == "COPY" and not rest.startswith("--from=")]
    return [path for line in lines for path in line[:-1]]


def test_there_is_a_file_for_each_kind_of_machine() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    program = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    assert program, "hadolint is in the extra `dev`"
    done = subprocess.run([program, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_build_context_has_what_is_copied(file: Path) -> None:
    copied = copied_from_the_clone(file)
    assert {"pyproject.toml", "constraints.txt", "runtime"} <= {*copied}
    assert [path for path in copied if not (ROOT / path).exists()] == []
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {*copied} == {pattern[1:] for pattern in patterns if pattern.startswith("!")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_build_has_all_that_the_package_is_built_from(file: Path) -> None:
    """Its packages, and the files that its metadata are read from."""
    project, copied = PROJECT["project"], copied_from_the_clone(file)
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    sources = [*packages, project["readme"], *project["license-files"], PROJECT["tool"]["hatch"]["version"]["path"]]
    assert [path for path in sources if path.split("/")[0] not in copied] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_extras_exist(file: Path) -> None:
    named = next(rest for name, rest in instructions(file) if name == "ARG" and rest.startswith("EXTRAS="))
    proposed = re.findall(r"--build-arg EXTRAS=([\w,]+)", file.read_text())
    extras = {extra for text in (named.removeprefix("EXTRAS="), *proposed) for extra in text.split(",")}
    assert file.suffix[1:] in extras
    assert extras <= {*PROJECT["project"]["optional-dependencies"]}
    assert any('-c constraints.txt ".[${EXTRAS}]"' in rest for name, rest in instructions(file) if name == "RUN")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_container_runs_latentrt_as_a_user_with_a_private_cache(file: Path) -> None:
    found = instructions(file)
    last = [rest for name, rest in found[[name for name, _ in found].index("FROM") :]]
    assert ("ENTRYPOINT", '["latentrt"]') in found
    assert ("VOLUME", "/cache") in found
    assert found[[name for name, _ in found].index("ENTRYPOINT") - 1] == ("USER", "10001")
    assert any("--uid 10001" in rest and "--mode 0700 /cache" in rest for rest in last)
    assert any("LATENTRT_CACHE=/cache" in rest for name, rest in found if name == "ENV")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_bases_have_a_version(file: Path) -> None:
    """Every `FROM` is an earlier stage, or a base whose tag has a version."""
    arguments = dict(rest.split("=", 1) for name, rest in instructions(file) if name == "ARG")
    stages: set[str] = set()
    for base, _, stage in (rest.partition(" AS ") for name, rest in instructions(file) if name == "FROM"):
        image = arguments.get(base.strip("${}"), base)
        assert image in stages or fnmatch.fnmatch(image, "*:*[0-9].[0-9]*-*"), image
        stages.add(stage)
