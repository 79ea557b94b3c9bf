"""Derives the structure of a distilled UNet of Stable Diffusion XL from the names of its tensors.

SSD-1B, Segmind-Vega and KOALA have the widths of the base model, but fewer layers, and no configuration in a single
file. The numbers of layers follow from the numbers in the names; the widths are compared when the tensors are
converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentrt.errors import CheckpointError

__all__ = ["derive_structure"]

# The number of digits is bounded: a name has any.
_TRANSFORMER = re.compile(r"(input_blocks|output_blocks)\.(\d{1,3})\.1\.transformer_blocks\.(\d{1,3})\.")
_MIDDLE = re.compile(r"middle_block\.1\.transformer_blocks\.(\d{1,3})\.")
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d{1,3})\.")
_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"


def derive_structure(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a UNet that follow from the names of its tensors.

    Args:
        names: of its tensors in the original layout, without a prefix.
        config: the configuration of the base model, for its number of levels.

    Returns:
        diffusers' settings for the numbers of layers, the types of blocks and the middle.

    Raises:
        CheckpointError: diffusers' configuration cannot describe such a UNet.
    """
    depths: dict[tuple[str, int], int] = {}
    blocks: dict[str, int] = {"input_blocks": 0, "output_blocks": 0}
    middle, has_middle = 0, False
    for name in names:
        if block := _BLOCK.match(name):
            blocks[block[1]] = max(blocks[block[1]], int(block[2]) + 1)
        if found := _TRANSFORMER.match(name):
            key = found[1], int(found[2])
            depths[key] = max(depths.get(key, 0), int(found[3]) + 1)
        if layer := _MIDDLE.match(name):
            middle = max(middle, int(layer[1]) + 1)
        has_middle = has_middle or name.startswith("middle_block.")
    levels = len(config["block_out_channels"])
    per_level, rest = divmod(blocks["input_blocks"], levels)
    if rest or per_level < 2 or blocks["output_blocks"] != blocks["input_blocks"]:
        raise _refuse(f"{blocks['input_blocks']} input blocks and {blocks['output_blocks']} output blocks")
    # An input block precedes the levels; a level has its layers and a downsampler, the last one has none.
    down = [
        [depths.get(("input_blocks", 1 + level * per_level + layer), 0) for layer in range(per_level - 1)]
        for level in range(levels)
    ]
    up = [
        [depths.get(("output_blocks", level * per_level + layer), 0) for layer in range(per_level)]
        for level in range(levels)
    ]
    for level in (*down, *up):
        if min(level) == 0 < max(level):
            raise _refuse("a level with attention in some of its layers only")
    layers, reverse = [_join(level) for level in down], [_join(level) for level in up]
    last = down[-1][0] or 1  # the depth that diffusers builds the middle with
    if middle and middle != last:
        raise _refuse(f"{middle} transformer layers in the middle and {last} before it")
    mirrored = reverse == layers[::-1] and not any(isinstance(layer, list) for layer in layers)
    return {
        "layers_per_block": per_level - 1,
        "down_block_types": [_CROSS_DOWN if max(level) else _DOWN for level in down],
        "up_block_types": [_CROSS_UP if max(level) else _UP for level in up],
        "transformer_layers_per_block": layers,
        "reverse_transformer_layers_per_block": None if mirrored else reverse,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D" if has_middle else None,
    }


def _join(depths: Sequence[int]) -> int | list[int]:
    """Return the depths of a level's layers as diffusers has them: one number if all are equal; 1 for no attention."""
    return max(depths[0], 1) if len(set(depths)) == 1 else list(depths)


def _refuse(problem: str) -> CheckpointError:
    return CheckpointError(
        f"unet: it has {problem}, which no known UNet of Stable Diffusion XL has; if diffusers can run it, pass the "
        "folder of its configurations as `config`"
    )
