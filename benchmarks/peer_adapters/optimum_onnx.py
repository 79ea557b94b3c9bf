"""Optimum's pipeline on ONNX Runtime."""

from __future__ import annotations

from benchmarks.peer_adapters.diffusers_call import DiffusersPipeline
from benchmarks.peer_adapters.protocol import Job, serve


def load(job: Job) -> DiffusersPipeline:
    """Load the pipeline on the CPU provider; all of ONNX Runtime's optimisations are on by default."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    torch.set_num_threads(job.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    pipeline = ORTStableDiffusionPipeline.from_pretrained(
        job.model, provider="CPUExecutionProvider", session_options=options
    )
    return DiffusersPipeline(pipeline, job, torch.float32)


if __name__ == "__main__":
    serve(load)
