"""The forms of a checkpoint that `make test` exports in part only, each exported whole and compared with diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from latentrt import Bundle, Pipeline
from latentrt_export.export import export_checkpoint
from tests.exported import Exported, Silent, exporting_in_process
from tests.ldm import write_single_file
from tests.parity.pipelines import IGNORED_WARNINGS, LATENTS_BOUND
from tests.parity.test_text_to_image import oracle_of
from tests.tiny import Family, make_checkpoint

pytestmark = [pytest.mark.slow, IGNORED_WARNINGS]

CALL: dict[str, Any] = {"num_inference_steps": 4, "height": 72, "width": 88}


def single_file(checkpoint: Path, family: Family, folder: Path) -> Path:
    """The checkpoint as one file in the original layout."""
    return write_single_file(checkpoint, folder / "model.safetensors", family)


def hub_cache(checkpoint: Path, family: Family, folder: Path) -> Path:
    """The checkpoint as the hub's client keeps it: a snapshot of links to blobs."""
    snapshot = folder / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = folder / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    for path in (path for path in sorted(checkpoint.rglob("*")) if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(path.relative_to(checkpoint).parts) + 1)) / "blobs" / blob.name)
    return snapshot


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("form", [single_file, hub_cache])
def test_latents_equal_those_of_diffusers_from_the_folder(
    tmp_path: Path, family: Family, form: Callable[[Path, Family, Path], Path]
) -> None:
    folder = make_checkpoint(tmp_path / "folder", family, safety="none")
    given = form(folder, family, tmp_path)
    bundle = tmp_path / "bundle"
    config = folder if given.is_file() else None
    export_checkpoint(given, bundle, config=config, progress=Silent())
    expected, _ = oracle_of(Exported(family=family, checkpoint=folder, variant=None, bundle=bundle))(
        "euler_a", [7], prompt="a red circle", **CALL
    )
    pipeline = Pipeline.load(bundle)
    found = pipeline("a red circle", seed=7, sampler="euler_a", output_type="latent", safety="off", **CALL).images
    assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()
    assert pipeline.bundle.manifest.source.layout == ("single-file" if given.is_file() else "diffusers")


def several_vectors(folder: Path) -> None:
    """A textual inversion of three vectors that was saved with the pipeline."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    torch.manual_seed(0)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")


def shorter_chunks(folder: Path) -> None:
    """Chunks of 32 tokens before a text encoder of 77 positions."""
    place = folder / "tokenizer" / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_max_length": 32}))


@pytest.mark.parametrize("change", [several_vectors, shorter_chunks])
def test_prompts_of_other_tokenizers(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder, bundle = make_checkpoint(tmp_path / "folder", "sd1", safety="none"), tmp_path / "bundle"
    change(folder)
    with exporting_in_process():
        export_checkpoint(folder, bundle, parts=False, progress=Silent())
    call: dict[str, Any] = {"prompt": "a red <cat> circle", "negative_prompt": "<cat>", **CALL}
    expected, _ = oracle_of(Exported(family="sd1", checkpoint=folder, variant=None, bundle=bundle))(
        "euler_a", [7], **call
    )
    found = Pipeline.load(bundle)(seed=7, sampler="euler_a", output_type="latent", safety="off", **call).images
    assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()


def test_float16_of_an_sd1_is_close_to_its_float32(tmp_path: Path, sd1: Exported) -> None:
    bundle = tmp_path / "bundle"
    export_checkpoint(sd1.checkpoint, bundle, precision="float16", progress=Silent())
    assert set(Bundle.open(bundle).manifest.components["unet"].graphs) == {"float16", "float32"}
    call: dict[str, Any] = {"seed": 7, "output_type": "latent", **CALL}
    exact, half = (Pipeline.load(path)("a red circle", **call).images for path in (sd1.bundle, bundle))
    # The weights are rounded to 2**-11 each and guidance multiplies that error by 7.5.
    assert np.abs(half - exact).max() <= 3e-2 * np.abs(exact).max()
