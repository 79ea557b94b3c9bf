"""The command `latentrt demo`: pictures of the sample bundle, which comes with the package."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

__all__ = ["PROMPTS", "demo"]

PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star on a black background",
    "a big green heart on a white background",
    "a purple triangle on a yellow background",
    "a white cross on a red background",
    "an orange square on the left on a green background",
    "a small black circle at the top on an orange background",
    "a green star left of a blue square",
    "a large red heart above a small white circle on a black background",
    "a yellow triangle below a purple square on a white background",
    "a white star to the right of an orange cross on a purple background",
    "a small blue circle on the left of a big black heart, yellow background",
)


@click.command()
@click.argument("prompt", nargs=-1)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo.png"),
    show_default=True,
    help="A .png, .jpg or .webp.",
)
@click.option("-n", "--negative-prompt", help="What to keep out of the pictures.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of the first picture; the next take the next.")
@click.option("--steps", type=int, help="Denoising steps. The bundle's 25 by default.")
@click.option("--sampler", help="One of `latentrt samplers`. The bundle's own scheduler by default.")
@click.option("--guidance-scale", type=float, help="Up to 1 there is no guidance. The bundle's 5 by default.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def demo(
    prompt: tuple[str, ...],
    output: Path,
    negative_prompt: str | None,
    seed: int,
    steps: int | None,
    sampler: str | None,
    guidance_scale: float | None,
    quiet: bool,
) -> None:
    """Draw each PROMPT, or a dozen that are there, with the sample bundle, and lay them out on one sheet.

    The bundle knows circles, squares, triangles, stars, hearts and crosses, one or two in a picture, in red, orange,
    yellow, green, blue, purple, white and black. Its pictures are 64 × 64 and enlarged here; `latentrt run` writes them
    as they are, and each says in its file how it was made.
    """
    from latentrt.bundle.sample import bundle_path
    from latentrt.cli.progress import latents_with_progress
    from latentrt.images.contact_sheet import contact_sheet
    from latentrt.images.files import check_output, save
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request

    began = time.monotonic()
    check_output(output)
    pipeline = Pipeline.load()
    prompts = prompt or PROMPTS
    request = pipeline.resolve(
        Request.of(
            prompt=prompts,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            seed=seed,
        )
    )
    result = pipeline.finish(request, latents_with_progress(pipeline, request, quiet=quiet))
    save(contact_sheet(result.images, prompts), output)
    if not quiet:
        flagged = sum(result.nsfw_content_detected or ())
        pictures = "1 picture" if len(prompts) == 1 else f"{len(prompts)} pictures"
        blocked = f", {flagged} of them blocked by the safety classifier" if flagged else ""
        click.echo(f"{output}: {pictures} in {time.monotonic() - began:.1f} s, loading included{blocked}")
        said = {
            "--seed": request.seeds[0],
            "-n": negative_prompt,
            "--steps": steps,
            "--sampler": sampler,
            "--guidance-scale": guidance_scale,
            "-o": "picture.png",
        }
        options = [str(part) for pair in said.items() if pair[1] is not None for part in pair]
        click.echo(f"the first alone: {shlex.join(['latentrt', 'run', str(bundle_path()), prompts[0], *options])}")
