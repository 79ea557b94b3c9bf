"""Converts the components of a single file, in the original layout, to the names and shapes of diffusers.

diffusers' own converters rename the weights. They run on stand-ins (`TensorView`) that know the tensors' shapes and
note the few changes of layout; then the tensors are copied one at a time, so that a conversion needs the memory of the
largest tensor and not of a component. The result is compared with the architecture that the configuration describes,
because the converters ignore a missing weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt.bundle.digests import open_regular
from latentrt.bundle.safetensors_header import TensorPlace
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.safetensors_writer import SafetensorsWriter
from latentrt_export.checkpoints.weights import check_dtypes, limit_parameters, warn_about_unexpected

__all__ = [
    "OPEN_CLIP_FIRST",
    "OPEN_CLIP_SECOND",
    "TEXT_ENCODER",
    "TEXT_ENCODER_XL",
    "UNET",
    "VAE",
    "ComponentLayout",
    "TensorView",
    "convert",
    "copy_tensors",
]

# diffusers' converter looks at every name once for each block, of which Stable Diffusion's UNets have 32 at most.
_MAX_BLOCKS = 100
Config = dict[str, Any]
Tensors = Mapping[str, "TensorView"]


@dataclass(frozen=True, kw_only=True)
class TensorView:
    """A tensor of a file that is read when it is copied, with the changes of its layout until then.

    It has what diffusers' converters use of a `torch.Tensor`. No value changes, so that the elements are unsigned
    integers of their size, whatever the dtype.

    Attributes:
        place: the tensor in the file.
        changes: the changes, each a view of an array.
    """

    place: TensorPlace
    changes: tuple[Callable[[NDArray[Any]], NDArray[Any]], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after the changes."""
        return self._apply(np.broadcast_to(np.uint8(0), self.place.shape)).shape  # it has no memory of its own

    @property
    def ndim(self) -> int:
        """The number of axes after the changes."""
        return len(self.shape)

    @property
    def T(self) -> TensorView:  # noqa: N802 (torch's name)
        """The transposed tensor."""
        return self._then(lambda array: array.T)

    def __getitem__(self, index: Any) -> TensorView:
        return self._then(lambda array: array[index])

    def clone(self) -> TensorView:
        """Return the tensor itself, which is never written to."""
        return self

    detach = contiguous = clone

    def read(self, stream: BufferedReader) -> NDArray[Any]:
        """Read the tensor.

        Args:
            stream: the open file.

        Returns:
            The elements as unsigned integers, contiguous.

        Raises:
            OSError: it cannot be read.
        """
        size = self.place.end - self.place.start
        stream.seek(self.place.start)
        data = stream.read(size)
        if len(data) != size:
            raise OSError(f"it ends after {self.place.start + len(data)} bytes, expected {self.place.end} or more")
        count = int(np.prod(self.place.shape, dtype=np.int64))
        elements = np.frombuffer(data, f"<u{size // count if count else 1}")
        return np.ascontiguousarray(self._apply(elements.reshape(self.place.shape)))

    def _apply(self, array: NDArray[Any]) -> NDArray[Any]:
        for change in self.changes:
            array = change(array)
        return array

    def _then(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> TensorView:
        changed = replace(self, changes=(*self.changes, change))
        _ = changed.shape  # an index that the tensor does not have is an error here, as in torch
        return changed


@dataclass(frozen=True, kw_only=True)
class ComponentLayout:
    """The place of a component in a single file and in a diffusers folder.

    Attributes:
        prefix: the prefix of its tensors' names in the single file.
        file: the name of its weights file in the folder.
        build: builds the architecture that a configuration describes.
        rename: converts the tensors, given the configuration and the architecture.
        publish: returns the name of a parameter of the architecture in published checkpoints.
    """

    prefix: str
    file: str
    build: Callable[[Config], torch.nn.Module]
    rename: Callable[[Tensors, Config, torch.nn.Module], Tensors]
    publish: Callable[[str], str] = str


def convert(component: str, layout: ComponentLayout, places: Mapping[str, TensorPlace], config: Config) -> Tensors:
    """Convert one component's tensors to the names and shapes of a published diffusers checkpoint; none is read.

    Args:
        component: its name, for errors.
        layout: its place in the file.
        places: the file's tensors with the component's prefix, by their full names.
        config: the contents of the component's `config.json`.

    Raises:
        CheckpointError: a weight is missing, or has another shape than the configuration describes.

    Warns:
        ExportWarning: there are weights that the configuration does not describe; they are left out.
    """
    with torch.device("meta"), limit_parameters(component, len(places)):
        model = layout.build(config)
    try:
        stored = {name: TensorView(place=place) for name, place in places.items()}
        renamed = layout.rename(stored, config, model)
        found = {name: tensor.shape for name, tensor in renamed.items() if tensor is not None}
    except (KeyError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{component}: its weights do not have the layout that config.json describes: {error}"
        ) from error
    expected = {layout.publish(name): tuple(weight.shape) for name, weight in model.named_parameters()}
    _compare_shapes(component, found, expected)
    warn_about_unexpected(component, sorted(found.keys() - expected.keys()))
    described = {name: renamed[name] for name in found if name in expected}
    check_dtypes(component, {name: tensor.place.dtype for name, tensor in described.items()})
    return described


def copy_tensors(source: Path, tensors: Tensors, target: Path) -> None:
    """Write tensors of one file to another, one at a time.

    Args:
        source: the `.safetensors` file.
        tensors: its tensors by their names in the other file.
        target: the file to write. After an error, the caller removes it.

    Raises:
        OSError: a file cannot be read or written.
    """
    described = {name: (tensor.place.dtype, tensor.shape) for name, tensor in tensors.items()}
    with open_regular(source) as stream, SafetensorsWriter(target, described, {"format": "pt"}) as writer:
        for name in writer.names:
            writer.write(name, tensors[name].read(stream))


def _compare_shapes(component: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    hint = "the file is damaged, or needs a configuration of its own (`config`)"
    missing = expected.keys() - found.keys()
    if missing:
        raise CheckpointError(f"{component}: {len(missing)} weights are missing, the first is {min(missing)}; {hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{component}: {name} has shape {found[name]}, expected {shape}; {hint}")


def _add_prefix(name: str) -> str:
    # transformers 5 removed the inner module that earlier versions, and every checkpoint, call text_model
    return f"text_model.{name.removeprefix('text_model.')}"


def _rename_text_encoder(tensors: Tensors, config: Config, model: torch.nn.Module) -> Tensors:
    if any(name.startswith("cond_stage_model.model.") for name in tensors):
        renamed = convert_open_clip_checkpoint(model, tensors)
    else:
        renamed = convert_ldm_clip_checkpoint(tensors)
    published = {_add_prefix(name): tensor for name, tensor in renamed.items()}
    # Older files store position ids. OpenCLIP has a projection and a last layer, both unused by 2.x.
    last = f"text_model.encoder.layers.{config['num_hidden_layers']}."
    unused = ("text_model.embeddings.position_ids", "text_model.text_projection.", last)
    return {name: tensor for name, tensor in published.items() if not name.startswith(unused)}


def _rename_unet(tensors: Tensors, config: Config, model: torch.nn.Module) -> Tensors:
    blocks = {tuple(name.replace(UNET.prefix, "").split(".", 2)[:2]) for name in tensors}
    if len(blocks) > _MAX_BLOCKS:
        raise CheckpointError(
            f"unet: its tensors are in {len(blocks):,} blocks, expected {_MAX_BLOCKS} at most; the file is damaged, or "
            "of another model"
        )
    return convert_ldm_unet_checkpoint(tensors, config)  # type: ignore[no-any-return]


def _lay_out_text_encoder(prefix: str) -> ComponentLayout:
    """Return the layout of a text encoder without its projection."""
    return ComponentLayout(
        prefix=prefix,
        file="model.safetensors",
        build=lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
        rename=_rename_text_encoder,
        publish=_add_prefix,
    )


def _lay_out_open_clip(prefix: str) -> ComponentLayout:
    """Return the layout of OpenCLIP's text encoder with its projection."""
    return ComponentLayout(
        prefix=prefix,
        file="model.safetensors",
        build=lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
        rename=lambda tensors, _, model: convert_open_clip_checkpoint(model, tensors, prefix),
    )


TEXT_ENCODER = _lay_out_text_encoder("cond_stage_model.")
TEXT_ENCODER_XL = _lay_out_text_encoder("conditioner.embedders.0.transformer.")
OPEN_CLIP_FIRST = _lay_out_open_clip("conditioner.embedders.0.model.")
OPEN_CLIP_SECOND = _lay_out_open_clip("conditioner.embedders.1.model.")
UNET = ComponentLayout(
    prefix="model.diffusion_model.",
    file="diffusion_pytorch_model.safetensors",
    build=lambda config: UNet2DConditionModel.from_config(config),
    rename=_rename_unet,
)
VAE = ComponentLayout(
    prefix="first_stage_model.",
    file="diffusion_pytorch_model.safetensors",
    build=lambda config: AutoencoderKL.from_config(config),
    rename=lambda tensors, config, _: convert_ldm_vae_checkpoint(tensors, config),
)
