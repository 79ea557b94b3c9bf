"""Builds the source distribution and the wheel of the last commit, twice, and checks them.

    .venv/bin/python -m release.build --output dist

Nothing is uploaded and no tag is made. Files that are not committed are not part of a release, so a changed working
tree is refused. Both builds have the time of the commit (`SOURCE_DATE_EPOCH`) and must be equal to the byte. Then
follow the contents, the description as the package index would render it, and an image that the wheel generates in a
fresh environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import click

from latentrt import __version__
from latentrt.bundle.manifest import decode_manifest
from latentrt.bundle.sample import bundle_path

__all__ = ["build", "check_changelog", "content_faults", "export_commit", "main", "try_wheel"]

ROOT = Path(__file__).parent.parent
PACKAGES = {"latentrt": "runtime", "latentrt_export": "export", "latentrt_engines": "engines"}
LARGEST_WHEEL = 12_000_000  # bytes; the sample bundle's weights are 10.5 MB of them
LARGEST_SDIST = 25_000_000  # bytes; with the sample checkpoint, which tests and `make demo` export
LARGEST_FILE = 1_000_000  # bytes, of all but the sample model's

# No one needs these after a build: caches, environments, outputs, reports of an export.
_STRAY = re.compile(r"(^|/)(__pycache__|\.venv[^/]*|\.\w+_cache|\.hypothesis|scratch|demo|dist)/|\.pyc$|export-report")
_SOURCES = {
    *("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "constraints.txt", "Makefile", "pyproject.toml", "PKG-INFO"),
    *("sample/checkpoint/model_index.json", "tests/conftest.py", "docker/Dockerfile.cpu", "release/build.py"),
}


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "dist", show_default=True)
def main(output: Path) -> None:
    """Build and check a release of the last commit."""
    if changed := _git("status", "--porcelain"):
        raise click.ClickException(f"expected a working tree without changes; commit or remove:\n{changed}")
    if fault := check_changelog((ROOT / "CHANGELOG.md").read_text(), __version__):
        raise click.ClickException(fault)
    epoch = int(_git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as folder:
        builds = []
        for name in ("first", "second"):
            source = Path(folder) / name / "source"
            export_commit(ROOT, source)
            builds.append(build(source, Path(folder) / name / "dist", epoch))
        output.mkdir(parents=True, exist_ok=True)
        for first, second in zip(*builds, strict=True):
            content = first.read_bytes()
            if content != second.read_bytes():
                raise click.ClickException(f"{first.name} differs between two builds of the same commit")
            if faults := content_faults(first):
                raise click.ClickException(f"{first.name}: " + "; ".join(faults))
            (output / first.name).write_bytes(content)
            click.echo(f"{first.name}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")
    files = [output / each.name for each in builds[0]]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    click.echo(try_wheel(next(file for file in files if file.suffix == ".whl")))
    click.echo(f"{output} holds version {__version__}; CONTRIBUTING.md says how it is tagged and uploaded")


def check_changelog(text: str, version: str) -> str | None:
    """Return what the changelog lacks: a section "Unreleased" first, then one of the version with its date."""
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if sections[:1] != ["[Unreleased]"]:
        return f"CHANGELOG.md begins with the section {sections[:1]}, expected [Unreleased]"
    if not any(re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", each) for each in sections):
        return f"CHANGELOG.md has no section of version {version}, expected a line '## [{version}] - YYYY-MM-DD'"
    return None


def export_commit(repository: Path, folder: Path) -> None:
    """Write the files of the last commit into a new folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=repository, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)


def build(source: Path, output: Path, epoch: int) -> list[Path]:
    """Build the source distribution, and the wheel from it; return their files in the order of their names.

    Args:
        source: the sources, without files that do not belong to a release.
        output: a folder for the files, which is made.
        epoch: the time of all files in seconds since 1970.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return sorted(output.iterdir())


def content_faults(file: Path) -> list[str]:
    """Return the unexpected and the missing members of a built file; an empty list if there are none."""
    wheel = file.suffix == ".whl"
    sizes = _wheel_sizes(file) if wheel else _sdist_sizes(file)
    packages = [name if wheel else f"{folder}/{name}" for name, folder in PACKAGES.items()]
    info = f"latentrt-{__version__}.dist-info"
    bundle = f"{packages[0]}/sample_bundle/"
    manifest = decode_manifest((bundle_path() / "bundle.json").read_bytes())
    needed = {f"{package}/py.typed" for package in packages} | {f"{bundle}{name}" for name in manifest.files}
    needed.add(f"{packages[0]}/images/NotoSans-subset.ttf")
    needed |= {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/METADATA"} if wheel else _SOURCES
    faults = [f"lacks {name}" for name in sorted(needed - {*sizes})]
    faults += [f"has {name}" for name in sorted(sizes) if _STRAY.search(name)]
    if wheel:
        faults += [f"has {name}" for name in sorted(sizes) if name.split("/")[0] not in (*packages, info)]
    models = (bundle, "sample/checkpoint/")
    for name, size in sizes.items():
        if size > LARGEST_FILE and not name.startswith(models):
            faults.append(f"has {name} of {size:,} bytes, expected {LARGEST_FILE:,} at most outside the sample model")
    largest = LARGEST_WHEEL if wheel else LARGEST_SDIST
    if file.stat().st_size > largest:
        faults.append(f"has {file.stat().st_size:,} bytes, expected {largest:,} at most")
    return faults


def try_wheel(wheel: Path) -> str:
    """Install the wheel with the extra `cpu` into a fresh environment and generate its demo; return a line about it.

    Raises:
        ClickException: a command failed, or the package that ran is not the wheel's.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        venv.create(here / "venv", with_pip=True)
        programs = here / "venv" / ("Scripts" if os.name == "nt" else "bin")
        constraints = ROOT / "constraints.txt"
        quiet = ("--quiet", "--no-compile", "--disable-pip-version-check")
        _run(here, programs / "python", "-m", "pip", "install", *quiet, "-c", constraints, f"{wheel.resolve()}[cpu]")
        code = "import latentrt; print(latentrt.__version__, latentrt.__file__)"
        version, place = _run(here, programs / "python", "-I", "-c", code).split(maxsplit=1)
        if version != __version__ or not Path(place.strip()).resolve().is_relative_to(here.resolve()):
            raise click.ClickException(f"got version {version} of {place.strip()}, expected {__version__} of the wheel")
        _run(here, programs / "latentrt", "demo", "-o", here / "sheet.png")
        size = (here / "sheet.png").stat().st_size
    return f"{wheel.name} in a fresh environment: `latentrt demo` wrote {size:,} bytes"


def _run(folder: Path, *command: str | Path) -> str:
    """Run a command outside of the clone, and without its modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _wheel_sizes(file: Path) -> dict[str, int]:
    """Return name → bytes of the files of a wheel."""
    with zipfile.ZipFile(file) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def _sdist_sizes(file: Path) -> dict[str, int]:
    """Return name → bytes of the files of a source distribution, without the folder that holds them all."""
    with tarfile.open(file) as archive:
        return {entry.name.partition("/")[2]: entry.size for entry in archive}


if __name__ == "__main__":
    main()
