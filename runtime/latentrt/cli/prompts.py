"""The argument PROMPT, and hints at mistakes in it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click

from latentrt.bundle.printable import quote
from latentrt.cli.command import typed_arguments

__all__ = ["prompt_argument", "prompts_argument"]

F = TypeVar("F", bound=Callable[..., Any])


def prompts_argument(function: F) -> F:
    """Add the argument PROMPT, which may be repeated, to a click command."""
    return click.argument("prompt", nargs=-1, callback=_check)(function)


def prompt_argument(function: F) -> F:
    """Add the argument PROMPT, which may be left out, to a click command."""
    return click.argument("prompt", required=False, callback=_check_one)(function)


def _check(ctx: click.Context, parameter: click.Parameter, prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts.

    Raises:
        click.UsageError: they are one unquoted prompt, or name a file of prompts; or a prompt is in the place of the
            bundle.
    """
    if ctx.resilient_parsing:
        return prompts
    if not prompts:
        _check_bundle(ctx)
    if len(prompts) > 1 and all(len(each.split()) == 1 for each in prompts):
        several = "; several prompts of one word each: --prompts FILE" if _has_file(ctx) else ""
        raise click.UsageError(
            f"got {len(prompts)} prompts of one word each, expected quotes around a prompt: "
            f"{_quoted_line(ctx, prompts)}{several}",
            ctx,
        )
    for each in prompts:
        if each.startswith("@") and os.path.isfile(each[1:]):
            hint = f"--prompts {shlex.quote(each[1:])}" if _has_file(ctx) else "the text of the file"
            raise click.UsageError(f"got the prompt {quote(each)}, which names a file; expected {hint}", ctx)
    return prompts


def _check_one(ctx: click.Context, parameter: click.Parameter, prompt: str | None) -> str | None:
    if prompt is None and not ctx.resilient_parsing:
        _check_bundle(ctx)
    return prompt


def _check_bundle(ctx: click.Context) -> None:
    """Refuse a prompt in the place of the bundle: a text of several words that is no folder."""
    bundle = ctx.params.get("bundle")
    if bundle is not None and len(str(bundle).split()) > 1 and not os.path.lexists(bundle):
        line = shlex.join([*ctx.command_path.split(), "sample", str(bundle)])
        raise click.UsageError(
            f"got {quote(str(bundle))} as the bundle, expected a folder or sample before the prompt: {line}", ctx
        )


def _has_file(ctx: click.Context) -> bool:
    return any("--prompts" in each.opts for each in ctx.command.params)


def _quoted_line(ctx: click.Context, prompts: tuple[str, ...]) -> str:
    """Return the command line as it was typed, with its last words as one argument."""
    arguments, positions = typed_arguments(ctx)
    first, *others = positions[-len(prompts) :]
    words = [" ".join(prompts) if index == first else each for index, each in enumerate(arguments)]
    return shlex.join([*ctx.command_path.split(), *(each for index, each in enumerate(words) if index not in others)])
