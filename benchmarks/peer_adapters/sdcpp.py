"""The adapter of stable-diffusion.cpp, through its Python binding."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.peer_adapters.protocol import GeneratedImage, Job, Peer, serve

# Its log messages at the start and at the end of a component.
_TAKEN = {
    "text_encoder": (r"generate_image \d+x\d+", r"get_learned_condition completed"),
    "vae_decoder": (r"decoding \d+ latents", r"decode_first_stage completed"),
}


class StableDiffusionCpp:
    """stable-diffusion.cpp's model. Option `wtype`: ggml's name of the type of the weights.

    Attention is the default one: by its documentation, flash attention slows most backends down.
    """

    def __init__(self, job: Job) -> None:
        import stable_diffusion_cpp

        self.job = job
        self.log: list[tuple[float, str]] = []
        self._listener = stable_diffusion_cpp.sd_log_callback(self._record_message)
        stable_diffusion_cpp.sd_set_log_callback(self._listener, ctypes.c_void_p(0))
        self.model = stable_diffusion_cpp.StableDiffusion(
            model_path=job.model,
            wtype=job.options["wtype"],
            n_threads=job.threads,
            # Both like torch's generator on a CPU, which generates the other peers' noise.
            rng_type="cpu",
            sampler_rng_type="cpu",
            vae_decode_only=True,
        )

    def _record_message(self, level: int, text: bytes, data: Any) -> None:
        self.log.append((time.perf_counter(), text.decode("utf-8", "replace")))

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        self.log.clear()
        ended: list[float] = []

        def progress(step: int, steps: int, seconds: float) -> None:
            if step > 0:  # the first call comes before the first step
                ended.append(time.perf_counter())
                step_ended()

        image = self.model.generate_image(
            self.job.prompt,
            width=self.job.side,
            height=self.job.side,
            cfg_scale=self.job.guidance_scale,
            sample_method="euler",
            scheduler="discrete",
            sample_steps=self.job.steps,
            seed=self.job.seed,
            progress_callback=progress,
        )[0]
        found = {name: self._find_time(done) - self._find_time(begun) for name, (begun, done) in _TAKEN.items()}
        if len(ended) > 1:
            found["unet"] = (ended[-1] - ended[0]) / (len(ended) - 1)
        return GeneratedImage(image.convert("RGB").tobytes(), found)  # without the alpha channel

    def _find_time(self, message: str) -> float:
        """Return the time of a log message."""
        return next(moment for moment, text in self.log if re.search(message, text))

    def components(self) -> Mapping[str, Callable[[], object]]:
        return {}


def load(job: Job) -> Peer:
    """Load the model into memory."""
    return StableDiffusionCpp(job)


if __name__ == "__main__":
    serve(load)
