"""Command-line options of a request, generated from its declarations (`latentrt.request`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.core import ParameterSource

from latentrt.cli.command import option, set_by, spell
from latentrt.cli.values import HeightWidth, ImageSize, KeyValue, Position, Suggested
from latentrt.request import OPTIONS, OneOf, Option

if TYPE_CHECKING:
    from latentrt.backends.placement import ComputePrecision, Device
    from latentrt.pipeline import Pipeline

__all__ = [
    "SPELLING",
    "LoadOptions",
    "command_spelling",
    "devices",
    "digest_option",
    "given_options",
    "load_options",
    "precision_options",
    "providers",
    "request_options",
    "samplers",
]

F = TypeVar("F", bound=Callable[..., Any])

_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "text": str,
    "path": click.Path(path_type=Path),
    "size": HeightWidth(),
    "position": Position(),
}
_SHORT = {"negative_prompt": "-n", "width": "-W", "height": "-H"}
_GROUPS = {
    "prompt": "Prompt",
    "size": "Image size",
    "micro_conditioning": "Stable Diffusion XL",
    "sampling": "Sampling",
    "guidance": "Guidance",
    "start": "Input image",
    "acceleration": "Speed",
}
_SIZE = ("width", "height")

# Python keyword → spelling on the command line, for error messages.
SPELLING: dict[str, str] = {
    **{each.keyword: each.flag for each in OPTIONS.values() if each.flag is not None},
    "prompt": "PROMPT",
    "seed": "--seed",
    "num_images_per_prompt": "--count",
    **{name: f"--{name}" for name in ("device", "digest", "precision", "provider", "threads")},
}


def command_spelling(command: click.Command) -> dict[str, str]:
    """Return the spelling of a command's own options by Python keyword, such as `parts=False` → `--no-parts`."""
    spelling, plurals = {}, {}
    for parameter in command.params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("--no-"):
                spelling[f"{flag.removeprefix('--no-').replace('-', '_')}=False"] = flag
            elif flag.startswith("--"):
                spelling[parameter.name or ""] = flag
                if flag.endswith("s"):  # `--samplers` takes several of the keyword `sampler`
                    plurals[flag.removeprefix("--").removesuffix("s").replace("-", "_")] = flag
    arguments = {each.name for each in command.params if isinstance(each, click.Argument)}
    plurals = {name: flag for name, flag in plurals.items() if name not in arguments}
    return plurals | spelling  # an option's own spelling wins: `--image` over `--images`


def request_options(*keywords: str) -> Callable[[F], F]:
    """Return a decorator that adds options to a click command.

    With `width` and `height` it also adds `--size`, which sets both.

    Args:
        keywords: of the options; none: all that have a flag.
    """
    chosen = [OPTIONS[keyword] for keyword in keywords] or [each for each in OPTIONS.values() if each.flag]
    chosen.sort(key=lambda each: each.keyword == "height")  # after the width, as sizes are written

    def decorate(function: F) -> F:
        if sized := {*_SIZE} <= {each.keyword for each in chosen}:
            function = _apply_size(function)
        for each in reversed(chosen):
            if each.keyword == _SIZE[-1] and sized:
                text = "Width and height, as in 768x512; 512 is a square."
                function = option("--size", type=ImageSize(), group=_GROUPS["size"], help=text)(function)
            function = _click_option(each)(function)
        return function

    return decorate


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of `Pipeline.load`, as a command has them.

    Attributes:
        device, provider, threads, precision, low_memory, digest: as `Pipeline.load` takes them.
    """

    device: Device
    provider: str | None
    threads: int | None
    precision: ComputePrecision | None
    low_memory: bool
    digest: str | None

    def load(self, bundle: Path | None) -> Pipeline:
        """Return the pipeline of a bundle; None: of the sample bundle.

        Raises:
            BundleError, BackendError, EngineError: as `Pipeline.load` does.
        """
        from latentrt.pipeline import Pipeline

        return Pipeline.load(bundle, **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)})


def load_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `Pipeline.load` to a click command, which gets them as `machine: LoadOptions`."""

    @functools.wraps(function)
    def with_machine(**given: Any) -> Any:
        machine = LoadOptions(**{each.name: given.pop(each.name) for each in dataclasses.fields(LoadOptions)})
        return function(machine=machine, **given)

    for decorate in reversed(
        (
            option(
                "--device",
                type=Suggested(devices),
                default="auto",
                group="Machine",
                help="auto, cpu or cuda (ONNX Runtime), openvino or tensorrt.",
            ),
            option(
                "--provider",
                type=Suggested(providers),
                group="Machine",
                help="One of ONNX Runtime's execution providers, by its name.",
            ),
            option(
                "--threads", type=click.IntRange(min=1), group="Machine", help="On the CPU. One per core by default."
            ),
            precision_options,
            digest_option,
        )
    ):
        with_machine = decorate(with_machine)
    return with_machine


