"""`latentrt schedule`: what does a sampler do at each step?"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import counted, printable
from latentrt.cli.option import Option
from latentrt.errors import OutputError, RequestError

if TYPE_CHECKING:
    from latentrt.sampling.samplers import Choice
    from latentrt.sampling.schedule import Schedule
    from latentrt.sampling.schedule_table import Format

__all__ = ["schedule"]

_DEFAULT_STEPS = 50  # as diffusers' pipelines
_MAX_STEPS = 10_000
_MAX_TITLE = 100
_GRIDS = ("timesteps", "sigmas")
_EXTENSIONS: dict[str, Format] = {".json": "json", ".csv": "csv"}


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`999,750,500`"""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):  # click may convert twice
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"found {value!r}, expected numbers with commas between them, such as 999,750,500", param, ctx)


@click.command()
@click.option("--sampler", metavar="NAME", help="One of `latentrt samplers`, by any of its names.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A scheduler_config.json as diffusers saves it. Its class is the sampler where --sampler names no other. "
    "Without it, the options are the defaults of the sampler's diffusers class.",
)
@click.option(
    "--steps", type=click.IntRange(1, _MAX_STEPS), help=f"How many steps.  [default: {_DEFAULT_STEPS}, as in diffusers]"
)
@click.option(
    "--karras/--no-karras", default=None, help="Noise levels of Karras et al. The configuration's by default."
)
@click.option("--eta", type=float, help="How much fresh noise, 0 to 1, where a sampler takes it (ddim, tcd).")
@click.option("--begin", type=int, help="Leave out so many steps at the noisy end, as image to image does.")
@click.option("--timesteps", type=_Numbers(), help="The grid itself, in place of --steps: 999,750,500,250.")
@click.option(
    "--sigmas",
    type=_Numbers(),
    help="The same by noise levels, down to where the last step ends: 14.6,5,1.8,0.6,0. Flows end at 0 by themselves.",
)
@click.option("--mu", type=float, help="Logarithm of a flow's shift, with use_dynamic_shifting.")
@click.option(
    "--option",
    "pairs",
    type=Option(),
    multiple=True,
    help="A key of the configuration, such as solver_order=3, or what else a run takes, such as s_churn=10 "
    "(`latentrt samplers --verbose` lists both). VALUE is JSON, or a text. May be given again.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    help="table for people, with six digits; csv and json with all of them.  [default: what -o ends in, or table]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it there, not to stdout.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw noise levels and coefficients, too: a .svg, .pdf or .png (needs latentrt[plot]).",
)
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
) -> None:
    """Print the table of coefficients that a sampler runs: a row for each evaluation of the model.

    \b
    With x the latent, m the model's output and z noise, row k says
      model input  = c_in x[k]                       at timestep t
      y[k]         = clip(p x[k] + q m, ±limit)
      h[k]         = u x[k] + w y[k]
      x[k+1]       = a x[k] + e x[k-1] + d m + b0 h[k] + b1 h[k-1] + … + s z
    """
    from latentrt.sampling.samplers import choose

    _check_places(output, plot)
    given = {"eta": eta, "begin": begin, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    options = _options({name: value for name, value in given.items() if value is not None}, pairs)
    count = _count(steps, options)
    name, config = _named(sampler, config_path)
    choice = choose(name)
    table = _table(name, config, count, karras, options)
    title = _title(choice, table, karras, options)
    form = form or _EXTENSIONS.get(output.suffix.lower() if output else "", "table")
    _hand_over(table, title, form, output, plot)
    if choice.sampler.exception:
        click.echo(f"{choice.name} is more than this table: {choice.sampler.exception}", err=True)


def _check_places(output: Path | None, plot: Path | None) -> None:
    """Before the work, so that nothing is written where something else cannot be."""
    if plot is None:
        return
    from latentrt.sampling.schedule_plot import check_plot_place

    check_plot_place(plot)
    if output is not None and output.resolve() == plot.resolve():
        raise OutputError(f"found {output} for both -o and --plot, expected two files")


def _options(given: Mapping[str, Any], pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """What is asked by options of their own and by --option, each name once."""
    options = dict(given)
    for key, value in pairs:
        if key == "count":
            raise RequestError("found --option count, expected --steps")
        if key in options:
            raise RequestError(f"found {printable(key)} twice, expected it once; leave out one of them")
        if key in _GRIDS and not isinstance(value, list | None):
            raise RequestError(f"found --option {key}={json.dumps(value)}, expected a list such as [999,500]")
        options[key] = value
    return options


def _count(steps: int | None, options: Mapping[str, Any]) -> int:
    grids = {name: options[name] for name in _GRIDS if options.get(name) is not None}
    for name, grid in grids.items():
        if steps is not None:
            raise RequestError(f"found --steps and {name}, which say how many steps there are; leave out --steps")
        return max(len(grid), 1)
    return _DEFAULT_STEPS if steps is None else steps


def _named(name: str | None, path: Path | None) -> tuple[str, dict[str, Any]]:
    """The sampler's name, and the configuration for it."""
    from latentrt.sampling.scheduler_config import read_scheduler_config

    if path is None:
        if name is None:
            raise RequestError("found neither --sampler nor --config, expected one of them; see `latentrt samplers`")
        return name, {}
    config = read_scheduler_config(path)
    if name is None:
        name = config.get("_class_name")
        if not isinstance(name, str):
            found = "no _class_name" if name is None else f"_class_name {json.dumps(name)[:60]}"
            raise RequestError(
                f"{printable(str(path))} has {found}, expected the name of a diffusers scheduler; say which sampler "
                "with --sampler"
            )
    return name, config


def _table(
    name: str, config: Mapping[str, Any], count: int, karras: bool | None, options: Mapping[str, Any]
) -> Schedule:
    from latentrt.sampling import samplers

    return samplers.schedule(name, config, count, karras=karras, options=options)


def _title(choice: Choice, table: Schedule, karras: bool | None, options: Mapping[str, Any]) -> str:
    """What the table is of, and what was asked beyond the configuration."""
    asked = {key: value for key, value in choice.options.items() if value != getattr(choice.sampler, key, None)}
    if karras is not None:
        asked["use_karras_sigmas"] = karras
    said = "".join(f", {key} {json.dumps(value)}" for key, value in {**asked, **options}.items())
    title = f"{choice.name} ({choice.sampler.class_name}), {counted(len(table), 'row')}{said}"
    return textwrap.shorten(title, _MAX_TITLE, placeholder=" …")


def _hand_over(table: Schedule, title: str, form: Format, output: Path | None, plot: Path | None) -> None:
    """Everything is made before the first file is written."""
    from latentrt.sampling.schedule_table import written

    text = written(table, form, title)
    files = {} if output is None else {output: text.encode()}
    if plot is not None:
        from latentrt.sampling.schedule_plot import drawn

        files[plot] = drawn(table, plot.suffix, title)
    for path, data in files.items():
        _write(path, data)
    if output is None:
        click.echo(text, nl=False)


def _write(path: Path, data: bytes) -> None:
    from latentrt.bundle.atomic_file import write_atomically

    try:
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(
            f"{printable(str(path))} cannot be written: {error.strerror}; what was there is untouched"
        ) from error
