"""Options that the commands `build`, `plan` and `engines` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import click

from latentrt.cli.command import option
from latentrt.cli.values import Suggested
from latentrt_engines.options import BuildOptions

__all__ = ["add_build_options", "add_gpu_options", "gpu_names"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SIZE, _BUILDER, _TARGET = "Images", "Builder", "Engines"
_BUILD_OPTIONS = (
    option("-W", "--width", type=click.IntRange(min=1), group=_SIZE, help="Width in pixels. The bundle's default."),
    option("-H", "--height", type=click.IntRange(min=1), group=_SIZE, help="Height in pixels. The bundle's default."),
    option(
        "--size",
        multiple=True,
        group=_SIZE,
        help="Width and height, as in 768x512; 512 is a square, 256..1024 a range (optimum at the bundle's size), "
        "min:opt:max a range with its optimum; may be given several times.",
    ),
    option(
        "--batch",
        default="1",
        group=_SIZE,
        help="Images at once: 4, 1..4 or min:opt:max as in 1:1:4; prompts of different lengths run separately.",
    ),
    option("--chunks", default="1", group=_SIZE, help="Length of a prompt, in chunks of 75 tokens: 2, 1..3."),
    option(
        "--guidance",
        type=click.Choice(["on", "off", "both"]),
        group=_SIZE,
        help="Classifier-free guidance. The bundle's by default.",
    ),
    option(
        "--component",
        multiple=True,
        group=_TARGET,
        help="Build this component only; may be given several times.",
    ),
    option(
        "--precision",
        type=click.Choice(["float16", "float32"]),
        group=_TARGET,
        help="Precision of the graph. The bundle's by default.",
    ),
    option(
        "--library",
        type=click.Choice(["tensorrt", "tensorrt_rtx"]),
        group=_TARGET,
        help="Library that builds. Chosen for the GPU by default.",
    ),
    option(
        "--builder-optimization-level", type=click.IntRange(0, 5), default=3, group=_BUILDER, help="Higher: slower."
    ),
    option("--workspace", group=_BUILDER, help="Scratch memory of a layer, as in 2GiB. The library's own by default."),
    option(
        "--version-compatible",
        is_flag=True,
        group=_BUILDER,
        help="Plans that later releases of TensorRT also run.",
    ),
    option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
        default="none",
        group=_BUILDER,
        help="TensorRT plans that also run on other GPUs.",
    ),
    option("--refittable", is_flag=True, group=_BUILDER, help="Plans whose weights can be replaced."),
    option(
        "--weight-streaming",
        is_flag=True,
        group=_BUILDER,
        help="Plans that can keep some of their weights in host memory.",
    ),
    option(
        "--strip-weights",
        is_flag=True,
        group=_BUILDER,
        help="Plans without weights, which are loaded from the bundle.",
    ),
    option("--tf32", is_flag=True, group=_BUILDER, help="Allow TF32 in float32 products."),
)


def gpu_names() -> Iterable[str]:
    """Return the names of GPU models."""
    from latentrt_engines.gpus import GPUS

    return GPUS


def add_build_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command the options of `BuildOptions`, which are passed to it as the argument `options`."""

    @functools.wraps(command)
    def collect(**given: Any) -> _R:
        options = BuildOptions(**{name: given.pop(name) for name in BuildOptions.__dataclass_fields__})
        return command(options=options, **given)

    for decorate in reversed(_BUILD_OPTIONS):
        collect = decorate(collect)
    return collect


def add_gpu_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--gpu` and `--compute-capabilities`, as the arguments `gpus` and `capabilities`."""
    for decorate in (
        option(
            "--compute-capabilities",
            "capabilities",
            group=_TARGET,
            help="Also build for these, as in 8.6,8.9 (TensorRT-RTX).",
        ),
        option(
            "--gpu",
            "--gpus",
            "gpus",
            type=Suggested(gpu_names, several=True),
            group=_TARGET,
            help="GPUs to build for, as in rtx4090,rtx5090, one plan for all. This machine's by default.",
        ),
    ):
        command = decorate(command)
    return command
