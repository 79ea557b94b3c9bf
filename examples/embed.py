"""Generate in an asyncio program: stream progress while a thread generates, and cancel between two steps.

    python examples/embed.py sample "a red circle on a blue background" -o circle.png

Ctrl-C cancels. Steps run in a thread, so the event loop stays free for everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from latentrt import Pipeline, Request, Result


class GenerationCancelledError(Exception):
    """The generation was cancelled, so it has no result."""


async def generate(pipeline: Pipeline, **options: Any) -> AsyncGenerator[tuple[int, int] | Result, None]:
    """Yield (steps done, all steps) after each step, then the result. Leaving the loop cancels.

    Raises:
        LatentRTError: as the pipeline does.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    cancelled = threading.Event()

    def work() -> Result:
        request = pipeline.resolve(Request.of(**options))
        for step in pipeline.steps(request):
            if cancelled.is_set():
                raise GenerationCancelledError
            loop.call_soon_threadsafe(events.put_nowait, (step.index + 1, step.total))
        return pipeline.finish(request, step.latents)

    worker = asyncio.ensure_future(asyncio.to_thread(work))
    worker.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield await worker
    finally:
        cancelled.set()  # the thread ends before its next step
        await asyncio.wait({worker})
        if not worker.cancelled():
            worker.exception()  # retrieved, so that asyncio does not report that of the cancellation


async def main(bundle: str, prompt: str, output: str) -> None:
    """Print the progress of one generation and save its image."""
    pipeline = await asyncio.to_thread(Pipeline.load, bundle)
    async with aclosing(generate(pipeline, prompt=prompt)) as events:
        async for event in events:
            if isinstance(event, Result):
                event.save(output)
            else:
                print("step {} of {}".format(*event))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate an image and print each step.")
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", default="out.png")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.bundle, arguments.prompt, arguments.output))
