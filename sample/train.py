"""Trains the sample model and writes its checkpoint.

    python -m sample.train --work scratch/sample --output sample/checkpoint

Components are trained one after the other: text encoder, autoencoder, its decoder again, preview decoder, safety
classifier, denoiser. Stop it at any time and repeat the command: it resumes from the last state in the work folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from transformers import CLIPTokenizer

from sample import autoencoder, classifier, denoiser, models, preview_decoder, text_encoder
from sample.compiling import CompilerError, check_compiler
from sample.denoiser import POOL, make_pool
from sample.tokenizer import write_tokenizer
from sample.training import Plan, StateError, Workshop, check_state
from sample.write import check_place, write_checkpoint

SEED = 0
# In the order of training.
PLANS = (
    text_encoder.PLAN,
    autoencoder.PLAN,
    autoencoder.DECODER_PLAN,
    preview_decoder.PLAN,
    classifier.PLAN,
    denoiser.PLAN,
)
# The other components that the training of each requires.
NEEDS: dict[str, tuple[str, ...]] = {
    "text_encoder": (),
    "autoencoder": (),
    "decoder": ("autoencoder",),
    "preview_decoder": ("autoencoder",),
    "safety_checker": ("autoencoder", "decoder"),
    "denoiser": ("text_encoder", "autoencoder"),
}


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the states.")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint; replaced if it is there."
)
@click.option("--only", type=click.Choice([*NEEDS]), help="Train this one (and those it needs) and write nothing else.")
@click.option(
    "--length",
    type=click.FloatRange(min=0, min_open=True, max=100),
    default=1.0,
    show_default=True,
    help="Times as many steps as usual.",
)
@click.option(
    "--compile/--eager", "compiled", default=True, help="Compile the denoiser's step (needs a C++ compiler) or not."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(work: Path, output: Path, only: str | None, length: float, compiled: bool, device: str) -> None:
    """Train the sample model and write it as a diffusers folder.

    Text encoder, autoencoder, its decoder again, preview decoder, safety classifier, denoiser: an hour and a half on
    two CPU cores (docs/measurements.md). Interrupted with ctrl-C, the same command resumes from the last states in the
    work folder, which are written every 500 steps.
    """
    plans = {
        plan.name: replace(plan.times(length), compiled=compiled and plan.name == "denoiser")
        for plan in PLANS
        if only in (None, plan.name) or plan.name in NEEDS[only]
    }
    workshop = Workshop(work, Console(), device)
    try:
        # Fail before hours of training, not after.
        _check_device(device)
        work.mkdir(parents=True, exist_ok=True)
        check_place(output)
        for plan in plans.values():
            check_state(plan, workshop)
        if any(plan.compiled for plan in plans.values()):
            check_compiler(device)
        _train(plans, max(2, round(POOL * min(length, 1))), workshop, output if only is None else None)
    except (StateError, CompilerError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        workshop.console.print("stopped; the same command resumes from the last states", highlight=False)
        raise click.exceptions.Exit(130) from None


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    # torch asserts that it was compiled for a device, and raises RuntimeError where there is none.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.ClickException(
            f"got --device {device}, which torch does not have here ({reason}); expected cpu or another of its devices"
        ) from None


def _train(plans: dict[str, Plan], pool: int, workshop: Workshop, output: Path | None) -> None:
    write_tokenizer(workshop.folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(workshop.folder / "tokenizer")
    torch.manual_seed(SEED)
    encoder, vae = models.text_encoder(tokenizer.get_vocab()), models.autoencoder()
    unet, checker = models.unet(), models.safety_checker()
    tiny = models.preview_decoder()
    trainers: dict[str, Callable[[Plan], float]] = {
        "text_encoder": lambda plan: text_encoder.train_text_encoder(encoder, tokenizer, plan, workshop),
        "autoencoder": lambda plan: autoencoder.train_autoencoder(vae, plan, workshop),
        "decoder": lambda plan: autoencoder.train_decoder(vae, plan, workshop),
        "preview_decoder": lambda plan: preview_decoder.train_preview_decoder(tiny, vae, plan, workshop),
        "safety_checker": lambda plan: classifier.train_classifier(checker, vae, plan, workshop),
        "denoiser": lambda plan: denoiser.train_denoiser(
            unet, encoder, tokenizer, make_pool(vae, pool, workshop), plan, workshop
        ),
    }
    seconds = {component: trainers[component](plan) for component, plan in plans.items()}
    for component, took in seconds.items():
        workshop.console.print(f"{component:>14}: {took / 60:.1f} min")
    if output:
        write_checkpoint(output, encoder=encoder, autoencoder=vae, unet=unet, checker=checker, tiny=tiny)
        workshop.console.print(f"{output} is the checkpoint")


if __name__ == "__main__":
    main()
