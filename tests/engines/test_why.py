from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineOptions
from latentrt.engines.store import WEIGHTS_NAME
from latentrt.errors import IntegrityError
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import seal
from latentrt_engines.why import Explanation, explain
from tests.engines.made_up import H100, PLAN, TENSORRT, identity, make_target, publish, retrained
from tests.runtime.small_bundle import change_byte


def explain_one(bundle: Bundle, cache: EngineCache, **changes: Any) -> Explanation:
    """Explain one engine of the denoiser."""
    (found,) = explain([make_target(bundle, "unet", **changes)], bundle, cache)
    return found


def test_no_engine_of_the_component_exists(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "vae_decoder"))
    found = explain_one(sample, cache)
    assert (found.nearest, found.sealed, found.differences) == (None, False, ("no engine of unet exists",))


def test_the_engine_exists(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    found = explain_one(sample, cache)
    assert (found.nearest, found.sealed, found.differences) == (engine.record, False, ())


def test_built_for_another_gpu(sample: Bundle, cache: EngineCache) -> None:
    target: dict[str, Any] = {"library": "tensorrt", "library_version": TENSORRT.version}
    publish(cache, sample, identity(sample, "unet", **target, gpu="NVIDIA L4"))
    found = explain_one(sample, cache, **target, gpu=H100.name, compute_capabilities=("9.0",))
    assert found.differences == ("built for 8.9, this GPU is 9.0",)


def test_several_differences(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet"))
    changes = {"options": EngineOptions(optimization_level=5, tf32=True), "library_version": "2.0+cu13"}
    assert explain_one(sample, cache, **changes).differences == (
        "built by tensorrt_rtx 1.2.3.4+cu13, this is 2.0+cu13",
        "optimization level: found 3, wanted 5",
        "tf32: found off, wanted on",
    )


def test_the_nearest_is_the_one_with_the_fewest_differences(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet", library_version="0", platform="elsewhere"))
    near = publish(cache, sample, identity(sample, "unet", library_version="0"))
    publish(cache, sample, identity(sample, "unet", library_version="0", options=EngineOptions(tf32=True)))
    found = explain_one(sample, cache)
    assert found.nearest == near.record
    assert len(found.differences) == 1


def test_one_plan_for_more_gpus_serves(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6", "8.9")))
    publish(cache, sample, identity(sample, "unet", compute_capabilities=("12.0",)))
    found = explain_one(sample, cache)
    assert (found.nearest, found.sealed, found.differences) == (engine.record, False, ())
    missing = explain_one(sample, cache, compute_capabilities=("8.9", "9.0"))
    assert (missing.nearest, missing.differences) == (engine.record, ("built for 8.6, 8.9, wanted 8.9, 9.0",))


def test_distance_is_by_graph_then_weights_then_shapes_then_gpus(sample: Bundle, cache: EngineCache) -> None:
    """The number of differences comes last: other options can be built again, but not for another graph."""
    other = {"library_version": "0", "options": EngineOptions(tf32=True, refittable=True)}
    profile = identity(sample, "unet").profile
    wide = {name: msgspec.structs.replace(shapes, max=(99, *shapes.max[1:])) for name, shapes in profile.items()}
    order: list[dict[str, Any]] = [
        {"graph": "0" * 64},
        {"weights": "0" * 64},
        {"profile": wide, **other},
        {"compute_capabilities": ("8.6",), **other},
        other,
        {"compute_capabilities": ("8.6", "8.9", "12.0")},
    ]
    for changes in order:  # each is nearer than all before it
        engine = publish(cache, sample, identity(sample, "unet", **changes))
        assert explain_one(sample, cache).nearest == engine.record


def test_an_incomplete_engine_is_ignored(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    near = publish(cache, sample, identity(sample, "unet", options=EngineOptions(tf32=True)))
    os.truncate(engine.plan_path, len(PLAN) - 1)
    found = explain_one(sample, cache)
    assert (found.nearest, found.differences) == (near.record, ("tf32: found on, wanted off",))
    near.plan_path.unlink()
    found = explain_one(sample, cache)
    assert (found.nearest, found.differences) == (None, ("no engine of unet exists",))


# Weights


def test_all_weights_changed(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    count = sample.manifest.components["unet"].weights.tensors
    assert count == 208
    assert explain_one(retrained(tmp_path / "b"), cache).differences == (f"weights changed: unet, {count} arrays",)


def test_some_weights_changed(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    other = retrained(tmp_path / "b", "conv_in.weight", "conv_out.bias", "conv_out.weight")
    assert explain_one(other, cache).differences == ("weights changed: unet, 3 of 208 arrays",)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"a": 1}', b"\xff"])
def test_digests_that_cannot_be_read(sample: Bundle, cache: EngineCache, tmp_path: Path, content: bytes | None) -> None:
    """The digests only give the number of arrays; without them the clause is shorter."""
    place = publish(cache, sample, identity(sample, "unet")).folder / WEIGHTS_NAME
    place.unlink() if content is None else place.write_bytes(content)
    assert explain_one(retrained(tmp_path / "b", "conv_in.bias"), cache).differences == ("weights changed: unet",)


def test_an_engine_without_weights(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet", weights=None))
    assert explain_one(sample, cache).differences == ("stored without weights, wanted with weights: unet",)


def test_damaged_weights_are_an_error(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    other = retrained(tmp_path / "b", "conv_in.weight")
    change_byte(other.folder / other.manifest.components["unet"].weights.file)
    with pytest.raises(IntegrityError):
        explain_one(Bundle.open(other.folder), cache)


# Sealed


def test_a_sealed_engine_is_preferred_to_an_equal_one(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    bundle = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    found = explain_one(bundle, cache)
    assert (found.nearest, found.sealed, found.differences) == (engine.record, True, ())


def test_a_nearer_engine_is_preferred_to_a_sealed_one(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    sealed = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    bundle = seal(sample, [sealed], cache, tmp_path / "out", overwrite=False)
    publish(cache, sample, identity(sample, "unet"))
    found = explain_one(bundle, cache)
    assert (found.sealed, found.differences) == (False, ())


def test_a_sealed_engine_is_found_without_a_cache(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    engine = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    bundle = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    found = explain_one(bundle, EngineCache(tmp_path / "empty"))
    assert (found.nearest, found.sealed) == (engine.record, True)
    assert found.differences == ("built for 8.6, wanted 8.9",)
