"""latentrt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.peer_adapters.protocol import Drawn, Job, Peer, noise, serve


class LatentRT:
    """Our pipeline. Options: `load`, what `Pipeline.load` is given, and `request`, what is asked beside the picture."""

    def __init__(self, job: Job) -> None:
        import numpy as np

        from latentrt.pipeline import Pipeline
        from latentrt.request import Request

        values, shape = noise(job)
        self.latents = np.frombuffer(values, np.float32).reshape(shape)
        self.pipeline = Pipeline.load(job.model, threads=job.threads, **job.options["load"])
        request = Request(
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
        self.order = self.pipeline.resolve(request)

    def draw(self, step_ended: Callable[[], None]) -> Drawn:
        for step in self.pipeline.steps(self.order):
            latents = step.latents
            step_ended()
        return Drawn(self.pipeline.finish(self.order, latents).images[0].tobytes())

    def submodules(self) -> Mapping[str, Callable[[], object]]:
        import numpy as np

        from latentrt.backends.session import run
        from latentrt.backends.split_denoiser import InParts
        from latentrt.text.clip import condition

        sessions = {name: self.pipeline._submodules(name) for name in ("text_encoder", "unet", "vae_decoder")}
        tokenizer = self.pipeline._text()
        (told,) = condition(self.order, tokenizer, sessions["text_encoder"])
        # As the loop asks it: what does not depend on the latents is computed by the first call of a run.
        denoiser = sessions["unet"]
        if isinstance(denoiser, InParts):
            denoiser = denoiser.begin(np.full(1, 500, np.float32))
        feeds = {
            "sample": np.concatenate([self.latents, self.latents]),
            "timestep": np.full(2, 500, np.float32),
            "encoder_hidden_states": told.embeddings,
        }
        return {
            "text_encoder": lambda: condition(self.order, tokenizer, sessions["text_encoder"]),
            "unet": lambda: run(denoiser, **feeds),
            "vae_decoder": lambda: run(sessions["vae_decoder"], latents=self.latents),
        }


def load(job: Job) -> Peer:
    """The pipeline; graphs are loaded when the first picture needs them."""
    return LatentRT(job)


if __name__ == "__main__":
    serve(load)
