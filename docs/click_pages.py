"""How the command line's reference shows a command: options under the headings of its help page, examples to copy."""

from __future__ import annotations

from typing import Any

import click
from sphinx.application import Sphinx

from latentrt.cli.command import COMMON_GROUP

__all__ = ["common_options", "setup"]


def common_options() -> list[tuple[str, str]]:
    """Return the options that every command has, each with its help."""
    from latentrt.cli.run import run

    with click.Context(run, info_name="run") as context:
        return [
            record for heading, record in _records(context) if heading == COMMON_GROUP and "--help" not in record[0]
        ]


def _records(context: click.Context) -> list[tuple[str, tuple[str, str]]]:
    """Return the heading, the spelling and the help of each option, as the help page has them."""
    options = [each for each in context.command.get_params(context) if isinstance(each, click.Option)]
    records = [(getattr(each, "group", "Options"), each.get_help_record(context)) for each in options]
    return [(heading, record) for heading, record in records if record is not None]


def _show_options(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    groups: dict[str, list[str]] = {}
    for heading, (spelling, text) in _records(context):
        if heading != COMMON_GROUP and "--help" not in spelling:
            shown = [f".. option:: {spelling.replace(' / ', ', ')}", "", f"   {_escape(text)}", ""]
            groups.setdefault(heading, []).extend(shown)
    lines.clear()
    for heading, options in groups.items():
        # All are below the heading "Options" of sphinx-click.
        lines += [*([] if heading == "Options" else [f"**{heading}**", ""]), *options]


def _escape(text: str) -> str:
    """Escape what reStructuredText would take for markup, except backticks, which mark code in help too."""
    return text.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("`", "``")


def _hide(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Remove the environment variables: they follow from the options' names, as the page on configuration says."""
    lines.clear()


def _show_examples(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    examples = getattr(context.command, "examples", ())
    if examples:
        lines[:] = [
            ".. rubric:: Examples",
            "",
            ".. code-block:: console",
            "",
            *(f"   $ {each}" for each in examples),
            "",
        ]


# As sphinx-click 6.2 spells the event that it emits; it registers `envvars`.
_ENVIRONMENT = "sphinx-click-process-envars"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with sphinx-click."""
    app.setup_extension("sphinx_click")
    app.add_event(_ENVIRONMENT)
    app.connect("sphinx-click-process-options", _show_options)
    app.connect(_ENVIRONMENT, _hide)
    app.connect("sphinx-click-process-envvars", _hide)
    app.connect("sphinx-click-process-epilog", _show_examples)
    return {"parallel_read_safe": True}
