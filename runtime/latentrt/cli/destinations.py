"""The files that commands write images to: their names and formats, and the treatment of existing files.

A file that exists is refused before any work, unless the command line says what to do with it. Without a name, a
command takes the first of `out`, `out-1`, `out-2`, … that is free.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentrt.batch.names import NameTemplate
from latentrt.errors import OutputError, RequestError
from latentrt.images import files

if TYPE_CHECKING:
    from latentrt.resolve import ResolvedRequest

__all__ = ["Destination", "Existing", "OutputNames", "choose_file", "refuse_file"]

Existing = Literal["refuse", "overwrite", "skip"]
"""The treatment of an existing file."""

_STANDARD_OUTPUT = "-"
_DEFAULT_STEM = "out"
_IN_FOLDER = "{index:05}-{seed}"
# Fields that are another's for each image, as a rule; `date` and the options of a request are not.
_DISTINGUISHING = {"index", "seed", "prompt"}
# Templates that are kept parsed: each line of a file may have its own.
_MAX_TEMPLATES = 1024


def choose_file(output: Path | None, default: str, *, overwrite: bool) -> Path:
    """Return the file that a command writes one image to.

    Args:
        output: as given; None: the default name, or the next that is free.
        default: name, such as `demo.png`.
        overwrite: replace an existing file.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    if output is not None:
        files.check_output(output)
        if not overwrite and files.find_file(output):
            raise refuse_file(output)
        return output
    path = Path(default)
    if not overwrite:
        path = Path(_find_free_stem(path.stem, path.suffix, several=False) + path.suffix)
    files.check_output(path)
    return path


def refuse_file(path: Path, *, option: str = "output", skips: bool = False) -> OutputError:
    """Return the error for a file that exists.

    Args:
        option: the one that names the file, by its keyword.
        skips: whether the command can keep such files.
    """
    keep = ", or `skip_existing` to keep it and go on" if skips else ""
    return OutputError(f"{path} exists; give another `{option}`, or `overwrite` to replace it{keep}")


@dataclass(frozen=True)
class Destination:
    """The names of one or several images.

    Attributes:
        template: of the names.
        file_format: `PNG`, `JPEG` or `WEBP`.
        makes_folders: whether missing folders are made: those of a template with fields, and those that are meant as
            folders. Of a plain name it is rather a slip.
    """

    template: NameTemplate
    file_format: str
    makes_folders: bool

    @property
    def is_numbered(self) -> bool:
        """Whether every image has a name of its own, whatever the requests are."""
        return "index" in self.template.fields


class OutputNames:
    """The names of the images of a run.

    Args:
        output: as given: a name or template, a folder, or `-`; None: `out.png` or the next that is free.
        file_format: `png`, `jpeg` or `webp`; None: as the extension says.
        existing: the treatment of existing files.
        several: whether the run has more than one image, or an unknown number.

    Attributes:
        main: of all images whose request names none; None: standard output.

    Raises:
        OutputError, RequestError: a name is none for images.
    """

    def __init__(self, output: str | None, file_format: str | None, existing: Existing, *, several: bool) -> None:
        self._format, self._today = file_format, date.today()
        self._folder = ""
        self.file_format = files.find_format(file_format or "png")
        if output == _STANDARD_OUTPUT:
            self.main = None
            return
        if output is None:
            extension = files.find_extension(self.file_format)
            free = existing == "refuse"
            output = _find_free_stem(_DEFAULT_STEM, extension, several=several) if free else _DEFAULT_STEM
            output += extension
        elif not output:
            raise OutputError(
                "`output`: got an empty name, expected that of an image or a folder, or - for standard output"
            )
        elif output.endswith(("/", os.sep)) or os.path.isdir(output):
            self._folder = output.rstrip("/" + os.sep).replace("{", "{{").replace("}", "}}") or os.sep
            output = f"{self._folder}/{_IN_FOLDER}{files.find_extension(self.file_format)}"
        self.main = self._make(output, several)
        self._of_line = functools.lru_cache(_MAX_TEMPLATES)(self._make)

    def of_request(self, output: str | None, *, several: bool) -> Destination:
        """Return the names of a request's images.

        Args:
            output: as the request names it, below the folder of the run; None: that of the run.
            several: whether the request has more than one image.

        Raises:
            OutputError, RequestError: it is no name of an image.
        """
        if self.main is None:
            raise RequestError("`output`: got - for a request that names its file; give a folder")
        if output is None:
            return self.main
        return self._of_line(f"{self._folder}/{output}" if self._folder else output, several, True)

    def _make(self, text: str, several: bool, makes_folders: bool = False) -> Destination:
        template = NameTemplate(text)
        file_format = files.choose_format(template.extension, self._format, text)
        makes_folders = makes_folders or bool(template.fields)
        if several and not template.fields & _DISTINGUISHING:
            bare = text.removesuffix(template.extension) if template.extension else text
            template = NameTemplate(f"{bare}-{{index}}{template.extension}")
        return Destination(template, file_format, makes_folders)

    def place(self, destination: Destination, request: ResolvedRequest, image: int, index: int) -> Path:
        """Return the path of an image.

        Args:
            image: its number in the request.
            index: its number in the run.
        """
        return destination.template.fill(self._values(request, image, index))

    def _values(self, request: ResolvedRequest, image: int, index: int) -> Mapping[str, Any]:
        prompts = request.prompts
        return {
            "index": index,
            "seed": request.seeds[image],
            "prompt": prompts[request.prompt_of(image)] if prompts else "",
            "sampler": _name_sampler(request),
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "width": request.width,
            "height": request.height,
            "date": self._today,
        }


def _find_free_stem(stem: str, extension: str, *, several: bool) -> str:
    """Return the first of `out`, `out-1`, `out-2` … that no file has, or no file with a number after it."""
    taken = set[str]()
    pattern = re.compile(rf"({re.escape(stem)}(?:-[0-9]+)?){'-[0-9]+' if several else ''}{re.escape(extension)}")
    with os.scandir() as entries:
        taken.update(found[1].lower() for each in entries if (found := pattern.fullmatch(each.name.lower())))
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(1)))
    return next(name for name in names if name not in taken)


def _name_sampler(request: ResolvedRequest) -> str:
    """Return the sampler's name with the suffix of its spacing, such as `dpmpp_2m_karras`."""
    from latentrt.sampling import samplers
    from latentrt.sampling.samplers.aliases import SPACING_SUFFIXES

    choice = samplers.choose(request.sampler)
    options = {**choice.options, **(request.sampling.options or {})}
    if request.sampling.karras is not None:
        options["use_karras_sigmas"] = request.sampling.karras
    spaced = (suffix for suffix, spacing in SPACING_SUFFIXES.items() if options.get(f"use_{spacing}_sigmas"))
    return choice.name + next(spaced, "")
