"""The parts of a plan that the families with a UNet share: the autoencoder, the classifier, tasks and sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from latentrt.bundle.printable import quote
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import Checkpoint, find_own_folder
from latentrt_export.checkpoints.component_config import read_component_config
from latentrt_export.checkpoints.config_keys import check_keys, check_scheduler_keys
from latentrt_export.checkpoints.tokenizer_settings import read_tokenizer_settings
from latentrt_export.families.compatibility import VAE_CLASSES, Vae, read_vae
from latentrt_export.families.plan import ComponentPlan

__all__ = [
    "CLASS_LABEL_KEYS",
    "MAX_BATCH",
    "MAX_STEPS",
    "TEXT_TO_IMAGE",
    "check_all_keys",
    "check_unset",
    "find_tasks",
    "plan_decoder",
    "plan_encoder",
    "plan_last_components",
    "read_config",
    "read_preview",
    "read_size",
    "refuse_extension",
]

MAX_BATCH = 32
MAX_STEPS = 1000
TEXT_TO_IMAGE = ("text-to-image", "image-to-image", "inpainting")
"""The tasks of a denoiser that takes latents and a text."""
CLASS_LABEL_KEYS = ("class_embed_type", "num_class_embeds")
"""The keys of a UNet by which it takes class labels."""
# The modules of each class of autoencoder: encoder, decoder.
_VAE_MODULES = {
    "AutoencoderKL": ("vae:VaeEncoder", "vae:VaeDecoder"),
    "AutoencoderTiny": ("vae:TinyEncoder", "vae:TinyDecoder"),
    "AsymmetricAutoencoderKL": ("vae:AsymmetricVaeEncoder", "vae:AsymmetricVaeDecoder"),
}
# The decoder of a bundle that inpaints, where it differs.
_INPAINTING_DECODERS = {"AsymmetricAutoencoderKL": "vae:InpaintingVaeDecoder"}
# The class whose keys a component's configuration has; that of an autoencoder is its own.
_KEYS_OF = {
    "unet": "UNet2DConditionModel",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_normalizer": "StableUnCLIPImageNormalizer",
    "depth_estimator": "DPTForDepthEstimation",
    "preview_decoder": "AutoencoderTiny",
    "safety_checker": "StableDiffusionSafetyChecker",
}


def refuse_extension(reason: str, pipeline_class: str = "StableDiffusionPipeline") -> str:
    """Return why folders of a class are not exported although most of their parts are those of a supported one.

    Args:
        reason: a verb and its objects, of which the class is the subject.
        pipeline_class: the supported class.
    """
    return (
        f"which {reason}. Its parts are those of {pipeline_class}: to export it as that, without this, set _class_name "
        f"to {pipeline_class} in model_index.json"
    )


def read_config(checkpoint: Checkpoint, component: str) -> dict[str, Any]:
    """Read a component's configuration; absent keys have the defaults of diffusers and transformers."""
    folder = find_own_folder(checkpoint.weights[component].root, component)
    return read_component_config(folder, _KEYS_OF.get(component))


def read_preview(checkpoint: Checkpoint) -> Vae | None:
    """Read the autoencoder whose decoder makes previews; None if none was given."""
    if "preview_decoder" not in checkpoint.weights:
        return None
    return read_vae(read_config(checkpoint, "preview_decoder"), "AutoencoderTiny", "preview_decoder")


def check_all_keys(checkpoint: Checkpoint, vae_class: str, tokenizers: Collection[str]) -> Iterator[str]:
    """Check every key of the configurations; yield a warning for each component with keys that are ignored.

    Args:
        checkpoint: the checkpoint.
        vae_class: the class of its autoencoder.
        tokenizers: the folders of its tokenizers.

    Raises:
        CheckpointError: a key has a value that is not supported.
    """
    classes = {**_KEYS_OF, **({"vae": vae_class} if vae_class in VAE_CLASSES else {})}
    for component in (each for each in classes if each in checkpoint.weights):
        config = read_config(checkpoint, component)
        if component == "depth_estimator":  # transformers writes null for what a hybrid estimator does not have
            config = {key: value for key, value in config.items() if value is not None}
        yield from check_keys(component, classes[component], config)
    for tokenizer in tokenizers:
        yield from read_tokenizer_settings(checkpoint.folder / tokenizer).warnings
    yield from check_scheduler_keys("scheduler", checkpoint.scheduler_config)
    for name, scheduler in checkpoint.other_schedulers.items():
        yield from check_scheduler_keys(name, scheduler.config)


