"""How does a checkpoint become a bundle? Newcomers start here."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from latentrt.manifest import Manifest, Precision
from latentrt_export.checkpoint import Checkpoint, open_checkpoint
from latentrt_export.write import Progress, write_bundle

__all__ = ["export_checkpoint"]


def export_checkpoint(
    checkpoint: Path,
    bundle: Path,
    *,
    progress: Progress,
    precision: Precision = "float32",
    variant: str | None = None,
    safety_checker: Path | None = None,
    prediction_type: str | None = None,
    config: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Export a checkpoint.

    Args:
        checkpoint: a diffusers folder, or a single `.safetensors` file of Stable Diffusion 1.x or 2.x.
        bundle: the folder to make.
        progress: told of phases, results and warnings.
        precision: `float32`, or `float16` for half weights with a half graph and a float32 one over them.
        variant: which weight files of a folder to take (`fp16`).
        safety_checker: a classifier to take instead of the checkpoint's own: its folder, or a checkpoint that has one.
        prediction_type: what a single-file model was trained to predict, where the file does not say.
        config: a diffusers folder whose configurations describe a single file; by default those of SD 1.x and 2.x.
        overwrite: replace a bundle that is there, once the new one is complete.

    Returns:
        The bundle's manifest.

    Raises:
        LatentRTError: see `latentrt.errors`; nothing was written and nothing that was there has changed.
    """
    with _opened(checkpoint, bundle, variant=variant, prediction_type=prediction_type, config=config) as opened:
        if opened.licence == "unknown":
            progress.warn("no licence was found beside the checkpoint; the bundle will say 'unknown'. Find out before you ship it")
        return write_bundle(
            opened, bundle, precision=precision, progress=progress, safety_checker=safety_checker, overwrite=overwrite
        )


@contextlib.contextmanager
def _opened(
    path: Path, bundle: Path, *, variant: str | None, prediction_type: str | None, config: Path | None
) -> Iterator[Checkpoint]:
    if path.is_dir() or not path.exists():
        yield open_checkpoint(path, variant=variant)
        return
    from latentrt_export import single_file

    # Beside the bundle, where there has to be room for weights anyway: a temporary file system is often memory.
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.unpacked-", dir=bundle.absolute().parent) as folder:
        single_file.unpack(path, Path(folder), prediction_type=prediction_type, config=config)
        yield open_checkpoint(Path(folder), name=path.stem, layout="single-file")
