"""Finds a component's weight files, checks their headers and values, and loads them strictly. Pickles are never
opened."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.bundle.digests import open_regular
from latentrt.bundle.printable import counted, quote
from latentrt.bundle.safetensors_header import Header, read_header
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.component_config import make_library_config
from latentrt_export.checkpoints.file_content import PICKLE_SUFFIXES, explain_content, make_pickle_error
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.stored_tensor import StoredTensor
from latentrt_export.export_warning import warn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Weights",
    "check_dtypes",
    "check_values",
    "choose_files",
    "count_nonfinite",
    "find_weights",
    "limit_parameters",
    "load_pretrained",
    "read_header_of",
    "read_shards",
    "reject_nonfinite",
    "warn_about_unexpected",
]

# The dtypes of weights, by their names in a safetensors header; all are loaded as float32.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Names of the factors that some writers of 8-bit weights store beside them.
_SCALES = re.compile(r"(.*\.)?(scale_weight|weight_scale(_inv)?|scaled_fp8)")
# Constants stored like weights: a mask has infinities, and old versions of transformers stored the positions.
_POSITIONS = "position_ids"
_CONSTANTS = ("mask", _POSITIONS)
_MAX_NAME_BYTES = 255  # of a file system
_TRANSFORMERS_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
# Of a folder with this file, transformers loads the base model that it names, from anywhere, and the adapter on top.
_ADAPTER_CONFIG = "adapter_config.json"
# An index of shards has some 100 kB.
_MAX_INDEX_BYTES = 4 << 20
_SHARD = re.compile(r"(.+)-\d+-of-\d+")
# A module may have this many parameters more than twice its files' tensors, as files fuse some.
_MORE_PARAMETERS = 1000
# Present → earlier names of an attention's layers.
_EARLIER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight files of a component.

    Attributes:
        root: the checkpoint's folder, for `ComponentModule.load`.
        variant: the variant of the files (`fp16`), or None for the plain ones.
        files: the safetensors files.
    """

    root: Path
    variant: str | None
    files: tuple[Path, ...]


