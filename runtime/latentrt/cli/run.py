"""The command `latentrt run`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import counted
from latentrt.cli.option import Option
from latentrt.errors import RequestError

if TYPE_CHECKING:
    from latentrt.backends.cpu_choice import ComputePrecision
    from latentrt.backends.device import Device
    from latentrt.decode.safety import Verdict
    from latentrt.images.metadata import ImageRecord
    from latentrt.result import Result
    from latentrt.sampling.approximation import Decoder

__all__ = ["run"]


class _Seeds(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`7`, a list `7,9,11`, or a range with both ends `7..10`."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Sequence[int]:
        first, dots, last = value.partition("..")
        try:
            if dots:
                return range(int(first), int(last) + 1)
            return [int(part) for part in value.split(",")] if "," in value else int(value)
        except ValueError:
            self.fail(f"found {value!r}, expected a number, a list such as 7,9,11 or a range such as 7..10", param, ctx)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="A .png, .jpg or .webp; several pictures get a number.",
)
@click.option("-n", "--negative-prompt", help="What to keep out of the picture.")
@click.option("--seed", type=_Seeds(), help="A number, a list (7,9,11) or a range (7..10). Random by default.")
@click.option("--steps", type=int, help="Denoising steps. The bundle's default by default.")
@click.option("--sampler", help="One of `latentrt samplers`. The bundle's own scheduler by default.")
@click.option(
    "--sampler-option",
    "sampler_options",
    type=Option(),
    multiple=True,
    help="KEY=VALUE by diffusers' names, such as solver_order=3; may be given again.",
)
@click.option(
    "--karras/--no-karras", default=None, help="Noise levels of Karras et al. The bundle's configuration by default."
)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance; up to 1 there is none.")
@click.option(
    "--guidance-rescale", type=float, default=0.0, show_default=True, help="Brings guided contrast back, 0 to 1."
)
@click.option(
    "--guidance-start", type=float, default=0.0, show_default=True, help="No guidance before this share of the steps."
)
@click.option("--guidance-end", type=float, default=1.0, show_default=True, help="No guidance after it.")
@click.option(
    "--deep-cache",
    type=int,
    default=1,
    show_default=True,
    help="Compute the denoiser's deep layers every so many steps (a bundle exported with --deep-cache).",
)
@click.option(
    "--decoder",
    default="full",
    show_default=True,
    help="full, preview (of a bundle that has it), tiled (large pictures).",
)
@click.option("--eta", type=float, help="How much fresh noise DDIM (0 by default) or TCD (0.3) adds, 0 to 1.")
@click.option("--clip-skip", type=int, help="How many of the text encoder's last layers to leave out.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--images", type=int, help="Pictures per prompt.  [default: 1, or one for each seed]")
@click.option("--safety", help="What is done with a flagged picture: block, blur, report; off checks nothing.")
@click.option("--digest", help="sha256:… of the manifest: run this bundle and no other.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda (ONNX Runtime), openvino or tensorrt."
)
@click.option("--provider", help="One of ONNX Runtime's execution providers, by its name.")
@click.option("--threads", type=click.IntRange(min=1), help="One per core by default.")
@click.option("--precision", help="What a CPU computes in: float32, bfloat16 (OpenVINO), int8 (a bundle of int8).")
@click.option(
    "--low-memory", is_flag=True, help="Let each submodule go when it is done; decode in slices where that helps."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def run(
    bundle: Path,
    prompt: tuple[str, ...],
    output: Path,
    negative_prompt: str | None,
    seed: int | Sequence[int] | None,
    steps: int | None,
    sampler: str | None,
    sampler_options: tuple[tuple[str, Any], ...],
    karras: bool | None,
    guidance_scale: float | None,
    guidance_rescale: float,
    guidance_start: float,
    guidance_end: float,
    deep_cache: int,
    decoder: Decoder,
    eta: float | None,
    clip_skip: int | None,
    height: int | None,
    width: int | None,
    images: int | None,
    safety: str | None,
    digest: str | None,
    device: Device,
    provider: str | None,
    threads: int | None,
    precision: ComputePrecision | None,
    low_memory: bool,
    quiet: bool,
) -> None:
    """Draw one picture from BUNDLE for each PROMPT."""
    from latentrt.cli.drawing import latents_with_progress
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request
    from latentrt.result import check_places

    started = time.monotonic()
    pipeline = Pipeline.load(
        bundle,
        device=device,
        digest=digest,
        threads=threads,
        provider=provider,
        precision=precision,
        low_memory=low_memory,
    )
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        deep_cache=deep_cache,
        decoder=decoder,
        num_images_per_prompt=_images_per_prompt(images, seed, len(prompt)),
        eta=eta,
        clip_skip=clip_skip,
        seed=seed,
        sampler=sampler,
        sampler_options=dict(sampler_options),
        karras=karras,
        safety=safety,
    )
    order = pipeline.resolve(request)
    check_places(pipeline.bundle, order, output)
    result = pipeline.finish(order, latents_with_progress(pipeline, order, quiet=quiet))
    paths = result.save(output)
    if not quiet:
        _report(paths, result, time.monotonic() - started)
        _report_backends(pipeline.runs_on)


def _images_per_prompt(images: int | None, seed: int | Sequence[int] | None, prompts: int) -> int:
    if images is not None or not isinstance(seed, Sequence):
        return 1 if images is None else images
    if not seed:
        raise RequestError("found an empty range of seeds, expected the first not to be above the last, as in 7..10")
    if len(seed) % prompts:
        raise RequestError(
            f"found {len(seed)} seeds for {prompts} prompts, expected {prompts}, or a multiple of that, as each prompt "
            "gets as many"
        )
    return len(seed) // prompts


def _report(paths: list[Path], result: Result, seconds: float) -> None:
    verdicts = result.verdicts or [None] * len(paths)
    for path, record, verdict in zip(paths, result.records, verdicts, strict=True):
        words = f"{_sampler_words(record)}, {counted(record.num_inference_steps, 'step')}"
        click.echo(f"{path}: seed {record.seed}, {words}, safety {_safety_words(record.safety.policy, verdict)}")
    pictures = "1 picture" if len(paths) == 1 else f"{len(paths)} pictures"
    click.echo(f"{pictures} in {seconds:.1f} s, loading included", err=True)


def _sampler_words(record: ImageRecord) -> str:
    """Its name, and what of its configuration was changed and is not switched off."""
    changed = {"use_karras_sigmas": record.karras, **record.sampler_options}
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in changed.items() if value}
    words = [name if text == "true" else f"{name}={text}" for name, text in said.items()]
    return " ".join([record.sampler, *words])


def _report_backends(runs_on: Mapping[str, str]) -> None:
    for words in dict.fromkeys(runs_on.values()):
        components = [name for name, each in runs_on.items() if each == words]
        click.echo(f"{'all' if len(components) == len(runs_on) else ', '.join(components)} on {words}", err=True)


def _safety_words(policy: str, verdict: Verdict | None) -> str:
    if verdict is None:
        return "off"
    if not verdict.flagged:
        return f"{policy}: clear"
    concepts = ", ".join(map(str, verdict.concepts)) or "none"
    return f"{policy}: flagged, concepts {concepts}, highest score {max(verdict.concept_scores):+.3f}"
