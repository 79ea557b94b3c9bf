"""The command `latentrt`: a group that imports a command when it is called, so that help imports nothing heavy."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from latentrt import __version__
from latentrt.bundle.interrupts import TerminatedError, ending_on_signals, ignore_signals
from latentrt.cli.output import echo_block, echo_error, echo_traceback, redirect_warnings
from latentrt.errors import LatentRTError

__all__ = ["main"]

# name → (module and attribute of the click command, one line for `--help`)
_COMMANDS = {
    "bench": ("latentrt.cli.bench:bench", "Measure a bundle on each backend that this machine can run."),
    "build": (
        "latentrt_engines.cli.build:build",
        "Build TensorRT engines from a bundle (needs a library's extra).",
    ),
    "compare": (
        "latentrt.cli.compare:compare",
        "Generate one prompt with several samplers and step counts, on one sheet, with their times.",
    ),
    "demo": (
        "latentrt.cli.demo:demo",
        "Generate a sheet of images with the sample bundle that ships with the package.",
    ),
    "doctor": (
        "latentrt.cli.doctor:doctor",
        "Print what this machine can run, and how to enable the rest.",
    ),
    "engines": ("latentrt_engines.cli.engines:engines", "List, explain, verify, prune, seal and refit engines."),
    "export": ("latentrt_export.command:export", "Turn a checkpoint into a bundle (needs latentrt[export])."),
    "inspect": ("latentrt.cli.inspect:inspect", "Print the contents of a bundle, or the metadata of an image."),
    "plan": ("latentrt_engines.cli.plan:plan", "Print which engines a fleet of GPUs needs, and which are built."),
    "run": ("latentrt.cli.run:run", "Generate images from a bundle."),
    "samplers": ("latentrt.cli.samplers:samplers", "List the samplers: names, cost, options."),
    "schedule": ("latentrt.cli.schedule:schedule", "Print or plot the table of coefficients that a sampler runs."),
    "verify": ("latentrt.cli.verify:verify", "Hash every file of a bundle and compare it with the manifest."),
}


class _LazyGroup(click.Group):
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
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="latentrt")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def _group(context: click.Context, debug: bool) -> None:
    """Stable Diffusion without torch: export a checkpoint to a bundle, run the bundle."""
    if context.invoked_subcommand is None:
        echo_block(context.get_help())


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with 0, or with the error's exit code (`latentrt.errors`) and one line on stderr.

    SIGTERM and SIGHUP end it like Ctrl-C (`latentrt.bundle.interrupts`): unfinished files are removed, worker processes
    end, and the exit code is 128 and the signal's number.

    Args:
        args: the arguments; None: those of the process.
    """
    given = sys.argv[1:] if args is None else args
    _skip_openvino_converter()
    # Also accepted at the end, where a user appends it to a command that failed.
    debug = given[:1] == ["--debug"] or given[-1:] == ["--debug"]
    arguments = given[:-1] if given[-1:] == ["--debug"] else given
    with redirect_warnings(), ending_on_signals():
        status = _run(arguments, debug=debug)
        if args is None and status > 128:
            ignore_signals()  # a further one would end this process on its last steps, with another code
    sys.exit(status)


def _run(arguments: list[str], *, debug: bool) -> int:
    """Run a command and return its exit code; print its error."""
    try:
        status: Any = _group.main(arguments, prog_name="latentrt", standalone_mode=False)
    except click.ClickException as error:
        echo_error(f"error: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        echo_error("interrupted")
        return 130
    except TerminatedError as end:
        echo_error(f"ended by {end.signal.name}")
        return 128 + end.signal
    except Exception as error:
        if debug:
            echo_traceback(error)
        return _report_failure(error, arguments)
    return status if isinstance(status, int) else 0


def _skip_openvino_converter() -> None:
    """Keep OpenVINO from importing its model converter: half of its import time, and no command uses it."""
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # None: it cannot be imported


def _find_command(arguments: list[str]) -> click.Command:
    """Return the command that the arguments call."""
    command: click.Command = _group
    for argument in arguments:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), argument) or command
    return command


def _report_failure(error: Exception, arguments: list[str]) -> int:
    """Print an error and return its exit code."""
    if isinstance(error, LatentRTError):
        from latentrt.cli.request_options import SPELLING, command_spelling

        echo_error(f"error: {error.describe({**SPELLING, **command_spelling(_find_command(arguments))})}")
        return error.exit_code
    echo_error(f"error: {type(error).__name__}: {error}")
    echo_error("This is a defect of latentrt; --debug shows where.")
    return 1