def precision_options(function: F) -> F:
    """Add `--precision` and `--low-memory` to a click command."""
    low_memory = option(
        "--low-memory",
        is_flag=True,
        group="Machine",
        help="Release each component after its use; decode in slices where that saves memory.",
    )
    precision = option(
        "--precision",
        type=Suggested(_precisions),
        group="Machine",
        help="Arithmetic on a CPU: float32, bfloat16 (OpenVINO) or int8 (int8 bundles).",
    )
    return precision(low_memory(function))


def digest_option(function: F) -> F:
    """Add `--digest` to a click command."""
    text = "Expected digest of bundle.json, as `latentrt verify` prints it."
    return option("--digest", metavar="sha256:…", group="Machine", help=text)(function)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as keywords of `Request.of`."""
    given = {keyword: value for keyword, value in options.items() if value is not None and value != ()}
    return {key: dict(value) if OPTIONS[key].check.kind == "pairs" else value for key, value in given.items()}


def samplers() -> Iterable[str]:
    """Return the names of the samplers."""
    from latentrt.sampling.samplers import SAMPLERS

    return SAMPLERS


def _policies() -> Iterable[str]:
    """Return the policies for a flagged image."""
    from latentrt.decode.safety import Policy

    return get_args(Policy)


def devices() -> Iterable[str]:
    """Return the names of the devices."""
    from latentrt.backends.placement import Device

    return get_args(Device)


def _precisions() -> Iterable[str]:
    from latentrt.backends.placement import ComputePrecision

    return get_args(ComputePrecision)


def providers() -> Iterable[str]:
    """Return the names of ONNX Runtime's execution providers on this machine."""
    from latentrt.backends.onnxruntime import available_providers
    from latentrt.errors import BackendError

    try:
        return available_providers()
    except BackendError:
        return ()


_SUGGESTED = {"sampler": samplers, "safety": _policies}


def _apply_size(function: Callable[..., Any]) -> Any:
    """Return the function of a command with `--size` as its width and height.

    What was set nearer to the user wins: `-W` on the command line over `size` in the configuration file.
    """

    @functools.wraps(function)
    def with_size(*, size: tuple[int, int] | None, **given: Any) -> Any:
        if size is not None:
            context = click.get_current_context()
            options = {each.name: each for each in context.command.params}
            own = _nearness(context, "size")
            for name, value in zip(_SIZE, size, strict=True):
                other = _nearness(context, name)
                if given[name] is not None and other == own:
                    raise click.UsageError(
                        f"got {spell(context, options['size'])} and {spell(context, options[name])}, expected one of "
                        "the two",
                        context,
                    )
                if given[name] is None or own > other:
                    given[name] = value
                    set_by(context, name, "size")
        return function(**given)

    return with_size


def _nearness(ctx: click.Context, name: str) -> int:
    order = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT)
    source = ctx.get_parameter_source(name)
    return order.index(source) if source in order else len(order)


def _click_option(made: Option) -> Callable[[F], F]:
    kind = made.check.kind
    assert made.flag is not None, "only options with a flag are on the command line"
    flags = [made.flag]
    group = _GROUPS[made.path[0]] if len(made.path) > 1 else "Safety"
    settings: dict[str, Any] = {"default": None, "help": made.help, "group": group}
    if made.default is not None:
        settings["help"] += f"  [default: {made.default}]"
    if kind == "switch":
        flags = [f"{made.flag}/--no-{made.flag.removeprefix('--')}"]
    elif kind == "pairs":
        settings |= {"type": KeyValue(), "multiple": True, "help": f"{made.help}  May be repeated."}
        del settings["default"]
    elif isinstance(made.check, OneOf):
        settings["type"] = Suggested(lambda names=made.check.names: names)  # type: ignore[misc]  # bound now
    elif made.keyword in _SUGGESTED:
        settings["type"] = Suggested(_SUGGESTED[made.keyword])
    else:
        settings["type"] = _TYPES[kind]
    if made.keyword in _SHORT:
        flags.insert(0, _SHORT[made.keyword])
    return option(*flags, made.keyword, **settings)
