"""The command `latentrt schedule`: prints and plots the table of coefficients that a sampler runs."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.manifest import MAX_STEPS
from latentrt.bundle.printable import counted, quote
from latentrt.bundle.strict_json import AmbiguousJSONError, parse_json
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo, echo_block
from latentrt.cli.request_options import samplers
from latentrt.cli.values import KeyValue, Suggested
from latentrt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from latentrt.sampling.samplers import SamplerChoice
    from latentrt.sampling.schedule import Schedule
    from latentrt.sampling.schedule_table import Format

__all__ = ["MAX_CONFIG_BYTES", "ScheduleDocument", "read_scheduler_config", "schedule"]

_DEFAULT_STEPS = 50  # as diffusers' pipelines
_MAX_TITLE = 100
_GRIDS = ("timesteps", "sigmas")
_EXTENSIONS: dict[str, Format] = {".json": "json", ".csv": "csv"}

MAX_CONFIG_BYTES = 1 << 20  # the longest known configuration, with the betas of 1,000 timesteps, has about 30 kB
_CONFIG_HINT = "expected a scheduler_config.json as diffusers saves it"


class ScheduleDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt schedule --json`.

    Attributes:
        title: the sampler and its options.
        init_noise_sigma: standard deviation of the first latents.
        rows: the columns by name, of each model evaluation; `b` is a list, an infinite `limit` is null.
    """

    title: str
    init_noise_sigma: float
    rows: list[dict[str, float | list[float] | None]]


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A list of numbers separated by commas: `999,750,500`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):  # click may convert twice
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"got {quote(value)}, expected numbers separated by commas, such as 999,750,500", param, ctx)


