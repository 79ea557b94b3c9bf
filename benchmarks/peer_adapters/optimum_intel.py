"""Optimum's pipeline on OpenVINO."""

from __future__ import annotations

from benchmarks.peer_adapters.diffusers_call import DiffusersPipeline
from benchmarks.peer_adapters.protocol import Job, serve


def load(job: Job) -> DiffusersPipeline:
    """Load the pipeline with static shapes, as its documentation advises. Option `hint`: OpenVINO's precision."""
    import torch
    from optimum.intel import OVStableDiffusionPipeline

    torch.set_num_threads(job.threads)
    pipeline = OVStableDiffusionPipeline.from_pretrained(
        job.model,
        compile=False,
        ov_config={
            "INFERENCE_PRECISION_HINT": job.options["hint"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(job.threads),
        },
    )
    pipeline.reshape(batch_size=1, height=job.side, width=job.side, num_images_per_prompt=1)
    pipeline.compile()
    return DiffusersPipeline(pipeline, job, torch.float32)


if __name__ == "__main__":
    serve(load)
