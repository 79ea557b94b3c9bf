"""`latentrt samplers`: which samplers are there, what do they cost, and what else are they called?"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import printable

if TYPE_CHECKING:
    from latentrt.sampling.sampler_facts import OptionFact
    from latentrt.sampling.samplers import Choice

__all__ = ["samplers"]

_COLUMNS = 100  # where no terminal says its width, and the most that is used
_INDENT = 18
_COUNTS = (1, 10, 20, 50)  # steps that --json gives the evaluations of


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-v", "--verbose", is_flag=True, help="Also print the options of each, and what of a run it takes.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a program to read.")
def samplers(names: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """List the samplers, or those called NAME: what each is, the diffusers class whose configuration it reads and whose
    numbers it gives, which models it is for, what it costs, and its other names.

    A NAME is any that people know: euler_a, EulerAncestralDiscreteScheduler, "DPM++ 2M Karras".
    """
    from latentrt.sampling.samplers import SAMPLERS, choose

    asked = {name: choose(name) for name in names}
    shown = list(dict.fromkeys(choice.name for choice in asked.values())) or list(SAMPLERS)
    if as_json:
        # ASCII, as everywhere where a program reads.
        click.echo(json.dumps([_facts(name) for name in shown], indent=2, allow_nan=False))
        return
    for name in shown:
        _print_sampler(name, verbose=verbose)
        if verbose and name != shown[-1]:
            click.echo()
    click.echo()
    for note in _notes(asked):
        _print_wrapped(note)


def _facts(name: str) -> dict[str, Any]:
    from latentrt.sampling import sampler_facts
    from latentrt.sampling.samplers import SAMPLERS

    sampler = SAMPLERS[name]
    return {
        "name": name,
        "title": sampler.title,
        "class_name": sampler.class_name,
        "kind": sampler.kind,
        "aliases": _aliases(name),
        "endings": sampler_facts.endings(sampler),
        "evaluations_per_step": sampler_facts.cost(sampler),
        "evaluations": {str(count): sampler_facts.evaluations(sampler, count) for count in _COUNTS},
        "exception": sampler.exception or None,
        "takes": sorted(sampler.takes),
        "options": {fact.name: _option_facts(fact) for fact in sampler_facts.options(sampler)},
    }


def _aliases(name: str) -> dict[str, Mapping[str, Any]]:
    """Each other name, and what of the configuration it means."""
    from latentrt.sampling.samplers import aliases_of, choose

    return {alias: choose(alias).options for alias in aliases_of(name)}


def _option_facts(fact: OptionFact) -> dict[str, Any]:
    from latentrt.sampling.sampler_facts import REQUIRED, shown

    facts: dict[str, Any] = {"values": fact.values}
    if fact.choices is not None:
        facts["choices"] = list(fact.choices)
    if fact.default is not REQUIRED:
        # JSON has no infinity: as a text then.
        facts["default"] = shown(fact.default) if "Infinity" in shown(fact.default) else fact.default
    return facts


def _print_sampler(name: str, *, verbose: bool) -> None:
    from latentrt.sampling import sampler_facts
    from latentrt.sampling.samplers import SAMPLERS

    sampler = SAMPLERS[name]
    click.echo(f"{click.style(name.ljust(_INDENT - 2), bold=True)}  {sampler.title}")
    cost = f"cost {sampler_facts.cost(sampler)}"
    _print_wrapped(f"{sampler.class_name}, for {sampler.kind} models, {cost}", _INDENT)
    if others := [*_aliases(name), *(f"…{ending}" for ending in sampler_facts.endings(sampler))]:
        _print_wrapped(f"also {', '.join(others)}", _INDENT)
    if sampler.exception:
        _print_wrapped(f"more than a table: {sampler.exception}", _INDENT)
    if verbose:
        _print_wrapped(f"takes in a run {', '.join(['begin', *sorted(sampler.takes)])}", _INDENT)
        _print_options(sampler_facts.options(sampler))


def _print_options(facts: Sequence[OptionFact]) -> None:
    from latentrt.sampling.sampler_facts import shown

    names = max(len(fact.name) for fact in facts)
    defaults = max(len(shown(fact.default)) for fact in facts)
    for fact in facts:
        start = f"{'':4}{fact.name:<{names}}  {shown(fact.default):<{defaults}}  "
        _print_wrapped(start + fact.values, len(start), first=0)


def _notes(asked: Mapping[str, Choice]) -> Iterator[str]:
    for name, choice in asked.items():
        if meant := _meant(choice):
            yield f"{printable(name)} is {choice.name} with {meant}."
    yield (
        "Cost is evaluations of the model per step, with the default options; these are diffusers' own, and --verbose "
        "lists them. …_karras, …_exponential and …_beta go after any name of a sampler and spread its noise levels "
        'anew. Names as A1111 writes them are understood, too: "DPM++ 2M Karras".'
    )


def _meant(choice: Choice) -> str:
    """What a name says beyond the sampler's defaults."""
    changed = {key: value for key, value in choice.options.items() if value != getattr(choice.sampler, key, None)}
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in changed.items())


def _print_wrapped(text: str, indent: int = 0, first: int | None = None) -> None:
    columns = min(shutil.get_terminal_size((_COLUMNS, 24)).columns, _COLUMNS)
    click.echo(
        textwrap.fill(
            text,
            max(columns, indent + 20),
            initial_indent=" " * (indent if first is None else first),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
    )
