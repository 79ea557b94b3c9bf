"""Opens a diffusers folder: identifies its pipeline, and finds its weights and documents.

No weights are loaded, so that an unsupported or incomplete checkpoint is rejected before the export starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from latentrt.bundle.digests import open_regular
from latentrt.bundle.manifest import MANIFEST_NAME
from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError
from latentrt.hub import HubPath, find_origin
from latentrt_export.checkpoints.checkpoint_files import SourceFile, check_file, check_folders
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.preprocessor_config import PROCESSORS, check_crop, read_preprocessor_config
from latentrt_export.checkpoints.weights import Weights, find_weights

__all__ = [
    "NONE_GIVEN",
    "UNKNOWN_LICENCE",
    "Checkpoint",
    "GivenComponents",
    "Layout",
    "PipelineClass",
    "SchedulerConfig",
    "WantedComponents",
    "check_classes",
    "find_documents",
    "find_licence",
    "find_own_folder",
    "is_document",
    "open_checkpoint",
    "read_model_index",
]

Layout = Literal["diffusers", "single-file"]
UNKNOWN_LICENCE = "unknown"
# Read besides a pipeline class's components and schedulers, where they exist.
_OTHER_FOLDERS = ("feature_extractor", "safety_checker")
_SAFETY_CHECKER = "StableDiffusionSafetyChecker"
# The libraries of classes in model_index.json: two packages, and diffusers' module of the safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_CLIP_SIDE = 224  # transformers' default for `image_size` in a vision_config
_LICENCE_FILE = re.compile(r"(?i)licen[cs]e(\.(txt|md))?")
_MODEL_CARD = re.compile(r"(?i)(readme|model_card)\.md")
# The hub's own front matter has some 50 lines; a licence's name is an identifier.
_MAX_CARD_HEAD_BYTES = 1 << 16
_MAX_LICENCE_CHARACTERS = 200
_LICENCE_KEYS = {
    "license": "license",
    "licence": "license",
    "license_name": "license_name",
    "licence_name": "license_name",
}


@dataclass(frozen=True, kw_only=True)
class PipelineClass:
    """The folders of a diffusers pipeline that an export reads. A family declares one for each class it supports.

    The safety checker is not declared: every class may have one, and `model_index.json` says whether it does.

    Attributes:
        components: folder → stem of its weight files: `model` if transformers wrote them, `diffusion_pytorch_model` if
            diffusers did.
        optional: the components that a checkpoint may be without, by [null, null] in `model_index.json`.
        tokenizers: the folders of tokenizers, each if it exists.
        schedulers: folders with a `scheduler_config.json`; the first one is the denoiser's.
        classes: component → the classes that `model_index.json` may name for it.
        model_types: component → the values that `model_type` may have in its `config.json`.
    """

    components: Mapping[str, str]
    optional: Collection[str] = ()
    tokenizers: tuple[str, ...] = ("tokenizer",)
    schedulers: tuple[str, ...] = ("scheduler",)
    classes: Mapping[str, Collection[str]] = field(default_factory=dict)
    model_types: Mapping[str, Collection[str]] = field(default_factory=dict)

    def find_components(self, index: Mapping[str, Any]) -> dict[str, str]:
        """Return the components of a checkpoint with this `model_index.json`: folder → stem of its weight files."""
        return {
            folder: stem
            for folder, stem in self.components.items()
            if folder not in self.optional or _class_of(index, folder) is not None
        }


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A scheduler's class and its configuration without diffusers' own keys."""

    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WantedComponents:
    """The components that a user gives beside the checkpoint, local or on the hub; None for those that are not given.

    Attributes:
        vae: an autoencoder in place of the checkpoint's own: its folder, a checkpoint that has one, or a `.safetensors`
            file in the original layout or in diffusers' (which `export_checkpoint` unpacks).
        safety_checker: a classifier in place of the checkpoint's own: its folder, or a checkpoint that has one.
        preview_decoder: the folder of a tiny autoencoder (diffusers' `AutoencoderTiny`), whose decoder is added for
            previews in a fraction of the decoder's time.
    """

    vae: Path | HubPath | None = None
    safety_checker: Path | HubPath | None = None
    preview_decoder: Path | HubPath | None = None


@dataclass(frozen=True, kw_only=True)
class GivenComponents(WantedComponents):
    """The components that a user gives beside the checkpoint, all of them local."""

    vae: Path | None = None
    safety_checker: Path | None = None
    preview_decoder: Path | None = None


