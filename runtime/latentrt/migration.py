"""Names that callers know from diffusers and other tools, each with the way to do the same here."""

from __future__ import annotations

__all__ = ["attribute_advice", "keyword_advice", "module_advice"]

_LOAD = (
    "Pipeline.load('my-bundle') opens a bundle, which `latentrt export CHECKPOINT my-bundle` makes of a checkpoint once"
)
_DEVICE = "choose the device when you load: Pipeline.load('my-bundle', device='cuda')"
_MEMORY = "load with less memory: Pipeline.load('my-bundle', low_memory=True)"
_ATTENTION = (
    "attention is the backend's own and there is nothing to switch on; "
    "Pipeline.load('my-bundle', low_memory=True) saves memory"
)
_SAMPLER = "name the sampler in the call: pipeline(prompt, sampler='euler_a'); `latentrt samplers` lists them"
_PROGRESS = "pipeline(prompt, progress=False) shows no bar; pipeline.progress = False, none from now on"
_ADAPTERS = "adapters are not supported yet; merge them into the checkpoint (diffusers: `fuse_lora`) and export that"
_TILING = "decode in tiles by the request: pipeline(prompt, decoder='tiled')"

# Attributes of diffusers' pipelines.
_ATTRIBUTES = {
    "from_pretrained": _LOAD,
    "from_single_file": _LOAD,
    "from_ckpt": _LOAD,
    "from_pipe": "one pipeline does every task of its bundle: give `image`, and `mask_image` for inpainting",
    "save_pretrained": "a bundle is a folder: copy pipeline.bundle.folder",
    "to": _DEVICE,
    "cuda": _DEVICE,
    "cpu": "choose the device when you load: Pipeline.load('my-bundle', device='cpu')",
    "device": "pipeline.runs_on has the device of each component",
    "dtype": "pipeline.bundle.manifest.precision is the bundle's",
    "half": "export in half: `latentrt export CHECKPOINT my-bundle --precision float16`",
    "enable_model_cpu_offload": _MEMORY,
    "enable_sequential_cpu_offload": _MEMORY,
    "enable_attention_slicing": _ATTENTION,
    "disable_attention_slicing": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "disable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_vae_tiling": _TILING,
    "disable_vae_tiling": _TILING,
    "enable_vae_slicing": "images are decoded one at a time in any case",
    "disable_vae_slicing": "images are decoded one at a time in any case",
    "set_progress_bar_config": _PROGRESS,
    "progress_bar": _PROGRESS,
    "scheduler": _SAMPLER,
    "safety_checker": "choose the policy in the call: pipeline(prompt, safety='block'); 'off' checks nothing",
    "vae": "export another autoencoder: `latentrt export CHECKPOINT my-bundle --vae FOLDER`",
    "load_lora_weights": _ADAPTERS,
    "unload_lora_weights": _ADAPTERS,
    "fuse_lora": _ADAPTERS,
    "set_adapters": _ADAPTERS,
    "load_ip_adapter": _ADAPTERS,
    "load_textual_inversion": "textual inversions that the checkpoint's tokenizer has are exported with it",
}

# Keywords of calls: one of ours, or a sentence.
_KEYWORDS = {
    "scheduler": "sampler",
    "sampler_name": "sampler",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "init_image": "image",
    "mask": "mask_image",
    "denoising_strength": "strength",
    "control_guidance_start": "guidance_start",
    "control_guidance_end": "guidance_end",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end",
    "callback_on_step_end_tensor_inputs": "leave it out, `callback_on_step_end` is given the latents",
    "return_dict": "leave it out, the images are `.images` of the result",
    "timesteps": "`sampler_options` has the grids of a sampler",
    "sigmas": "`sampler_options` has the grids of a sampler",
    "cross_attention_kwargs": _ADAPTERS,
    "ip_adapter_image": _ADAPTERS,
    "control_image": "ControlNet is not supported yet",
}


def module_advice(name: str) -> str | None:
    """Return the way to do here what a class of diffusers does, such as `StableDiffusionPipeline`; None if unknown."""
    if name.endswith("Pipeline") or name.startswith("AutoPipeline"):
        return _LOAD
    return _SAMPLER if name.endswith("Scheduler") else None


def attribute_advice(name: str) -> str | None:
    """Return the way to do here what an attribute of diffusers' pipelines does; None for an unknown name."""
    return _ATTRIBUTES.get(name)


def keyword_advice(name: str) -> str | None:
    """Return the keyword or the sentence in place of another tool's keyword; None for an unknown one."""
    return _KEYWORDS.get(name)
