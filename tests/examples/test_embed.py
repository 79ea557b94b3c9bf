"""The asyncio program: progress of each step, the result, errors, and cancelling between two steps."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from examples import embed
from latentrt import Pipeline, RequestError, Result
from latentrt.bundle.sample import bundle_path


def test_each_step_is_an_event_and_the_result_is_the_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asyncio.run(embed.main(str(bundle_path()), "a red circle", str(tmp_path / "out.png")))
    assert capsys.readouterr().out.splitlines() == [f"step {done} of 25" for done in range(1, 26)]
    assert (tmp_path / "out.png").exists()


def test_leaving_the_loop_cancels() -> None:
    computed = 0

    class Counting(Pipeline):
        def steps(self, request):  # type: ignore[no-untyped-def]  # as its parent
            nonlocal computed
            for step in super().steps(request):
                computed += 1
                yield step

    async def leave_after_two() -> None:
        async with aclosing(embed.generate(Counting.load(), prompt="a", num_inference_steps=500)) as events:
            async for event in events:
                assert not isinstance(event, Result)
                if event[0] == 2:
                    break

    asyncio.run(leave_after_two())
    assert 2 <= computed < 500


def test_an_error_reaches_the_caller() -> None:
    async def fail() -> None:
        async with aclosing(embed.generate(Pipeline.load(), prompt="a", width=3)) as events:
            async for _ in events:
                pass

    with pytest.raises(RequestError):
        asyncio.run(fail())
