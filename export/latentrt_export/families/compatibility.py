"""Checks that the components of a checkpoint belong together, by their configurations, before any work.

Checkpoints are assembled from parts of others (an SD 1 text encoder beside an SD 2 UNet, an autoencoder of SDXL), and
each part loads by itself. Absent keys have the defaults of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError

__all__ = ["DEFAULT_PROJECTION_DIM", "VAE_CLASSES", "Vae", "check_components", "find_text_width", "read_vae"]

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
DEFAULT_PROJECTION_DIM = 512
"""transformers' default of a CLIP encoder's `projection_dim`."""
# diffusers' defaults of `UNet2DConditionModel`.
_TEXT_WIDTH = 1280
_DOWN_BLOCKS = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
_UP_BLOCKS = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
_MIDDLE_BLOCK = "UNetMidBlock2DCrossAttn"


@dataclass(frozen=True, kw_only=True)
class Vae:
    """The latents of an autoencoder, by its configuration.

    Attributes:
        class_name: one of `VAE_CLASSES`.
        channels: the channels of a latent.
        downscale: pixels per latent and side.
        scale: the factor from the autoencoder's latents to the sampling loop's.
        inpaints: whether diffusers can decode an inpainted image with it.
    """

    class_name: str
    channels: int
    downscale: int
    scale: float
    inpaints: bool = True


def read_vae(config: Mapping[str, Any], class_name: str, name: str = "vae") -> Vae:
    """Return the latents of an autoencoder from its configuration.

    Args:
        config: the configuration.
        class_name: one of `VAE_CLASSES`.
        name: the component's name, for errors.

    Raises:
        CheckpointError: the class is not supported, or encoder and decoder differ in the number of levels.
    """
    if class_name not in VAE_CLASSES:
        raise CheckpointError(
            f"{name}: got the class {quote(class_name)}, expected one of {', '.join(VAE_CLASSES)}; pass another "
            "autoencoder as `vae`"
        )
    if class_name == "AutoencoderKL":
        levels = {"block_out_channels": config.get("block_out_channels", (64,))}
        scale = config.get("scaling_factor", 0.18215)
    elif class_name == "AsymmetricAutoencoderKL":
        keys = ("down_block_out_channels", "up_block_out_channels")
        levels = {key: config.get(key, (64,)) for key in keys}
        scale = config.get("scaling_factor", 0.18215)
    else:
        keys = ("encoder_block_out_channels", "decoder_block_out_channels")
        levels = {key: config.get(key, (64,) * 4) for key in keys}
        scale = config.get("scaling_factor", 1.0)
        if (factor := config.get("upsampling_scaling_factor", 2)) != 2:
            raise CheckpointError(
                f"{name}: its configuration has upsampling_scaling_factor {quote(factor)}, expected 2, by which its "
                "encoder downscales each level"
            )
    counts = {key: len(channels) for key, channels in levels.items()}
    if len({*counts.values()}) > 1:
        found = " and ".join(f"{count} {key}" for key, count in counts.items())
        raise CheckpointError(
            f"{name}: its configuration has {found}, expected the same number of levels: an encoder and a decoder of "
            "the same factor"
        )
    return Vae(
        class_name=class_name,
        channels=config.get("latent_channels", 4),
        downscale=2 ** (max(counts.values()) - 1),
        scale=scale,
        inpaints=class_name != "AsymmetricAutoencoderKL" or _keeps_images(levels["up_block_out_channels"]),
    )


def _keeps_images(widths: Sequence[int]) -> bool:
    """Return whether an asymmetric decoder's features have the channels of those of the image of inpainting.

    Args:
        widths: `up_block_out_channels`.

    Source: diffusers' `MaskConditionEncoder`, which halves the image three times whatever the number of levels, and
    `MaskConditionDecoder`, which looks features up by their shape.
    """
    width, first, made = widths[-1], widths[0], set()
    for factor in (1, 1, 2, 4):
        first = min(first, width)
        made.add((first, factor))
        first *= 2
    made.add((width, 8))
    before = [width, *widths[:0:-1]]  # channels before each block
    used = {(channels, 2 ** (len(widths) - 1 - level)) for level, channels in enumerate(before)}
    return {*used, (widths[0], 1)} <= made


def find_text_width(unet: Mapping[str, Any]) -> int:
    """Return the width of the token embeddings that a UNet takes, from its configuration.

    `cross_attention_dim` may be a list of one number a level, of which those of levels with cross-attention count.

    Raises:
        CheckpointError: these numbers differ, or the list has another length than the levels.
    """
    width = unet.get("encoder_hid_dim")
    return _find_attention_width(unet) if width is None else width


def _find_attention_width(unet: Mapping[str, Any]) -> int:
    widths = unet.get("cross_attention_dim", _TEXT_WIDTH)
    if isinstance(widths, int):
        return widths
    down, up = unet.get("down_block_types", _DOWN_BLOCKS), unet.get("up_block_types", _UP_BLOCKS)
    if not isinstance(widths, Sequence) or len(widths) != len(down):
        raise CheckpointError(
            f"unet: its configuration has cross_attention_dim {quote(widths)}, expected a number or one for each of "
            f"its {len(down)} down_block_types"
        )
    if len(up) != len(down):
        raise CheckpointError(
            f"unet: its configuration has {len(down)} down_block_types and {len(up)} up_block_types, expected as many"
        )
    blocks = [*zip(down, widths, strict=True), *zip(reversed(up), widths, strict=True)]
    blocks.append((str(unet.get("mid_block_type", _MIDDLE_BLOCK)), widths[-1]))
    used = {width for block, width in blocks if "CrossAttn" in block}
    if len(used) > 1:
        raise CheckpointError(
            f"unet: its configuration has cross_attention_dim {quote(widths)}, expected the same number for all blocks "
            "with cross-attention, which attend to the same text embeddings"
        )
    width: int = used.pop() if used else widths[-1]
    return width


@dataclass(frozen=True)
class _Pair:
    """Two settings that must agree: component, key and value of each, and the value expected of the second."""

    first: tuple[str, str, Any]
    second: tuple[str, str, Any]
    expected: Any
    reason: str


def check_components(
    unet: Mapping[str, Any],
    vae: Vae,
    *,
    texts: Mapping[str, Mapping[str, Any]],
    image_encoder: Mapping[str, Any] | None = None,
    normalizer: Mapping[str, Any] | None = None,
    preview: Vae | None,
    noised_image: bool = False,
    variances: int = 0,
    micro_conditioning: int = 0,
) -> None:
    """Check that components belong together.

    Args:
        unet, image_encoder, normalizer: the configurations; None where the checkpoint has no such component.
        texts: text encoder → its configuration; their outputs are joined, in this order.
        vae, preview: the autoencoder, and the one whose decoder makes previews.
        noised_image: whether the image embedding takes the place of class labels (unCLIP), not of the text.
        variances: the number of channels of the UNet's output beyond those of the latents.
        micro_conditioning: the number of values that the UNet takes beside the pooled text of the last text encoder; 0
            for a UNet that takes neither.

    Raises:
        CheckpointError: two of them do not; the message names them, their keys and values.
    """
    pairs = [
        *_list_text_pairs(unet, texts, micro_conditioning),
        *_list_pairs(unet, vae, image_encoder, normalizer, preview, noised_image, variances),
    ]
    for pair in pairs:
        if pair.second[2] != pair.expected:
            (one, key, value), (other, other_key, other_value) = pair.first, pair.second
            raise CheckpointError(
                f"{one} and {other} do not belong together: {one} has {key} {quote(value)} and {other} has {other_key} "
                f"{quote(other_value)}, expected {pair.expected!r} ({pair.reason}); take both from the same checkpoint"
            )


def _list_text_pairs(
    unet: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]], micro_conditioning: int
) -> Iterator[_Pair]:
    if not texts:
        return
    widths = [text.get("hidden_size", 512) for text in texts.values()]
    own = (" with ".join(texts), "hidden_size", widths[0] if len(widths) == 1 else widths)
    reason = "the width of a token's embedding" + (", joined of all encoders" if len(widths) > 1 else "")
    yield _Pair(own, _find_text_input(unet), sum(widths), reason)
    if micro_conditioning:
        name, text = [*texts.items()][-1]
        pooled, width = text.get("projection_dim", DEFAULT_PROJECTION_DIM), unet.get("addition_time_embed_dim") or 0
        key = "projection_class_embeddings_input_dim"
        yield _Pair(
            (name, "projection_dim", pooled),
            ("unet", key, unet.get(key)),
            pooled + micro_conditioning * width,
            f"the pooled text, and {micro_conditioning} values of addition_time_embed_dim {width}",
        )


def _find_text_input(unet: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return the setting of a UNet by which it takes the embeddings of tokens: component, key and value."""
    key = "cross_attention_dim" if unet.get("encoder_hid_dim") is None else "encoder_hid_dim"
    return "unet", key, find_text_width(unet)