def find_weights(root: Path, folder: Path, stem: str, preferred: str | None) -> Weights:
    """Find a component's safetensors and check that they are complete.

    Args:
        root: the checkpoint's folder.
        folder: the component's folder.
        stem: the stem of its weight files: `model` or `diffusion_pytorch_model`.
        preferred: the preferred variant. A variant need not cover every component, so the plain files are the second
            choice. By default the plain files are the first choice and `fp16` the second.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file is truncated, damaged, or has weights of a
            dtype that cannot be read; or the first choice is a pickle, which diffusers would load.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; the checkpoint is incomplete, download it again")
    read_object(folder / "config.json")  # damage is reported before any weights are read
    names = [path.name for path in folder.iterdir()]
    variant, chosen = choose_files(folder, names, stem, preferred, lambda index: read_shards(folder / index))
    files = tuple(folder / name for name in chosen)
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, but the index of the shards, or a link, names it; download the checkpoint again"
            )
        header = read_header_of(file)
        check_dtypes(str(file), {name: place.dtype for name, place in header.tensors.items()})
    return Weights(root=root, variant=variant, files=files)


def choose_files(
    folder: Path,
    names: Collection[str],
    stem: str,
    preferred: str | None,
    read_index: Callable[[str], Sequence[str]],
) -> tuple[str | None, Sequence[str]]:
    """Choose a component's safetensors among the files of its folder, by their names alone.

    Args:
        folder: the component's folder, for errors; it need not exist.
        names: of the files in it. A dangling link, left by an interrupted download, is one of them.
        stem, preferred: as for `find_weights`.
        read_index: returns the shards that an index names.

    Returns:
        The variant of the files, and their names.

    Raises:
        CheckpointError: there are no weights, or the first choice is a pickle, which diffusers would load.
    """
    if stem == _TRANSFORMERS_STEM and _ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{folder} has {_ADAPTER_CONFIG}, of an adapter, expected a model of its own; merge the adapter into the "
            "model with peft (merge_and_unload), or delete the file"
        )
    pickles: list[Path] = []
    for variant in (preferred, None) if preferred else (None, "fp16"):
        files = _list_files(folder, names, stem, variant, read_index)
        if files and pickles:
            wish = "pass no `variant`" if preferred else f"pass `variant` {variant}"
            raise make_pickle_error(
                pickles,
                folder / f"{stem}{f'.{preferred}' if preferred else ''}.safetensors",
                f"that diffusers loads, and not {files[0]}; for the weights of that, {wish}",
            )
        if files:
            return variant, files
        pickles = pickles or _list_own_pickles(folder, names, stem, variant)
    raise _not_found(folder, names, stem, preferred)


def _list_files(
    folder: Path,
    names: Collection[str],
    stem: str,
    variant: str | None,
    read_index: Callable[[str], Sequence[str]],
) -> Sequence[str]:
    """Return the files that the component's library loads; () if there are none of the variant.

    Where there are both a single file and the index of shards, transformers loads the file and diffusers the shards.
    """
    suffix = f".{variant}" if variant else ""
    index, single = f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors"
    if index in names and not (stem == _TRANSFORMERS_STEM and single in names):
        return read_index(index)
    # Earlier names of diffusers, which it would load in place of a single file.
    for old in (f"{stem}.{variant}.safetensors.index.json", f"{stem}.safetensors.{variant}.index.json"):
        if variant and old in names:
            raise CheckpointError(f"{folder / old} has an earlier name of diffusers, expected {index}; rename it")
    return (single,) if single in names else ()


def read_shards(index: Path) -> Sequence[str]:
    """Return the names of the shards in an index, which are files beside it.

    Raises:
        CheckpointError: it is damaged.
    """
    shards = read_object(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
        raise CheckpointError(
            f"{index} names no shards in its weight_map; it is damaged, download the checkpoint again"
        )
    return sorted(set(shards.values()))


def _is_file_name(shard: object) -> bool:
    if not isinstance(shard, str) or len(shard.encode("utf-8", "replace")) > _MAX_NAME_BYTES:
        return False
    return shard.endswith(".safetensors") and Path(shard).name == shard


def _not_found(folder: Path, names: Collection[str], stem: str, preferred: str | None) -> CheckpointError:
    matches = (re.fullmatch(rf"{stem}\.([\w-]+)\.safetensors", name) for name in sorted(names))
    variants = [match[1] for match in matches if match]
    if variants:
        return CheckpointError(
            f"{folder} has no {stem}.safetensors, only the variants {', '.join(variants)}; pass one as `variant`"
        )
    pickles = _list_pickles(folder, names)
    if pickles:
        return make_pickle_error(pickles, folder / f"{stem}.safetensors")
    wanted = f"{stem}.{preferred}.safetensors or {stem}.safetensors" if preferred else f"{stem}.safetensors"
    return CheckpointError(f"{folder} has no weights; expected {wanted}, or shards with their index")


def _list_pickles(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the pickle that most likely has the weights, or all its shards."""
    found = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    # The libraries' own names first; a trainer may have left optimizer.pt beside them.
    found.sort(key=lambda name: not name.startswith(("pytorch_model", "diffusion_pytorch_model")))
    if not found:
        return []
    shard = _SHARD.fullmatch(Path(found[0]).stem)
    return [folder / name for name in found if name == found[0] or (shard and _SHARD.fullmatch(Path(name).stem))]


def _list_own_pickles(folder: Path, names: Collection[str], stem: str, variant: str | None) -> list[Path]:
    """Return the pickle that the component's library would load, or all its shards; [] if there is none."""
    own = f"pytorch_{stem}" if stem == _TRANSFORMERS_STEM else stem
    pattern = re.compile(re.escape(f"{own}.{variant}" if variant else own) + r"(-\d+-of-\d+)?\.bin")
    return [folder / name for name in sorted(names) if pattern.fullmatch(name)]


def read_header_of(file: Path) -> Header:
    """Read and check the header of a safetensors file; called before a library opens the file.

    The libraries bound neither the time nor the memory that a header takes. The size is compared with the header's, to
    detect a truncated download.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or damaged, or not safetensors.
    """
    try:
        problem = explain_content(file)
        if problem is not None:
            raise CheckpointError(f"{file} {problem}")
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            header = read_header(stream, size)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file, or its header is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} is missing or cannot be read: {error.strerror}") from error
    if size != header.file_size:
        raise CheckpointError(
            f"{file} has {size} bytes, expected {header.file_size} from its header; it is truncated or damaged, "
            "download it again"
        )
    return header


