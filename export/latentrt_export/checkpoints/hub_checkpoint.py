"""Downloads a checkpoint, and components beside it, from the Hugging Face hub: the files that an export reads.

Configurations come first. The weights are chosen by their names in the repository's listing with the rules of
`weights`, so that a repository without safetensors, or of a pipeline that is not supported, is refused before anything
large is downloaded. Files are stored in the hub's cache, where other programs find them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from latentrt.bundle.digests import ByteProgress
from latentrt.bundle.manifest import MANIFEST_NAME
from latentrt.errors import CheckpointError
from latentrt.hub import HubPath, open_repository
from latentrt_export.checkpoints.checkpoint import (
    GivenComponents,
    PipelineClass,
    WantedComponents,
    check_classes,
    is_document,
    read_model_index,
)
from latentrt_export.checkpoints.file_content import PICKLE_SUFFIXES, PickleError, make_pickle_error
from latentrt_export.checkpoints.tokenizer import TOKENIZER_FILES
from latentrt_export.checkpoints.weights import choose_files, read_shards

__all__ = ["Downloads", "Inputs", "fetch_inputs"]

_DIFFUSERS_STEM, _TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_PREPROCESSOR = "preprocessor_config.json"
_GIVEN = ("vae", "safety_checker")
_MAX_LISTED = 5
# As `checkpoint_files` allows; a tokenizer.json of a large vocabulary has 20 MB.
_MAX_SMALL_BYTES = 64 << 20


class Downloads(Protocol):
    """A receiver of the progress of downloads."""

    def download(self, title: str, size: int) -> AbstractContextManager[ByteProgress]:
        """Report a download of so many bytes within the block, which calls the result with the bytes that came."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of an export, all of them local.

    Attributes:
        checkpoint, given, config: as for `export_checkpoint`.
        documents: the folder with the licence and the model card of a checkpoint that is a part of a repository.
    """

    checkpoint: Path
    given: GivenComponents
    config: Path | None
    documents: Path | None = None


def fetch_inputs(
    checkpoint: Path | HubPath,
    wanted: WantedComponents,
    config: Path | HubPath | None,
    *,
    pipelines: Mapping[str, PipelineClass],
    refusals: Mapping[str, str],
    variant: str | None,
    downloads: Downloads,
) -> Inputs:
    """Download the inputs of an export that are on the hub.

    Args:
        checkpoint, wanted, config: as for `export_checkpoint`.
        pipelines, refusals, variant: as for `open_checkpoint`.
        downloads: notified of the progress.

    Raises:
        CheckpointError: a repository has no checkpoint, or no such component, that can be exported.
        HubError: a repository cannot be read.
        OutputError: the disk has no room.
    """

    def fetch(place: Path | HubPath | None, choose: Choose) -> Path | None:
        if not isinstance(place, HubPath):
            return place
        return _Source(place, downloads).fetch(choose)

    # The small ones first: a name with a mistake shows before gigabytes come.
    vae = fetch(wanted.vae, lambda source: source.choose_vae(variant))
    safety_checker = fetch(wanted.safety_checker, lambda source: source.choose_classifier(variant))
    preview_decoder = fetch(wanted.preview_decoder, lambda source: source.choose_preview_decoder(variant))
    configured = fetch(config, lambda source: source.choose_config())
    given = GivenComponents(vae=vae, safety_checker=safety_checker, preview_decoder=preview_decoder)
    if not isinstance(checkpoint, HubPath):
        return Inputs(checkpoint=checkpoint, given=given, config=configured)
    source = _Source(checkpoint, downloads)
    folder = source.fetch(lambda source: source.choose_checkpoint(pipelines, refusals, variant, given))
    return Inputs(checkpoint=folder, given=given, config=configured, documents=source.fetch_documents())


class _Source:
    """A repository, or a folder or file in it, from which one input of an export is downloaded."""

    def __init__(self, path: HubPath, downloads: Downloads) -> None:
        self._downloads = downloads
        self._repository = open_repository(path)
        self._root = PurePosixPath(path.file or "")
        if path.file is not None and not self._is_file and not self._list("", deep=True):
            raise CheckpointError(
                f"{self._repository.name} has neither a file nor a folder {path.file} at {self._repository.commit}; "
                f"it has {self._describe_files()}"
            )

    def fetch(self, choose: Choose) -> Path:
        """Download the files that `choose(self)` returns; return the local path of the input."""
        with self._advising_download():
            names = [str(self._root)] if self._is_file else choose(self)
        if self._is_file:
            self._check_single()
            names += self._existing(str(self._root.with_name("config.json")))
        return self._fetch(names) / self._root

    def fetch_documents(self) -> Path | None:
        """Download the licence and the model card of the repository; return their folder, None if there are none."""
        names = [name for name in self._repository.files if is_document(name)]
        return self._fetch(names) if names else None

    # What is read of each kind of input. Paths are relative to the root.

    def choose_checkpoint(
        self,
        pipelines: Mapping[str, PipelineClass],
        refusals: Mapping[str, str],
        variant: str | None,
        given: GivenComponents,
    ) -> list[str]:
        """Return the files of a diffusers folder, after its configurations were downloaded and checked."""
        if "model_index.json" not in self._list(""):
            raise self._no_checkpoint()
        folder = self._fetch(self._existing("model_index.json")) / self._root
        index = read_model_index(folder, pipelines, refusals)
        pipeline = pipelines[index["_class_name"]]
        components = pipeline.find_components(index)
        stems = {name: stem for name, stem in components.items() if name != "vae" or given.vae is None}
        classifier = index.get("safety_checker")
        if given.safety_checker is None and isinstance(classifier, list) and any(classifier):
            stems["safety_checker"] = _TRANSFORMERS_STEM
        small = [
            "model_index.json",
            *(f"{name}/config.json" for name in stems),
            *(f"{name}/scheduler_config.json" for name in pipeline.schedulers),
            *(f"{folder}/{name}" for folder in pipeline.tokenizers for name in TOKENIZER_FILES),
            f"feature_extractor/{_PREPROCESSOR}",
            *filter(is_document, self._list("")),
        ]
        self._fetch(self._existing(*small))
        check_classes(folder, index, pipeline)
        return self._existing(*small) + self._choose_weights(stems, variant)

    def choose_vae(self, variant: str | None) -> list[str]:
        """Return the files of an autoencoder, in its own folder or in a checkpoint."""
        place = "vae" if self._list("vae") else ""
        self._require(_join(place, "config.json"), "an autoencoder")
        small = self._existing("model_index.json", _join(place, "config.json"))
        return small + self._choose_weights({place: _DIFFUSERS_STEM}, variant)

    def choose_classifier(self, variant: str | None) -> list[str]:
        """Return the files of a safety checker, in its own folder or in a checkpoint."""
        whole = bool(self._list("safety_checker"))
        place, processor = ("safety_checker", "feature_extractor") if whole else ("", "")
        self._require(_join(place, "config.json"), "a safety checker")
        small = self._existing(_join(place, "config.json"), _join(processor, _PREPROCESSOR))
        return small + self._choose_weights({place: _TRANSFORMERS_STEM}, variant)

    def choose_preview_decoder(self, variant: str | None) -> list[str]:
        """Return the files of a tiny autoencoder."""
        self._require("config.json", "a tiny autoencoder")
        return self._existing("config.json") + self._choose_weights({"": _DIFFUSERS_STEM}, variant)

    def choose_config(self) -> list[str]:
        """Return the configurations of a diffusers folder, without weights."""
        self._require("model_index.json", "a diffusers checkpoint")
        parts = [f"{name}/config.json" for name in ("text_encoder", "text_encoder_2", "unet", "vae")]
        tokenizers = [f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER_FILES]
        return self._existing("model_index.json", "scheduler/scheduler_config.json", *parts, *tokenizers)

    # Files

    @property
    def _is_file(self) -> bool:
        return str(self._root) in self._repository.files

    def _list(self, folder: str, *, deep: bool = False) -> list[str]:
        """Return the names of the files in a folder; with `deep`, also those in folders inside it."""
        prefix = f"{self._root / folder}/" if self._root / folder != PurePosixPath() else ""
        names = [name.removeprefix(prefix) for name in self._repository.files if name.startswith(prefix)]
        return names if deep else [name for name in names if "/" not in name]

    def _existing(self, *names: str) -> list[str]:
        """Return the paths in the repository of those files that are in it."""
        paths = [str(self._root / name) for name in names]
        return [path for path in paths if path in self._repository.files]

    def _require(self, name: str, kind: str) -> None:
        if not self._existing(name):
            place = "/".join([self._repository.name, *self._root.parts])
            raise CheckpointError(f"{place} is not {kind}: it has no {name}; it has {self._describe_files()}")

    def _choose_weights(self, stems: Mapping[str, str], variant: str | None) -> list[str]:
        """Return the weights of components.

        Args:
            stems: folder → stem of its weight files.

        Raises:
            CheckpointError: a component has no safetensors, or a shard is missing; or none has the variant.
        """
        found: list[str] = []
        variants = set[str | None]()
        for folder, stem in stems.items():
            place, names = Path(self._repository.name, self._root, folder), self._list(folder)
            if not names:
                other = f", or pass another {folder} with --{folder.replace('_', '-')}" if folder in _GIVEN else ""
                raise CheckpointError(
                    f"{place} is missing, which model_index.json names; use another repository{other}"
                )

            def read_index(name: str, folder: str = folder) -> Sequence[str]:
                path = self._root / folder / name
                return read_shards(self._fetch([str(path)]) / path)

            used, files = choose_files(place, names, stem, variant, read_index)
            if missing := [name for name in files if name not in names]:
                raise CheckpointError(f"{place / missing[0]} is missing, but the index of the shards names it")
            found += self._existing(*(_join(folder, name) for name in files))
            variants.add(used)
        if variant and variant not in variants:
            raise CheckpointError(
                f"{self._repository.name} has no weights of the `variant` {variant}; omit it to use the plain ones"
            )
        return found

    def _fetch(self, names: Sequence[str]) -> Path:
        """Download files of the repository; return the folder of the snapshot."""
        for name in names:
            size = self._repository.files[name].size
            if size > _MAX_SMALL_BYTES and not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self._repository.name}/{name} has {size:,} bytes, expected at most {_MAX_SMALL_BYTES:,}; use "
                    "another repository"
                )
        missing = self._repository.count_missing_bytes(names)
        if not missing:
            return self._repository.fetch(names)
        with self._downloads.download(self._repository.name, missing) as progress:
            return self._repository.fetch(names, progress)

    # Errors

    def _check_single(self) -> None:
        if self._root.suffix.lower() in PICKLE_SUFFIXES:
            with self._advising_download():
                place = Path(self._repository.name, self._root)
                raise make_pickle_error([place], place.with_suffix(".safetensors"), "and not safetensors")

    @contextlib.contextmanager
    def _advising_download(self) -> Iterator[None]:
        """Complete the advice to convert a pickle, which names local paths, by the command that puts files there."""
        try:
            yield
        except PickleError as error:
            name = self._repository.name
            raise CheckpointError(
                f"{error}\nIt converts local files: download the repository first, and export {name} afterwards:\n"
                f"  hf download {name} --revision {self._repository.commit} --local-dir {name}"
            ) from error

    def _no_checkpoint(self) -> CheckpointError:
        """Describe a repository that has no diffusers folder at the root."""
        name, names = self._repository.name, self._list("")
        if MANIFEST_NAME in names:
            return CheckpointError(f"{name} is a bundle already; download it: latentrt pull {name} BUNDLE")
        single = [each for each in names if each.endswith(".safetensors")]
        pickles = [each for each in names if each.endswith(PICKLE_SUFFIXES)]
        if single:
            shown = ", ".join(f"hf://{name}/{self._root / each}" for each in single[:_MAX_LISTED])
            return CheckpointError(
                f"{name} has no model_index.json, so it is no diffusers checkpoint; export one of its files: {shown}"
                f"{' …' if len(single) > _MAX_LISTED else ''}"
            )
        if pickles:
            place = Path(name, self._root, pickles[0])
            return make_pickle_error([place], place.with_suffix(".safetensors"))
        return CheckpointError(
            f"{name} has no model_index.json and no .safetensors file, expected a checkpoint; it has "
            f"{self._describe_files()}"
        )

    def _describe_files(self) -> str:
        names = sorted(self._repository.files)
        return (", ".join(names[:_MAX_LISTED]) or "no files") + (" …" if len(names) > _MAX_LISTED else "")


Choose = Callable[[_Source], list[str]]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