def _list_pairs(
    unet: Mapping[str, Any],
    vae: Vae,
    image_encoder: Mapping[str, Any] | None,
    normalizer: Mapping[str, Any] | None,
    preview: Vae | None,
    noised_image: bool,
    variances: int,
) -> Iterator[_Pair]:
    taken = _find_text_input(unet)
    if image_encoder is not None:
        width = image_encoder.get("projection_dim", DEFAULT_PROJECTION_DIM)
        own = ("image_encoder", "projection_dim", width)
        if noised_image:
            key = "projection_class_embeddings_input_dim"
            yield _Pair(own, ("unet", key, unet.get(key)), 2 * width, "an embedding and its noise level")
        else:
            yield _Pair(own, taken, width, "the width of an image's embedding")
        if normalizer is not None:
            found = ("image_normalizer", "embedding_dim", normalizer.get("embedding_dim", 768))
            yield _Pair(own, found, width, "the width of an image's embedding")
    out = ("unet", "out_channels", unet.get("out_channels", 4))
    more = f", and {variances} of variance" if variances else ""
    yield _Pair(("vae", "latent_channels", vae.channels), out, vae.channels + variances, f"channels of a latent{more}")
    if preview is not None:
        for key, ours, theirs, reason in (
            ("latent_channels", vae.channels, preview.channels, "channels of a latent"),
            ("pixels per latent", vae.downscale, preview.downscale, "the size of an image"),
        ):
            yield _Pair(("vae", key, ours), ("preview_decoder", key, theirs), ours, reason)