def check_unset(pipeline_class: str, unet: Mapping[str, Any], *keys: str) -> None:
    """Check that a UNet has none of the inputs that a pipeline does not give it.

    Args:
        pipeline_class: the class of the pipeline.
        unet: the configuration.
        keys: those that add an input.

    Raises:
        CheckpointError: one of them is set.
    """
    for key in keys:
        if unet.get(key) is not None:
            what = "class labels" if key in CLASS_LABEL_KEYS else "such conditioning"
            raise CheckpointError(
                f"unet: its configuration has {key} {quote(unet[key])}, expected none for a {pipeline_class}, which "
                f"gives no {what}; is model_index.json this unet's?"
            )


def find_tasks(
    pipeline_class: str, tasks: Mapping[int, tuple[str, ...]], unet: Mapping[str, Any], vae: Vae
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks, and a warning for each that is left out.

    Args:
        pipeline_class: the class of the pipeline.
        tasks: its tasks by the number of channels that the UNet takes.
        unet, vae: the configurations.

    Raises:
        CheckpointError: the UNet takes another number of channels, or nothing is left.
    """
    in_channels = unet.get("in_channels", 4)
    if in_channels not in tasks:
        raise CheckpointError(
            f"unet: its configuration has in_channels {quote(in_channels)}, expected {' or '.join(map(str, tasks))} "
            f"for a {pipeline_class}"
        )
    found = tasks[in_channels]
    if vae.inpaints or "inpainting" not in found:
        return found, ()
    lacks = (
        "its configuration has up_block_out_channels whose features an AsymmetricAutoencoderKL cannot combine with "
        "those of the image of inpainting, where diffusers fails too"
    )
    rest = tuple(task for task in found if task != "inpainting")
    if not rest:
        raise CheckpointError(f"vae: {lacks}, and inpainting is all that this unet does; pass another one as `vae`")
    return rest, (f"vae: {lacks}: the bundle does {' and '.join(rest)} only; pass another one with --vae to inpaint",)


def read_size(unet: Mapping[str, Any], default: int | None = None) -> tuple[int, int]:
    """Read the height and width of the latents of the UNet's training; `default` is the side where it states none."""
    match unet["sample_size"] if unet.get("sample_size") is not None else default:
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case found:
            raise CheckpointError(
                f"unet: its configuration has sample_size {quote(found)}, expected the side of the latents it was "
                "trained at"
            )


def plan_encoder(vae: Vae) -> ComponentPlan:
    """Plan the export of an autoencoder's encoder."""
    encoder, _ = _VAE_MODULES[vae.class_name]
    return ComponentPlan(name="vae_encoder", role="encoder", module=encoder, weights="vae", sources={"pixels": "image"})


def plan_decoder(vae: Vae, tasks: Collection[str], *, normalized: bool = False) -> ComponentPlan:
    """Plan the export of an autoencoder's decoder.

    Args:
        vae: the autoencoder.
        tasks: the bundle's.
        normalized: whether the loop's latents have mean 0 and standard deviation 1 by the autoencoder's statistics.
    """
    _, decoder = _VAE_MODULES[vae.class_name]
    sources = ["latents"]
    if "inpainting" in tasks and vae.class_name in _INPAINTING_DECODERS:
        decoder = _INPAINTING_DECODERS[vae.class_name]
        sources += ["image", "mask"]
    return ComponentPlan(
        name="vae_decoder",
        role="decoder",
        module="vae:NormalizedVaeDecoder" if normalized else decoder,
        weights="vae",
        sources={name: name for name in sources},
    )


def plan_last_components() -> Iterator[ComponentPlan]:
    """Plan the export of the components that come after the decoder, of those that a checkpoint has."""
    yield ComponentPlan(
        name="preview_decoder",
        role="preview-decoder",
        module="vae:TinyDecoder",
        weights="preview_decoder",
        sources={"latents": "latents"},
    )
    yield ComponentPlan(
        name="safety_checker",
        role="classifier",
        module="safety_checker:SafetyChecker",
        weights="safety_checker",
        sources={"pixels": "images"},
    )
