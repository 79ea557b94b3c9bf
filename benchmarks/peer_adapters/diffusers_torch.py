"""diffusers in torch, eager or compiled."""

from __future__ import annotations

from benchmarks.peer_adapters.diffusers_call import DiffusersPipeline
from benchmarks.peer_adapters.protocol import Job, serve


def load(job: Job) -> DiffusersPipeline:
    """Load the pipeline.

    Options: `dtype`; `compile`, the mode in which to compile the denoiser and the decoder (diffusers' guide to
    torch.compile). Convolutions use channels last (its guide to faster inference).
    """
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.options["dtype"])
    pipeline = StableDiffusionPipeline.from_pretrained(job.model, torch_dtype=dtype, safety_checker=None)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if job.options.get("compile"):
        pipeline.unet = torch.compile(pipeline.unet, mode=job.options["compile"], fullgraph=True)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=job.options["compile"], fullgraph=True)
    return DiffusersPipeline(pipeline, job, dtype)


if __name__ == "__main__":
    serve(load)
