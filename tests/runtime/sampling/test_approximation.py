"""What a request may leave out, and what it may not ask for."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from latentrt.sampling.approximation import EXACT, Approximation

from latentrt.bundle.manifest import Part
from latentrt.errors import RequestError
from latentrt.request import Request, resolve
from tests.runtime import small_bundle
from tests.runtime.backends.split_fakes import DEEP, KEYS, ROWS, SAMPLE


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_bundle.manifest(small_bundle.write_bundle(tmp_path_factory.mktemp("bundle")))


def with_shallow_part(manifest: Any) -> Any:
    unet = manifest.components["unet"]
    part = Part(inputs=(SAMPLE, ROWS, KEYS, DEEP), outputs=unet.outputs, graphs=unet.graphs)
    components = {**manifest.components, "unet": msgspec.structs.replace(unet, parts={"shallow_body": part})}
    return msgspec.structs.replace(manifest, components=components)


def test_nothing_is_left_out_unless_it_is_asked_for(manifest: Any) -> None:
    assert resolve(Request.of(prompt="a"), manifest).approximation == EXACT
    assert all(EXACT.guides(row, 50) and not EXACT.reuses(row) for row in range(50))


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    # diffusers, pipeline_controlnet.py: 1 − float(i / n < start or (i + 1) / n > end).
    [(0.0, 1.0, "1111"), (0.25, 1.0, "0111"), (0.3, 1.0, "0011"), (0.0, 0.5, "1100"), (0.5, 0.5, "0000")],
)
def test_an_interval_is_diffusers_interval(start: float, end: float, guided: str) -> None:
    found = Approximation(guidance_start=start, guidance_end=end)
    assert "".join(str(int(found.guides(row, 4))) for row in range(4)) == guided
    assert guided == "".join(str(int(1 - float(i / 4 < start or (i + 1) / 4 > end))) for i in range(4))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"guidance_start": -0.1}, "guidance_start: found -0.1, expected a share of the steps from 0 to 1"),
        ({"guidance_end": 1.5}, "guidance_end: found 1.5"),
        ({"guidance_end": "half"}, "guidance_end: found 'half'"),
        ({"guidance_end": float("nan")}, "guidance_end: found nan"),
        ({"guidance_start": True}, "guidance_start: found True"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start 0.6 behind guidance_end 0.5"),
        ({"deep_cache": 0}, "deep_cache: found 0, expected a whole number from 1 to 50"),
        ({"deep_cache": 2.5}, "deep_cache: found 2.5"),
        ({"deep_cache": 51}, "deep_cache: found 51"),
        ({"deep_cache": 3}, "this bundle's denoiser has no shallow part; export it with one: latentrt export"),
    ],
)
def test_what_is_impossible_is_refused(manifest: Any, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        resolve(Request.of(prompt="a", **asked), manifest)


def test_a_bundle_with_the_part_may_reuse(manifest: Any) -> None:
    order = resolve(Request.of(prompt="a", deep_cache=3), with_shallow_part(manifest))
    assert [order.approximation.reuses(row) for row in range(5)] == [False, True, True, False, True]


def test_numpys_numbers_will_do(manifest: Any) -> None:
    asked: Any = {"deep_cache": np.int64(3), "guidance_end": np.float32(0.5)}
    approximation = resolve(Request.of(prompt="a", **asked), with_shallow_part(manifest)).approximation
    assert [type(approximation.deep_cache), type(approximation.guidance_end)] == [int, float]


def test_a_decoder_is_one_of_three(manifest: Any) -> None:
    with pytest.raises(RequestError, match="decoder: found 'tiny', expected one of full, preview, tiled"):
        resolve(Request.of(prompt="a", decoder="tiny"), manifest)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="found the decoder preview, and this bundle has none"):
        resolve(Request.of(prompt="a", decoder="preview"), manifest)


def test_another_decoder_changes_no_row() -> None:
    assert not Approximation(decoder="preview").changes_rows
    assert Approximation(deep_cache=2).changes_rows
    assert Approximation(guidance_end=0.9).changes_rows
