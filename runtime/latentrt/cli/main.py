"""The command `latentrt`: a group that imports a command when it is called, so that help imports nothing heavy."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from latentrt import __version__
from latentrt.bundle.interrupts import TerminatedError, ending_on_signals, ignore_signals
from latentrt.cli.command import Group, describe_usage, report_error
from latentrt.cli.output import echo_error, redirect_warnings

__all__ = ["main"]

# heading of `--help` → name → (module and attribute of the click command, one line for `--help`)
_SECTIONS = {
    "Everyday": {
        "run": ("latentrt.cli.run:run", "Generate images from a bundle."),
        "demo": ("latentrt.cli.demo:demo", "Generate a sheet of images with the sample bundle."),
        "compare": ("latentrt.cli.compare:compare", "Generate one prompt with several samplers and step counts."),
        "inspect": ("latentrt.cli.inspect:inspect", "Print the contents of a bundle, or the metadata of an image."),
    },
    "Checkpoints and bundles": {
        "export": ("latentrt_export.command:export", "Turn a checkpoint into a bundle (needs latentrt[export])."),
        "pull": ("latentrt.cli.pull:pull", "Download a bundle from the Hugging Face hub (needs latentrt[hub])."),
        "push": ("latentrt.cli.push:push", "Upload a bundle to the Hugging Face hub (needs latentrt[hub])."),
        "verify": ("latentrt.cli.verify:verify", "Hash every file of a bundle and compare it with the manifest."),
    },
    "Samplers": {
        "samplers": ("latentrt.cli.samplers:samplers", "List the samplers: names, cost, options."),
        "schedule": ("latentrt.cli.schedule:schedule", "Print or plot the table of coefficients of a sampler."),
    },
    "Engines": {
        "build": ("latentrt_engines.cli.build:build", "Build TensorRT engines from a bundle (needs an extra)."),
        "plan": ("latentrt_engines.cli.plan:plan", "Print which engines a fleet of GPUs needs, and which are built."),
        "engines": ("latentrt_engines.cli.engines:engines", "List, explain, verify, prune, seal and refit engines."),
    },
    "Machine": {
        "doctor": ("latentrt.cli.doctor:doctor", "Print what this machine can run, and what to do next."),
        "bench": ("latentrt.cli.bench:bench", "Measure a bundle on each backend of this machine."),
        "config": ("latentrt.cli.config:config", "Print which options the configuration file sets, or write one."),
        "completion": ("latentrt.cli.completion:completion", "Print the script that completes commands in a shell."),
    },
}
_COMMANDS = {name: place for section in _SECTIONS.values() for name, place in section.items()}


class _LazyGroup(Group):
    """A group that lists its commands without importing them; a command is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _COMMANDS))
        for heading, commands in _SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, (_, text) in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = [name for name in _COMMANDS if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=_COMMANDS[name][1]) for name in names), *options]


@click.group(
    cls=_LazyGroup,
    examples=(
        "latentrt demo",
        'latentrt run sample "a red circle on a blue background"',
    ),
    epilog="latentrt COMMAND --help has the options of a command, with examples.",
)
@click.version_option(__version__, prog_name="latentrt")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def _group(debug: bool) -> None:
    """Stable Diffusion without torch: export a checkpoint to a bundle, run the bundle."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with 0, or with the error's exit code (`latentrt.errors`) and one line on stderr.

    SIGTERM and SIGHUP end it like Ctrl-C (`latentrt.bundle.interrupts`): unfinished files are removed, worker processes
    end, and the exit code is 128 and the signal's number.

    Args:
        args: the arguments; None: those of the process.
    """
    arguments = sys.argv[1:] if args is None else args
    _skip_openvino_converter()
    with redirect_warnings(), ending_on_signals():
        status = _run(arguments)
        if args is None and status > 128:
            ignore_signals()  # a further one would end this process on its last steps, with another code
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """Run a command and return its exit code; print its error."""
    try:
        status: Any = _group.main(arguments, prog_name="latentrt", standalone_mode=False)
    except click.UsageError as error:
        echo_error(f"error: {describe_usage(error)}")
        return error.exit_code
    except click.ClickException as error:
        echo_error(f"error: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        echo_error("interrupted")
        return 130
    except TerminatedError as end:
        echo_error(f"ended by {end.signal.name}")
        return 128 + end.signal
    except Exception as error:  # before a command was called; `Command.invoke` reports its own
        return report_error(error, {}, debug="--debug" in arguments)
    return status if isinstance(status, int) else 0


def _skip_openvino_converter() -> None:
    """Keep OpenVINO from importing its model converter: half of its import time, and no command uses it."""
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # None: it cannot be imported