NONE_GIVEN = GivenComponents()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusers folder that can be exported.

    Attributes:
        folder: the checkpoint's folder.
        name: the checkpoint's name in the manifest.
        layout: the layout of the user's checkpoint.
        pipeline_class: the name of its class in diffusers.
        weights: component → its weight files; `safety_checker` only if there is a classifier, `preview_decoder` only if
            one was given.
        classes: component → its class in diffusers or transformers, where `model_index.json` names one; that of a given
            autoencoder is its own configuration's.
        sources: name → file, for the files whose digests the manifest records.
        scheduler_class, scheduler_config: the class and the configuration of the denoiser's scheduler.
        other_schedulers: the pipeline's further schedulers by folder.
        licence: the licence's name in the model card, or `unknown`.
        documents: name in the bundle → file, for the licence text and the model card, if present.
        origin: the repository and the commit of a checkpoint in a cache of the hub.
    """

    folder: Path
    name: str
    layout: Layout
    pipeline_class: str
    weights: Mapping[str, Weights]
    classes: Mapping[str, str]
    sources: Mapping[str, SourceFile]
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    other_schedulers: Mapping[str, SchedulerConfig]
    licence: str
    documents: Mapping[str, Path]
    origin: tuple[str, str] | None = None


def open_checkpoint(
    folder: Path,
    *,
    pipelines: Mapping[str, PipelineClass],
    refusals: Mapping[str, str] = MappingProxyType({}),
    variant: str | None = None,
    given: GivenComponents = NONE_GIVEN,
    name: str | None = None,
    layout: Layout = "diffusers",
) -> Checkpoint:
    """Read a diffusers folder's configurations and find its weights, without loading any.

    Args:
        folder: a folder in the layout of the hub or of `save_pretrained`. Links in it must not lead out of it
            (`checkpoint_files`).
        pipelines: the supported pipeline classes by name.
        refusals: other pipeline class → the reason why it is not supported, as a relative clause.
        variant: the variant of the weight files, if there are several; by default the plain ones, else `fp16`.
        given: the components to use instead of the folder's own, or beside them; an autoencoder in a folder.
        name, layout: the source's name and layout in the manifest; by default those of a folder.

    Raises:
        CheckpointError: the folder is not a supported checkpoint, or is incomplete or damaged.
    """
    index = read_model_index(folder, pipelines, refusals)
    pipeline = pipelines[index["_class_name"]]
    if given.vae is None and "vae" in pipeline.components and not (folder / "vae").is_dir():
        raise CheckpointError(
            f"{folder / 'vae'} is missing; the checkpoint is incomplete, download it again, or pass an autoencoder as "
            "`vae`"
        )
    components = pipeline.find_components(index)
    check_folders(folder, *components, *pipeline.tokenizers, *pipeline.schedulers, *_OTHER_FOLDERS)
    check_classes(folder, index, pipeline)
    schedulers = {part: _read_scheduler(folder, index, part) for part in pipeline.schedulers}
    documents = find_documents(folder)
    weights = {
        part: find_weights(folder, folder / part, stem, variant)
        for part, stem in components.items()
        if part != "vae" or given.vae is None
    }
    classes = _find_classes(folder, index, weights)
    if given.vae is not None:
        weights["vae"], classes["vae"] = _find_vae(given.vae, variant)
    if given.safety_checker is not None:
        weights["safety_checker"] = _find_classifier(given.safety_checker, variant)
    elif _has_safety_checker(folder, index):
        weights["safety_checker"] = _find_classifier(folder, variant)
    if given.preview_decoder is not None:
        weights["preview_decoder"] = _find_preview_decoder(given.preview_decoder, variant)
    if variant and all(found.variant != variant for found in weights.values()):
        raise CheckpointError(f"{folder} has no weights of the `variant` {variant}; omit it to use the plain ones")
    scheduler, *_ = schedulers.values()
    return Checkpoint(
        folder=folder,
        name=name or _name_of(folder),
        layout=layout,
        pipeline_class=index["_class_name"],
        weights=weights,
        classes=classes,
        sources={f"{part}/{file.name}": SourceFile.of(file) for part, found in weights.items() for file in found.files},
        scheduler_class=scheduler.class_name,
        scheduler_config=scheduler.config,
        other_schedulers={part: schedulers[part] for part in pipeline.schedulers[1:]},
        licence=find_licence(documents),
        documents=documents,
        origin=find_origin(folder),
    )


def read_model_index(
    folder: Path, pipelines: Mapping[str, PipelineClass], refusals: Mapping[str, str]
) -> dict[str, Any]:
    """Read `model_index.json`.

    Args:
        folder, pipelines, refusals: as for `open_checkpoint`.

    Raises:
        CheckpointError: there is none, it is damaged, or names a pipeline class that is not supported.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"got {folder}, which {'is not a folder' if os.path.lexists(folder) else 'does not exist'}; expected a "
            "diffusers checkpoint (a folder), a .safetensors file, or a repository on the hub (OWNER/NAME)"
        )
    check_file(folder, folder / "model_index.json")
    if not (folder / "model_index.json").is_file():
        if (folder / MANIFEST_NAME).is_file():
            raise CheckpointError(f'{folder} is a bundle already; run it: latentrt run {folder} "…"')
        raise CheckpointError(
            f"{folder} has no model_index.json; expected a diffusers checkpoint as the hub or save_pretrained writes "
            "it. For a single-file checkpoint, pass the .safetensors file itself"
        )
    index = read_object(folder / "model_index.json")
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in pipelines:
        reason = f", {refusals[found]}" if isinstance(found, str) and found in refusals else ""
        separator = "; " if reason else ", "
        raise CheckpointError(
            f"{folder} has the pipeline class {quote(found)}{reason}{separator}expected one of {', '.join(pipelines)}"
        )
    return index


