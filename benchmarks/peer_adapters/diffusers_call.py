"""Pipelines with the call of diffusers' StableDiffusionPipeline: diffusers itself and both of Optimum's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.peer_adapters.protocol import GeneratedImage, Job, noise

__all__ = ["DiffusersPipeline"]


class DiffusersPipeline:
    """A pipeline with the comparison's sampler and noise.

    Args:
        pipeline: a pipeline without a safety checker.
        dtype: torch's dtype of the pipeline's inputs.
    """

    def __init__(self, pipeline: Any, job: Job, dtype: Any) -> None:
        import torch
        from diffusers import EulerDiscreteScheduler

        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.job, self.dtype = pipeline, job, dtype
        values, shape = noise(job)
        self.latents = torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(shape).to(dtype)

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        def ended(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step_ended()
            return {}

        job = self.job
        image = self.pipeline(
            job.prompt,
            height=job.side,
            width=job.side,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            latents=self.latents.clone(),
            callback_on_step_end=ended,
        ).images[0]
        return GeneratedImage(image.tobytes())

    def components(self) -> Mapping[str, Callable[[], object]]:
        import torch

        pipeline, latents = self.pipeline, self.latents
        generator = torch.Generator("cpu").manual_seed(self.job.seed)
        width = pipeline.unet.config.cross_attention_dim
        embeddings = torch.randn(2, 77, width, generator=generator).to(self.dtype)
        pair, timestep = torch.cat([latents, latents]), torch.tensor(500)

        def decode() -> object:
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
            return pipeline.image_processor.postprocess(decoded, output_type="pil")

        runs: dict[str, Callable[[], object]] = {
            "text_encoder": lambda: pipeline.encode_prompt(self.job.prompt, "cpu", 1, True, ""),
            "unet": lambda: pipeline.unet(pair, timestep, encoder_hidden_states=embeddings, return_dict=False),
            "vae_decoder": decode,
        }
        return {name: _disable_gradients(run) for name, run in runs.items()}


def _disable_gradients(run: Callable[[], object]) -> Callable[[], object]:
    import torch

    # Not inference mode: pipelines use no_grad, and another mode would compile modules again.
    no_grad: Callable[[Callable[[], object]], Callable[[], object]] = torch.no_grad()
    return no_grad(run)