def check_dtypes(file: str, dtypes: Mapping[str, str]) -> None:
    """Check that the weights of a file have dtypes that can be converted to float32.

    Args:
        file: the name of the file, for errors.
        dtypes: name → dtype, by its name in a safetensors header.

    Raises:
        CheckpointError: a weight has another dtype, or 8-bit weights have scales.
    """
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS and name.endswith(("weight", "bias")):
            raise CheckpointError(f"{file} stores {name} as {dtype}, expected one of {', '.join(_FLOATS)}")
        if _SCALES.fullmatch(name):
            raise CheckpointError(
                f"{file} stores {name}, a scale of 8-bit weights, expected weights without scales, which are not "
                "applied; use a checkpoint in bf16 or fp16"
            )


def check_values(component: str, weights: Weights) -> None:
    """Check that every weight is finite, one tensor at a time.

    Args:
        component: the name of the component, for errors.
        weights: its files.

    Raises:
        CheckpointError: a tensor has values that are NaN, infinite or beyond float32, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open  # brings torch, which finding weights does not need

    bad: dict[str, int] = {}
    for file in weights.files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is not a mapping)
                    if name.endswith(_CONSTANTS):
                        continue
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and (count := count_nonfinite(tensor)):
                        bad[name] = count
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    reject_nonfinite(component, bad)


def count_nonfinite(tensor: Tensor) -> int:
    """Return the number of values of a tensor that are NaN, infinite, or infinite in float32."""
    import torch

    if not tensor.numel():
        return 0
    values = tensor.float()
    if all(torch.isfinite(each) for each in torch.aminmax(values)):  # one pass, without a mask
        return 0
    return int((~torch.isfinite(values)).sum())


def reject_nonfinite(component: str, counts: Mapping[str, int]) -> None:
    """Reject weights with values that are not finite.

    Args:
        component: the name of the component, for errors.
        counts: name → number of such values, of the tensors that have any.

    Raises:
        CheckpointError: there is such a tensor.
    """
    if counts:
        first = min(counts)
        raise CheckpointError(
            f"{component}: {len(counts)} tensors have values that are NaN or infinite, the first is {first} with "
            f"{counts[first]}; expected finite weights: the checkpoint is damaged, get another copy"
        )


def load_pretrained(library_class: Any, folder: Path, variant: str | None) -> Any:
    """Build a component of its configuration, with its weights in their files.

    Each parameter is a tensor on the meta device, with the attribute `stored`, a `StoredTensor`: its place in the
    checkpoint (`latentrt_export.modules.streamed` loads a layer's for its evaluation). Buffers have their values.
    Nothing is downloaded, nothing is unpickled, and no missing weight is initialised.

    Args:
        library_class: a diffusers or transformers model class.
        folder: the component's folder, with `config.json` and safetensors, sharded or not.
        variant: `fp16` for `….fp16.safetensors`.

    Returns:
        The module in float32, in evaluation mode.

    Raises:
        CheckpointError: a file is damaged, or a tensor of the configuration is missing or has another shape.

    Warns:
        ExportWarning: the files have tensors that the configuration does not; they are ignored, as in the library.
    """
    of_transformers = getattr(library_class, "config_class", None) is not None
    stem = _TRANSFORMERS_STEM if of_transformers else _DIFFUSERS_STEM
    stored = _list_stored(find_weights(folder.parent, folder, stem, variant).files)
    try:
        config = make_library_config(library_class, folder)
        size = sum(each.end - each.start for each in stored.values())
        with limit_parameters(folder.name, len(stored), size), _parameters_on_meta():
            if config is not None:
                module = library_class(config)
            else:
                module = library_class.from_config(library_class.load_config(folder, local_files_only=True))
    except CheckpointError:
        raise
    except Exception as error:  # an invalid configuration fails with any exception
        raise CheckpointError(f"{folder.name}: its weights cannot be loaded: {error}") from error
    _attach(folder.name, module, stored, of_transformers=of_transformers)
    return module.eval().requires_grad_(False)


def _list_stored(files: Sequence[Path]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(file=file, dtype=place.dtype, shape=place.shape, start=place.start, end=place.end)
        for file in files
        for name, place in read_header_of(file).tensors.items()
    }


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as soon as its module has it, before it is initialised."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # what it returns is used
    try:
        yield
    finally:
        hook.remove()


def _attach(component: str, module: Any, stored: Mapping[str, StoredTensor], *, of_transformers: bool) -> None:
    """Give each parameter its place, and each stored buffer its values.

    Raises:
        CheckpointError: a tensor of the module is missing or has another shape.
    """
    named = _name_as_in_module(component, module, stored, of_transformers=of_transformers)
    missing, mismatched = [], []
    expected_names = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        key = _strip_towers(module, name) if of_transformers else name
        expected_names.add(key)
        if key not in named:
            if not key.endswith(_POSITIONS):
                missing.append(name)
        elif named[key].shape != tuple(tensor.shape):
            mismatched.append((name, named[key].shape, tuple(tensor.shape)))
        elif tensor.is_meta:
            tensor.stored = named[key]
        else:
            tensor.copy_(named[key].load())
    hint = "config.json and the weights must belong together"
    if missing:
        raise CheckpointError(f"{component}: {len(missing)} tensors are missing, the first is {min(missing)}; {hint}")
    if mismatched:
        name, found, expected = min(mismatched)
        raise CheckpointError(
            f"{component}: {len(mismatched)} tensors are of another shape, the first is {name} of {found}, expected "
            f"{expected}; {hint}"
        )
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = (name for name in named.keys() - expected_names if not name.endswith(_POSITIONS))
    warn_about_unexpected(
        component, sorted(name for name in ignored if not any(re.search(each, name) for each in patterns))
    )


def _name_as_in_module(
    component: str, module: Any, stored: Mapping[str, StoredTensor], *, of_transformers: bool
) -> dict[str, StoredTensor]:
    """Return the stored tensors by the names that a module has for them today, without its tower's.

    Raises:
        CheckpointError: two tensors have the same such name, of which a library would take either.
    """
    earlier = {old: present for present, old in _list_earlier_names(module).items()}
    named: dict[str, StoredTensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in stored.items():
        key = _strip_towers(module, name) if of_transformers else earlier.get(name, name)
        if key in named:
            raise CheckpointError(
                f"{component}: its files store {quote(sources[key])} and {quote(name)}, two names of one tensor, "
                "expected one of them; the checkpoint is damaged, get another copy"
            )
        named[key], sources[key] = tensor, name
    return named


def _strip_towers(module: Any, name: str) -> str:
    """Return a tensor's name without the names of the inner module that transformers 5 removed from CLIP.

    A text encoder's tensors begin with `text_model.` in a checkpoint, an image encoder's with `vision_model.`, and a
    safety checker's with that twice.
    """
    tower = "text_model." if "Text" in type(module).__name__ else "vision_model."
    while name.startswith(tower):
        name = name.removeprefix(tower)
    return name


def _list_earlier_names(module: Any) -> dict[str, str]:
    """Return the names that weights of attention had in checkpoints before diffusers 0.15, by their present ones.

    Source: diffusers, `ModelMixin._fix_state_dict_keys_on_load`.
    """
    return {
        f"{path}.{present}.{kind}": f"{path}.{earlier}.{kind}"
        for path, each in module.named_modules()
        if getattr(each, "_from_deprecated_attn_block", False)
        for present, earlier in _EARLIER_NAMES.items()
        for kind in ("weight", "bias")
    }


@contextlib.contextmanager
def limit_parameters(component: str, tensors: int, size: int | None = None) -> Iterator[None]:
    """Stop the construction of a module that has far more parameter tensors or elements than its weight files.

    A few numbers of a configuration describe any number of layers of any size.

    Args:
        component: the name of the component, for errors.
        tensors: the number of tensors in its files.
        size: their bytes, of which an element has one at least. None bounds the number of tensors alone.

    Raises:
        CheckpointError: raised by the constructor of the module: it has more parameter tensors, or larger ones.
    """
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    counts: dict[tuple[int, str], int] = {}  # elements of a parameter by its place: loading assigns each again
    elements = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal elements
        found = 0 if parameter is None else parameter.numel()
        elements += max(found - counts.get((id(module), name), 0), 0)
        counts[id(module), name] = found
        if len(counts) > 2 * tensors + _MORE_PARAMETERS:
            described, stored = f"at least {len(counts):,} parameter tensors", counted(tensors, "tensor")
        elif size is not None and elements > 2 * size + _MORE_PARAMETERS:
            described, stored = f"at least {elements:,} elements", counted(size, "byte")
        else:
            return
        raise CheckpointError(
            f"{component}: config.json describes a model of {described}, and its files have {stored}; the two must "
            "belong together"
        )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def warn_about_unexpected(component: str, names: Sequence[str]) -> None:
    """Warn of tensors that a component's architecture does not have, if there are any; diffusers ignores them, too."""
    if names:
        warn(
            f"{component}: ignored {len(names)} tensors not described by config.json, as diffusers does; the first "
            f"is {names[0]}"
        )
