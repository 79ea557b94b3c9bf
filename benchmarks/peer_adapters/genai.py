"""The adapter of OpenVINO GenAI."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_adapters.protocol import GeneratedImage, Job, Peer, noise, serve


class GenAI:
    """OpenVINO GenAI's pipeline with static shapes, as its documentation advises. Option `hint`: its precision."""

    def __init__(self, job: Job) -> None:
        import openvino_genai

        self.job = job
        self.properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": job.options["hint"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
        }
        self.pipeline: Any = openvino_genai.Text2ImagePipeline(job.model)
        self.pipeline.set_scheduler(_euler(Path(job.model)))
        self.pipeline.reshape(1, job.side, job.side, job.guidance_scale)
        self.pipeline.compile("CPU", **self.properties)
        self.latents = self._tensor()

    def _tensor(self) -> Any:
        """Return the noise as an OpenVINO tensor."""
        import numpy as np
        import openvino

        values, shape = noise(self.job)
        return openvino.Tensor(np.frombuffer(values, np.float32).reshape(shape).copy())

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        def ended(step: int, steps: int, latents: Any) -> bool:
            step_ended()
            return False

        tensor = self.pipeline.generate(
            self.job.prompt,
            negative_prompt="",
            height=self.job.side,
            width=self.job.side,
            num_inference_steps=self.job.steps,
            guidance_scale=self.job.guidance_scale,
            generator=_make_generator(self.latents),
            callback=ended,
        )
        return GeneratedImage(tensor.data.tobytes())

    def components(self) -> Mapping[str, Callable[[], object]]:
        import numpy as np
        import openvino
        import openvino_genai

        self.pipeline = None  # a small machine has no memory for two copies of the weights
        gc.collect()
        model, side = Path(self.job.model), self.job.side
        text = openvino_genai.CLIPTextModel(model / "text_encoder")
        unet = openvino_genai.UNet2DConditionModel(model / "unet")
        vae = openvino_genai.AutoencoderKL(model / "vae_decoder")
        text.reshape(2)
        unet.reshape(2, side, side, 77)
        vae.reshape(1, side, side)
        for component in (text, unet, vae):
            component.compile("CPU", **self.properties)
        states = text.infer(self.job.prompt, "", True)
        unet.set_hidden_states("encoder_hidden_states", states)
        pair = openvino.Tensor(np.concatenate([self.latents.data] * 2))
        timestep = openvino.Tensor(np.array(500, np.int64))
        return {
            "text_encoder": lambda: text.infer(self.job.prompt, "", True),
            "unet": lambda: unet.infer(pair, timestep),
            "vae_decoder": lambda: vae.decode(self.latents),
        }


def _euler(model: Path) -> Any:
    import openvino_genai

    config = json.loads((model / "scheduler/scheduler_config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scheduler_config.json"
        path.write_text(json.dumps({**config, "timestep_spacing": "linspace"}))
        return openvino_genai.Scheduler.from_config(path, openvino_genai.Scheduler.Type.EULER_DISCRETE)


def _make_generator(latents: Any) -> Any:
    """Return a generator with the job's noise."""
    import openvino_genai

    class JobNoise(openvino_genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def next(self) -> float:
            raise AssertionError("the pipeline requests noise as a tensor")

        def randn_tensor(self, shape: Any) -> Any:
            assert list(shape) == list(latents.shape), f"got the shape {shape}"
            return latents

    return JobNoise()


def load(job: Job) -> Peer:
    """Load and compile the pipeline."""
    return GenAI(job)


if __name__ == "__main__":
    serve(load)