@command(
    examples=(
        "latentrt schedule --sampler dpmpp_2m --karras --steps 12",
        "latentrt schedule --config path/to/scheduler_config.json --plot schedule.svg",
        "latentrt schedule --sampler unipc --option solver_order=3 --format csv -o schedule.csv",
    )
)
@option(
    "--sampler",
    metavar="NAME",
    type=Suggested(samplers),
    group="Sampler",
    help="A sampler, by any of its names (see latentrt samplers).",
)
@option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    group="Sampler",
    help="A scheduler_config.json as diffusers saves it; its class is the default of --sampler. Without it, the "
    "defaults of the sampler's diffusers class apply.",
)
@option(
    "--option",
    "pairs",
    type=KeyValue(),
    multiple=True,
    group="Sampler",
    help="An option of the configuration, such as solver_order=3, or of the run, such as s_churn=10 "
    "(latentrt samplers --verbose lists both). VALUE is JSON or text. May be repeated.",
)
@option(
    "--karras/--no-karras",
    default=None,
    group="Sampler",
    help="Use the sigmas of Karras et al.  [default: as in the configuration]",
)
@option(
    "--eta", type=float, group="Sampler", help="Amount of fresh noise, 0 to 1, of samplers that use it (ddim, tcd)."
)
@option("--mu", type=float, group="Sampler", help="Logarithm of a flow's shift, with use_dynamic_shifting.")
@option(
    "--steps",
    type=click.IntRange(1, MAX_STEPS),
    group="Steps",
    help=f"Number of steps.  [default: {_DEFAULT_STEPS}, as in diffusers]",
)
@option(
    "--begin",
    type=int,
    group="Steps",
    help="Number of steps to skip at the noisy end, as image-to-image does.",
)
@option("--timesteps", type=_Numbers(), group="Steps", help="The grid, in place of --steps: 999,750,500,250.")
@option(
    "--sigmas",
    type=_Numbers(),
    group="Steps",
    help="The grid as sigmas, with the end of the last step: 14.6,5,1.8,0.6,0. Flows omit the final 0.",
)
@option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    group="Output",
    help="table has six digits; csv and json have all.  [default: by the extension of -o, or table]",
)
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    group="Output",
    help="Write the table to FILE.",
)
@option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    group="Output",
    help="Also plot noise levels and coefficients to a .svg, .pdf or .png (needs latentrt[plot]).",
)
@option("--overwrite", is_flag=True, group="Output", help="Replace existing files.")
def schedule(
    sampler: str | None,
    config_path: Path | None,
    steps: int | None,
    karras: bool | None,
    eta: float | None,
    begin: int | None,
    timesteps: list[float] | None,
    sigmas: list[float] | None,
    mu: float | None,
    pairs: tuple[tuple[str, Any], ...],
    form: Format | None,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
) -> None:
    """Print the table of coefficients that a sampler runs, one row per model evaluation.

    \b
    With x the latents, m the model output and z noise, row k computes
      model input  = c_in x[k]                       at timestep t
      y[k]         = clip(p x[k] + q m, ±limit)
      h[k]         = u x[k] + w y[k]
      x[k+1]       = a x[k] + e x[k-1] + d m + b0 h[k] + b1 h[k-1] + … + s z
    """
    from latentrt.sampling.samplers import choose
    from latentrt.sampling.samplers import schedule as make_schedule

    _check_outputs(output, plot, overwrite=overwrite)
    given = {"eta": eta, "begin": begin, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    options = _merge_options({name: value for name, value in given.items() if value is not None}, pairs)
    count = _count_steps(steps, options)
    name, config = _choose_sampler(sampler, config_path)
    choice = choose(name)
    table = make_schedule(name, config, count, karras=karras, options=options)
    title = _make_title(choice, table, karras, options)
    form = form or _EXTENSIONS.get(output.suffix.lower() if output else "", "table")
    _write_outputs(table, title, form, output, plot)
    if choice.sampler.unsupported_reason:
        echo(f"the pipeline does not run {choice.name}: {choice.sampler.unsupported_reason}", err=True)


def _check_outputs(output: Path | None, plot: Path | None, *, overwrite: bool) -> None:
    """Check both output files before anything is written."""
    if plot is not None:
        from latentrt.cli.schedule_plot import check_plot_path

        check_plot_path(plot)
        if output is not None and output.resolve() == plot.resolve():
            raise OutputError(f"got {output} for both `output` and `plot`, expected two files")
    for option_name, path in (("output", output), ("plot", plot)):
        if path is not None and path.is_file() and not overwrite:
            from latentrt.cli.destinations import refuse_file

            raise refuse_file(path, option=option_name)


def _merge_options(given: Mapping[str, Any], pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Return the options with a flag of their own and those of --option, each at most once."""
    options = dict(given)
    for key, value in pairs:
        if key == "count":
            raise RequestError("got --option count, expected --steps")
        if key in options:
            raise RequestError(f"got {key} twice, expected it once")
        if key in _GRIDS and not isinstance(value, list | None):
            raise RequestError(f"got --option {key}={json.dumps(value)}, expected a list such as [999,500]")
        options[key] = value
    return options


def _count_steps(steps: int | None, options: Mapping[str, Any]) -> int:
    """Return the number of steps: as given, that of an explicit grid, or diffusers' default.

    Raises:
        RequestError: both a number and a grid were given.
    """
    grids = {name: options[name] for name in _GRIDS if options.get(name) is not None}
    for name, grid in grids.items():
        if steps is not None:
            raise RequestError(f"got --steps and `{name}`, which also sets the number of steps; leave out --steps")
        return max(len(grid), 1)
    return _DEFAULT_STEPS if steps is None else steps


def _choose_sampler(name: str | None, path: Path | None) -> tuple[str, dict[str, Any]]:
    """Return the name of the sampler, by default the configuration's class, and the configuration; {} without a file.

    Raises:
        RequestError: neither is given, or the file is not a configuration or names no class.
    """
    if path is None:
        if name is None:
            raise RequestError("got neither --sampler nor --config, expected one of them; see latentrt samplers")
        return name, {}
    config = read_scheduler_config(path)
    if name is None:
        name = config.get("_class_name")
        if not isinstance(name, str):
            value = "no _class_name" if name is None else f"_class_name {json.dumps(name)[:60]}"
            raise RequestError(f"{path} has {value}, expected the name of a diffusers scheduler; set --sampler")
    return name, config


def read_scheduler_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a scheduler configuration as diffusers writes it, which is Python's JSON: numbers may be `-Infinity`.

    Raises:
        RequestError: the file cannot be read, is larger than `MAX_CONFIG_BYTES`, or is not a JSON object; or the JSON
            is ambiguous (duplicate keys, NaN, a number beyond 64 bits).
    """
    try:
        with open_regular(path) as stream:
            data = read_at_most(stream, MAX_CONFIG_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; {_CONFIG_HINT}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise RequestError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes; {_CONFIG_HINT}")
    try:
        config = parse_json(data, infinity=True)
    except AmbiguousJSONError as error:
        raise RequestError(f"{path} {error}; {_CONFIG_HINT}") from None
    if not isinstance(config, dict):
        raise RequestError(f"{path} contains a {type(config).__name__}, expected a JSON object; {_CONFIG_HINT}")
    return config


def _make_title(choice: SamplerChoice, table: Schedule, karras: bool | None, options: Mapping[str, Any]) -> str:
    """Return a title of the sampler, the number of rows, and the options that differ from the configuration."""
    changed = {key: value for key, value in choice.options.items() if value != getattr(choice.sampler, key, None)}
    if karras is not None:
        changed["use_karras_sigmas"] = karras
    listed = "".join(f", {key} {json.dumps(value)}" for key, value in {**changed, **options}.items())
    title = f"{choice.name} ({choice.sampler.class_name}), {counted(len(table), 'row')}{listed}"
    return textwrap.shorten(title, _MAX_TITLE, placeholder=" …")


def _write_outputs(table: Schedule, title: str, form: Format, output: Path | None, plot: Path | None) -> None:
    """Write the table and the plot; both are rendered before the first file is written.

    Raises:
        OutputError: a file cannot be written. MissingExtraError: matplotlib is not installed.
    """
    from latentrt.sampling.schedule_table import format_schedule

    text = format_schedule(table, form, title)
    files = {} if output is None else {output: text.encode()}
    if plot is not None:
        from latentrt.cli.schedule_plot import render_plot

        files[plot] = render_plot(table, plot.suffix, title)
    for path, data in files.items():
        _write(path, data)
    if settings().json:
        echo_document(_as_document(table, title))
    elif output is None:
        echo_block(text)


def _as_document(table: Schedule, title: str) -> ScheduleDocument:
    """Return a table as a document, with the values of `format_json`."""
    from latentrt.sampling.schedule_table import format_json

    return ScheduleDocument(title=title, **json.loads(format_json(table)))


def _write(path: Path, data: bytes) -> None:
    from latentrt.bundle.atomic_file import write_atomically

    try:
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; an existing file is unchanged") from error