def check_classes(folder: Path, index: Mapping[str, Any], pipeline: PipelineClass) -> None:
    """Check the class of each component by its names in `model_index.json` and in the component's `config.json`.

    Raises:
        CheckpointError: a class is not supported.
    """
    for component, expected in pipeline.classes.items():
        _check_class(folder, index, component, expected)
    for component, model_types in pipeline.model_types.items():
        path = folder / component / "config.json"
        found = read_object(path).get("model_type") if path.is_file() else None
        if found is not None and found not in model_types:
            raise CheckpointError(
                f"{path} has the model_type {quote(found)}, expected {' or '.join(sorted(model_types))}; such a "
                f"{component} is not supported"
            )


def _check_class(folder: Path, index: Mapping[str, Any], component: str, expected: Collection[str]) -> None:
    """Check a component's class in `model_index.json`.

    Raises:
        CheckpointError: it is not one of the expected, or is of a library that diffusers does not load classes from.
    """
    name = _class_of(index, component)
    if name is None:
        return
    if name not in expected:
        raise CheckpointError(
            f"{folder} has the {component} class {quote(name)}, expected {' or '.join(sorted(expected))}; such a "
            f"{component} is not supported"
        )
    library = index[component][0]
    if library.partition(".")[0] not in _LIBRARIES:
        raise CheckpointError(
            f"{folder} has the {component} class {name} of {quote(library)}, expected diffusers or transformers; a "
            "checkpoint's own code is not run"
        )


def _find_classes(folder: Path, index: Mapping[str, Any], components: Collection[str]) -> dict[str, str]:
    """Return the classes of the pipeline's components that `model_index.json` names.

    Raises:
        CheckpointError: it has [null, null] for one of them.
    """
    for component in components:
        if index.get(component) == [None, None]:
            raise CheckpointError(
                f"{folder / 'model_index.json'} has {component}: [null, null], and a {index['_class_name']} cannot do "
                "without it; name its library and class"
            )
    named = {component: _class_of(index, component) for component in components}
    return {component: class_name for component, class_name in named.items() if class_name is not None}


def _read_scheduler(folder: Path, index: Mapping[str, Any], part: str) -> SchedulerConfig:
    """Read a scheduler, whose class is that of `model_index.json`, as in diffusers, else that of its configuration."""
    config = read_object(folder / part / "scheduler_config.json")
    own = config.pop("_class_name", None)
    name = _class_of(index, part)
    if name is not None:
        _check_class(folder, index, part, (name,))
    elif not isinstance(own, str):
        raise CheckpointError(
            f"{folder / 'model_index.json'} has no {part} and its configuration the _class_name {quote(own)}, expected "
            "the name of a diffusers scheduler in the first"
        )
    return SchedulerConfig(
        class_name=name or own, config={key: value for key, value in config.items() if key != "_diffusers_version"}
    )


def _class_of(index: Mapping[str, Any], component: str) -> str | None:
    """Return a component's class in `model_index.json`, which has [library, class], or [null, null] for none."""
    match index.get(component):
        case [str(), str(name)]:
            return name
        case None | [None, *_]:
            return None
        case found:
            raise CheckpointError(f"model_index.json has {component}: {quote(found)}, expected a library and a class")


