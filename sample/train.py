"""Make the sample checkpoint.

    python -m sample.train --work scratch/sample --output sample/checkpoint

Parts are trained one after the other: text encoder, autoencoder, its decoder once more, safety classifier,
denoiser. Stop it at any time and give the same command again: it goes on from the last state in the work folder.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console
from transformers import CLIPTokenizer

from sample import models
from sample.autoencoder import train_autoencoder, train_decoder
from sample.classifier import train_classifier
from sample.compiling import compile_step, run_eagerly
from sample.denoiser import make_pool, train_denoiser
from sample.text_encoder import train_text_encoder
from sample.tokenizer import write_tokenizer
from sample.write import check_place, write_checkpoint

STEPS = {"text_encoder": 1000, "autoencoder": 3500, "decoder": 1500, "safety_checker": 800, "denoiser": 7500}
SEED = 0
POOL = 49_152


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the states.")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint; replaced if it is there."
)
@click.option("--only", type=click.Choice([*STEPS]), help="Train this part (and what it needs) and write nothing else.")
@click.option("--length", type=float, default=1.0, show_default=True, help="Times as many steps as usual.")
@click.option(
    "--compile/--eager", "compile_", default=True, help="Compile the denoiser's step (needs a C++ compiler) or not."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(work: Path, output: Path, only: str | None, length: float, compile_: bool, device: str) -> None:
    """Train the sample model and write it as a diffusers folder."""
    console = Console()
    try:
        check_place(output)
    except FileExistsError as error:
        raise click.UsageError(f"{error}; give another --output") from None
    work.mkdir(parents=True, exist_ok=True)
    steps = {part: max(2, round(count * length)) for part, count in STEPS.items()}
    seconds: dict[str, float] = {}
    make = compile_step if compile_ else run_eagerly

    write_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(SEED)
    encoder, autoencoder = models.text_encoder(tokenizer.get_vocab()), models.autoencoder()
    unet, checker = models.unet(), models.safety_checker()
    if only in (None, "text_encoder", "denoiser"):
        count = steps["text_encoder"]
        seconds["text_encoder"] = train_text_encoder(encoder, tokenizer, count, work, console, device)
    if only != "text_encoder":
        count = steps["autoencoder"]
        seconds["autoencoder"] = train_autoencoder(autoencoder, count, work, console, device)
    if only in (None, "decoder", "safety_checker"):
        count = steps["decoder"]
        seconds["decoder"] = train_decoder(autoencoder, count, work, console, device)
    if only in (None, "safety_checker"):
        count = steps["safety_checker"]
        seconds["safety_checker"] = train_classifier(checker, autoencoder, count, work, console, device)
    if only in (None, "denoiser"):
        scenes, latents = make_pool(autoencoder, round(POOL * min(length, 1)), work, console, device)
        scale = 1 / float(latents.float().std())
        autoencoder.register_to_config(scaling_factor=scale)
        pool = scenes, latents * scale
        count = steps["denoiser"]
        seconds["denoiser"] = train_denoiser(unet, encoder, tokenizer, pool, count, work, console, device, make)
    for part, took in seconds.items():
        console.print(f"{part:>14}: {took / 60:.1f} min")
    if only is None:
        write_checkpoint(output, encoder=encoder, autoencoder=autoencoder, unet=unet, checker=checker)
        console.print(f"{output} is the checkpoint")


if __name__ == "__main__":
    main()
