"""Graphs, weights and documents → a bundle that is whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentrt import __version__
from latentrt.digests import file_record
from latentrt.errors import OutputError
from latentrt.manifest import (
    FORMAT_VERSION,
    Component,
    Defaults,
    LatentGeometry,
    Licence,
    Limits,
    Manifest,
    Precision,
    SchedulerRecord,
    Source,
    TokenizerRecord,
)
from latentrt.manifest_json import encode_manifest
from latentrt.samplers.ddim import DDIM
from latentrt.tokenizer import Tokenizer
from latentrt_export.checkpoint import Checkpoint, weight_files
from latentrt_export.onnxruntime_cpu import require
from latentrt_export.samples import PROMPTS
from latentrt_export.tokenizer import export_tokenizer
from latentrt_export.worker import SUBMODULES, Done, Job
from latentrt_export.workers import run_worker

__all__ = ["Progress", "write_bundle"]

_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class Progress(Protocol):
    """Who is told how an export goes."""

    def phase(self, submodule: str, text: str) -> None:
        """A submodule has come to this phase."""

    def done(self, submodule: str, component: Component) -> None:
        """A submodule is finished."""

    def warn(self, text: str) -> None:
        """Something a user should know and that does not stop the export."""


def write_bundle(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    precision: Precision,
    progress: Progress,
    safety_checker: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Export every submodule and write the bundle.

    Everything is made in a folder beside `destination`, which is renamed when it is complete: whatever happens on the way, no half
    bundle appears and what was there before is untouched.

    Args:
        checkpoint: what to export.
        destination: the bundle's folder.
        precision: of the weights, and of the arithmetic on a GPU.
        progress: told of phases, results and warnings.
        safety_checker: a classifier to take instead of the checkpoint's own.
        overwrite: replace a bundle that is there.

    Raises:
        CheckpointError, ExportError: the checkpoint cannot be exported.
        MissingExtraError: no ONNX Runtime is installed, so nothing could be proved.
        OutputError: the bundle cannot be written.
    """
    require()
    if destination.exists() and not overwrite:
        raise OutputError(f"{destination} exists; choose another place, or --overwrite to replace it when the new bundle is complete")
    with _staging(destination, overwrite=overwrite) as bundle:
        tokenizer = export_tokenizer(checkpoint.folder, bundle)
        documents = _copy_documents(checkpoint, bundle)
        results = _export_submodules(checkpoint, bundle, tokenizer, precision, progress, safety_checker)
        manifest = _manifest(checkpoint, bundle, tokenizer, documents, results, precision, safety_checker)
        _write_last(bundle / "bundle.json", encode_manifest(manifest))
    return manifest


@contextlib.contextmanager
def _staging(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder that takes `destination`'s place if the block ends well and vanishes if it does not."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.export-", dir=destination.parent))
    except OSError as error:
        raise OutputError(f"{destination.parent} cannot be written to: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _take_place(staging, destination, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"{destination} cannot be written: {error.strerror or error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, destination: Path, *, overwrite: bool) -> None:
    if not overwrite or not destination.exists():
        staging.rename(destination)
        return
    former = staging.with_name(f"{staging.name}.former")
    destination.rename(former)
    try:
        staging.rename(destination)
    except OSError:
        former.rename(destination)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_documents(checkpoint: Checkpoint, bundle: Path) -> Licence:
    for name, path in checkpoint.documents.items():
        shutil.copyfile(path, bundle / name)
    return Licence(name=checkpoint.licence, file="LICENSE" if "LICENSE" in checkpoint.documents else None)


def _export_submodules(
    checkpoint: Checkpoint,
    bundle: Path,
    tokenizer: TokenizerRecord,
    precision: Precision,
    progress: Progress,
    safety_checker: Path | None,
) -> dict[str, Done]:
    known = bundle.with_name(f"{bundle.name}.npz")
    _first_inputs(known, bundle, tokenizer, checkpoint.scheduler_config)
    results: dict[str, Done] = {}
    try:
        for name, (_, folder) in SUBMODULES.items():
            source = safety_checker if name == "safety_checker" and safety_checker is not None else checkpoint.folder
            if name == "safety_checker" and source is checkpoint.folder and not checkpoint.has_safety_checker:
                progress.warn("the checkpoint has no safety checker; its bundle will not run unless safety is switched off. --safety-checker PATH puts one in")
                continue
            job = Job(
                submodule=name,
                checkpoint=str(source.absolute()),
                variant=checkpoint.variants.get(folder) if source is checkpoint.folder else None,
                precision=precision,
                folder=str(bundle / name),
                prefix=f"{name}/",
                known=str(known),
            )
            results[name] = run_worker(job, _told(progress, name))
            progress.done(name, results[name].component)
    finally:
        known.unlink(missing_ok=True)
    return results


def _told(progress: Progress, name: str) -> Callable[[str], None]:
    return lambda text: progress.phase(name, text)


def _first_inputs(known: Path, bundle: Path, tokenizer: TokenizerRecord, scheduler_config: Mapping[str, Any]) -> None:
    """What the graphs are judged on begins with prompts and the noise levels that the model was trained on."""
    ids = Tokenizer.from_json((bundle / tokenizer.file).read_bytes(), tokenizer)
    noise = DDIM.read({key: value for key, value in scheduler_config.items() if key in _NOISE_KEYS})
    chunks = np.concatenate([ids.chunks(prompt)[:1] for prompt in PROMPTS])  # (P, 77)
    np.savez(known, input_ids=chunks, alphas_cumprod=noise.alphas_cumprod())


def _manifest(
    checkpoint: Checkpoint,
    bundle: Path,
    tokenizer: TokenizerRecord,
    licence: Licence,
    results: Mapping[str, Done],
    precision: Precision,
    safety_checker: Path | None,
) -> Manifest:
    facts = {key: value for done in results.values() for key, value in done.facts.items()}
    factor = facts["factor"]
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"latentrt {__version__}",
        family=facts["family"],
        source=Source(name=checkpoint.name, layout=checkpoint.layout, weights=_source_digests(checkpoint, safety_checker)),
        licence=licence,
        precision=precision,
        components={name: done.component for name, done in results.items()},
        tokenizer=tokenizer,
        scheduler=SchedulerRecord(class_name=checkpoint.scheduler_class, config=checkpoint.scheduler_config),
        latents=LatentGeometry(channels=facts["latent_channels"], factor=factor, scaling_factor=facts["scaling_factor"]),
        defaults=Defaults(height=facts["latent_height"] * factor, width=facts["latent_width"] * factor),
        limits=Limits(min_side=8 * factor, max_side=256 * factor, max_batch=32, max_steps=1000, max_clip_skip=facts["text_layers"]),
        files={name: file_record(bundle / name) for name in files},
    )


def _source_digests(checkpoint: Checkpoint, safety_checker: Path | None) -> dict[str, str]:
    files = [
        file
        for part, variant in checkpoint.variants.items()
        if not (part == "safety_checker" and safety_checker is not None)
        for file in weight_files(checkpoint.folder / part, variant)
    ]
    digests = {file.relative_to(checkpoint.folder).as_posix(): file_record(file).sha256 for file in files}
    for file in sorted(safety_checker.rglob("*.safetensors")) if safety_checker else ():
        digests[f"safety_checker/{file.name}"] = file_record(file).sha256
    return digests


def _write_last(path: Path, data: bytes) -> None:
    """The manifest makes a folder a bundle, so it appears in one go and after everything else is on the disk."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
