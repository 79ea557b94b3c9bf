"""Options that the commands `build`, `plan` and `engines` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from latentrt_engines.options import BuildOptions

__all__ = ["add_build_options", "add_gpu_options"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_BUILD_OPTIONS = (
    click.option("--component", multiple=True, help="Build this component only; may be given several times."),
    click.option(
        "--precision",
        type=click.Choice(["float16", "float32"]),
        help="Precision of the graph. The bundle's by default.",
    ),
    click.option(
        "--size",
        multiple=True,
        help="WIDTHxHEIGHT, a range 256..1024 (optimum at the bundle's size) or min:opt:max; may be given several "
        "times.",
    ),
    click.option(
        "--batch",
        default="1",
        show_default=True,
        help="Images at once: 4, 1..4 or min:opt:max as in 1:1:4; prompts of different lengths run separately.",
    ),
    click.option(
        "--chunks", default="1", show_default=True, help="Length of a prompt, in chunks of 75 tokens: 2, 1..3."
    ),
    click.option(
        "--guidance",
        type=click.Choice(["on", "off", "both"]),
        help="Classifier-free guidance. The bundle's by default.",
    ),
    click.option("--builder-optimization-level", type=int, default=3, show_default=True, help="0 to 5."),
    click.option("--workspace", help="Scratch memory of a layer, as in 2GiB. The library's own limit by default."),
    click.option("--version-compatible", is_flag=True, help="Plans that later releases of TensorRT also run."),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
        default="none",
        show_default=True,
        help="TensorRT plans that also run on other GPUs.",
    ),
    click.option("--refittable", is_flag=True, help="Plans whose weights can be replaced."),
    click.option("--weight-streaming", is_flag=True, help="Plans that can keep some of their weights in host memory."),
    click.option("--strip-weights", is_flag=True, help="Plans without weights, which are loaded from the bundle."),
    click.option("--tf32", is_flag=True, help="Allow TF32 in float32 products."),
    click.option(
        "--library",
        type=click.Choice(["tensorrt", "tensorrt_rtx"]),
        help="Library that builds. Chosen for the GPU by default.",
    ),
)


def add_build_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command the options of `BuildOptions`, which are passed to it as the argument `options`."""

    @functools.wraps(command)
    def collect(**given: Any) -> _R:
        options = BuildOptions(**{name: given.pop(name) for name in BuildOptions.__dataclass_fields__})
        return command(options=options, **given)

    for option in reversed(_BUILD_OPTIONS):
        collect = option(collect)
    return collect


def add_gpu_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--gpu` and `--compute-capabilities`, as the arguments `gpus` and `capabilities`."""
    for option in (
        click.option(
            "--compute-capabilities", "capabilities", help="Also build for these, as in 8.6,8.9 (TensorRT-RTX)."
        ),
        click.option(
            "--gpu",
            "--gpus",
            "gpus",
            help="GPUs to build for, as in rtx4090,rtx5090, one plan for all. This machine's by default.",
        ),
    ):
        command = option(command)
    return command