def _has_safety_checker(folder: Path, index: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has a classifier of its own.

    Raises:
        CheckpointError: it is missing, or its class, or that of its preprocessing, is not supported.
    """
    class_name = _class_of(index, "safety_checker")
    if class_name is None:
        return False
    if not (folder / "safety_checker").is_dir():
        raise CheckpointError(
            f"{folder / 'safety_checker'} is missing, which model_index.json names; download it again, pass another as "
            "`safety_checker`, or set safety_checker to [null, null] there"
        )
    if class_name != _SAFETY_CHECKER:
        raise CheckpointError(
            f"{folder} has the safety checker {quote(class_name)}, expected {_SAFETY_CHECKER}; use another: "
            "--safety-checker PATH"
        )
    _check_class(folder, index, "feature_extractor", PROCESSORS)
    return True


def _find_classifier(path: Path, variant: str | None) -> Weights:
    whole = (path / "safety_checker").is_dir()
    folder, processor = (path / "safety_checker", path / "feature_extractor") if whole else (path, path)
    if not path.is_dir() or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a safety checker; expected its folder (config.json, model.safetensors, "
            "preprocessor_config.json), or a checkpoint that has one"
        )
    check_folders(path, *(("safety_checker", "feature_extractor") if whole else (".",)))
    preprocessing = read_preprocessor_config(processor / "preprocessor_config.json")
    vision = read_object(folder / "config.json").get("vision_config")
    side = vision.get("image_size", _CLIP_SIDE) if isinstance(vision, dict) else _CLIP_SIDE
    check_crop(preprocessing, side, processor)
    return find_weights(path, folder, "model", variant)


def _find_vae(path: Path, variant: str | None) -> tuple[Weights, str]:
    """Find the weights and the class of a given autoencoder, in its own folder or in a checkpoint."""
    folder = find_own_folder(path, "vae")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not an autoencoder; expected its folder (config.json and safetensors), a checkpoint with vae/, "
            "or a .safetensors file"
        )
    check_folders(path, "model_index.json", "." if folder == path else "vae")
    index = read_object(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    class_name = _class_of(index, "vae") or read_object(folder / "config.json").get("_class_name", "AutoencoderKL")
    return find_weights(path, folder, "diffusion_pytorch_model", variant), str(class_name)


def find_own_folder(root: Path, component: str) -> Path:
    """Return a component's folder, where `root` is a checkpoint or that folder itself."""
    folder = root / component
    return folder if folder.is_dir() else root


def _find_preview_decoder(path: Path, variant: str | None) -> Weights:
    """Find a tiny autoencoder's weights.

    Raises:
        CheckpointError: it is not a tiny autoencoder.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a tiny autoencoder; expected its folder, with config.json and safetensors"
        )
    check_folders(path, ".")
    config = read_object(path / "config.json")
    if config.get("_class_name") != "AutoencoderTiny":
        raise CheckpointError(f"{path} has the class {quote(config.get('_class_name'))}, expected AutoencoderTiny")
    return find_weights(path, path, "diffusion_pytorch_model", variant)


def _name_of(folder: Path) -> str:
    """Return the folder's name; in a hub cache, where it is a commit, the repository's name and the commit."""
    resolved = folder.resolve()
    repository = re.fullmatch(r"models--(.+)", resolved.parent.parent.name)
    if resolved.parent.name == "snapshots" and repository:
        return f"{repository[1].replace('--', '/', 1)}@{resolved.name}"
    return resolved.name


def is_document(name: str) -> bool:
    """Return whether a file of this name is a licence's text or a model card."""
    return (_LICENCE_FILE.fullmatch(name) or _MODEL_CARD.fullmatch(name)) is not None


def find_documents(folder: Path) -> dict[str, Path]:
    """Find the licence text and the model card of a checkpoint: name in a bundle → file.

    Raises:
        CheckpointError: one is a link that leads out of the checkpoint, or is not a regular file.
    """
    documents: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_licence = _LICENCE_FILE.fullmatch(path.name) is not None
        if path.is_dir() or not is_document(path.name):
            continue
        check_file(folder, path)
        if path.exists():  # else a dangling link, left by an interrupted download
            documents.setdefault("LICENSE" if is_licence else "MODEL_CARD.md", path)
    return documents


def find_licence(documents: Mapping[str, Path]) -> str:
    """Return the licence's name from the model card's front matter, else `see LICENSE` or `unknown`."""
    entries = _read_front_matter(documents["MODEL_CARD.md"]) if "MODEL_CARD.md" in documents else {}
    licence = entries.get("license")
    if licence == "other":  # the hub's name for a licence that is not on its list; license_name is the actual one
        licence = entries.get("license_name", licence)
    return licence or ("see LICENSE" if "LICENSE" in documents else UNKNOWN_LICENCE)


def _read_front_matter(card: Path) -> dict[str, str]:
    """Return the licence entries of a model card's front matter: lines between two of `---` at its beginning.

    Each line is looked at once, and only the card's head is read: a card may hold anything.
    """
    try:
        with open_regular(card) as stream:
            head = stream.read(_MAX_CARD_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{card} cannot be read: {error.strerror}; download the checkpoint again") from error
    first, *lines = head.decode("utf-8-sig", errors="replace").splitlines() or [""]
    entries: dict[str, str] = {}
    if first.rstrip() != "---":
        return entries
    for line in lines:
        if line.startswith("---"):
            return entries
        key, _, rest = line.partition(":")
        name = _LICENCE_KEYS.get(key)
        value = rest.partition("#")[0].strip().strip("'\"").strip()
        if name is not None and value and len(value) <= _MAX_LICENCE_CHARACTERS:
            entries[name] = value
    return {}  # it does not end within the head: this is no front matter
