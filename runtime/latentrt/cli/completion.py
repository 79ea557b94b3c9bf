"""The command `latentrt completion`: prints the script that completes commands, options and values in a shell."""

from __future__ import annotations

import click
import msgspec

from latentrt.cli.command import argument, command, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo_block

__all__ = ["CompletionDocument", "completion"]


class CompletionDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt completion --json`."""

    shell: str
    script: str


@command(
    examples=(
        "mkdir -p ~/.local/share/bash-completion/completions ~/.zfunc ~/.config/fish/completions",
        "latentrt completion bash > ~/.local/share/bash-completion/completions/latentrt",
        "latentrt completion zsh > ~/.zfunc/_latentrt    # with fpath+=~/.zfunc before compinit in ~/.zshrc",
        "latentrt completion fish > ~/.config/fish/completions/latentrt.fish",
        'eval "$(latentrt completion bash)"    # for this shell, or in ~/.bashrc',
    ),
    uses_file=False,
)
@argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, and values such as samplers, devices and bundles.

    The examples install it; start a new shell afterwards. bash needs version 4.4 or later, and the package
    bash-completion for the file; the last example works without the package.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click has a class for each choice"
    script = kind(context.find_root().command, {}, "latentrt", "_LATENTRT_COMPLETE").source()
    if settings().json:
        echo_document(CompletionDocument(shell=shell, script=script))
    else:
        echo_block(script)
