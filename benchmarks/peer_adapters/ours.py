"""The adapter of latentrt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.peer_adapters.protocol import GeneratedImage, Job, Peer, noise, serve


class LatentRT:
    """latentrt's pipeline. Options: `load`, the keywords of `Pipeline.load`, and `request`, keywords of the request."""

    def __init__(self, job: Job) -> None:
        import numpy as np

        from latentrt.pipeline import Pipeline
        from latentrt.request import Request

        values, shape = noise(job)
        self.latents = np.frombuffer(values, np.float32).reshape(shape)
        self.pipeline = Pipeline.load(job.model, threads=job.threads, **job.options["load"])
        request = Request.of(
            prompt=job.prompt,
            height=job.side,
            width=job.side,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            latents=self.latents,
            seed=job.seed,
            sampler="euler",
            sampler_options={"timestep_spacing": "linspace"},
            safety="off",
            **job.options.get("request", {}),
        )
        self.request = self.pipeline.resolve(request)

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        for step in self.pipeline.steps(self.request):
            latents = step.latents
            step_ended()
        return GeneratedImage(self.pipeline.finish(self.request, latents).images[0].tobytes())

    def components(self) -> Mapping[str, Callable[[], object]]:
        import numpy as np

        from latentrt.backends.session import run

        (stage,) = self.pipeline.family.stages
        samples, denoiser = stage.begin(self.request), stage.open_denoiser()
        evaluations = samples[0].evaluations()
        inputs, timesteps = [samples[0].model_input()] * len(evaluations), [np.float32(500)] * len(evaluations)
        decoder = self.pipeline.components.session("vae_decoder")
        return {
            # Encodes the prompt, and makes the first latents in microseconds.
            "text_encoder": lambda: stage.begin(self.request),
            # As in the loop: work that does not depend on the latents is done in the first call alone.
            "unet": lambda: denoiser.evaluate(evaluations, inputs, timesteps),
            "vae_decoder": lambda: run(decoder, latents=self.latents),
        }


def load(job: Job) -> Peer:
    """Open the bundle; graphs are loaded for the first image."""
    return LatentRT(job)


if __name__ == "__main__":
    serve(load)
