from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineOptions
from latentrt.engines.store import WEIGHTS_NAME
from latentrt.errors import IntegrityError
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import seal
from latentrt_engines.why import Answer, explain
from tests.engines.made_up import H100, PLAN, TENSORRT, identity, publish, retrained, wanted
from tests.runtime.small_bundle import change_byte


def answer(bundle: Bundle, cache: EngineCache, **changes: Any) -> Answer:
    """For one engine of the denoiser."""
    (found,) = explain([wanted(bundle, "unet", **changes)], bundle, cache)
    return found


def test_nothing_is_built(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "vae_decoder"))
    found = answer(sample, cache)
    assert (found.nearest, found.sealed, found.differs) == (None, False, ("nothing is built of unet",))


def test_it_is_there(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    found = answer(sample, cache)
    assert (found.nearest, found.sealed, found.differs) == (engine.record, False, ())


def test_built_for_another_gpu(sample: Bundle, cache: EngineCache) -> None:
    target: dict[str, Any] = {"library": "tensorrt", "library_version": TENSORRT.version}
    publish(cache, sample, identity(sample, "unet", **target, gpu="NVIDIA L4"))
    found = answer(sample, cache, **target, gpu=H100.name, compute_capabilities=("9.0",))
    assert found.differs == ("built for 8.9, this GPU is 9.0",)


def test_several_differences(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet"))
    changes = {"options": EngineOptions(optimization_level=5, tf32=True), "library_version": "2.0+cu13"}
    assert answer(sample, cache, **changes).differs == (
        "built by tensorrt_rtx 1.2.3.4+cu13, this is 2.0+cu13",
        "optimization level: 3 there, 5 wanted",
        "tf32: off there, on wanted",
    )


def test_the_nearest_is_the_one_with_the_fewest_differences(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet", library_version="0", platform="elsewhere"))
    near = publish(cache, sample, identity(sample, "unet", library_version="0"))
    publish(cache, sample, identity(sample, "unet", library_version="0", options=EngineOptions(tf32=True)))
    found = answer(sample, cache)
    assert found.nearest == near.record
    assert len(found.differs) == 1


def test_one_plan_for_more_gpus_is_there(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6", "8.9")))
    publish(cache, sample, identity(sample, "unet", compute_capabilities=("12.0",)))
    found = answer(sample, cache)
    assert (found.nearest, found.sealed, found.differs) == (engine.record, False, ())
    missing = answer(sample, cache, compute_capabilities=("8.9", "9.0"))
    assert (missing.nearest, missing.differs) == (engine.record, ("built for 8.6, 8.9, wanted 8.9, 9.0",))


def test_the_nearest_is_of_the_graph_then_the_weights_then_the_shapes_then_the_gpus(
    sample: Bundle, cache: EngineCache
) -> None:
    """However many clauses it takes to say what else differs: that can be built again, another graph cannot be met."""
    other = {"library_version": "0", "options": EngineOptions(tf32=True, refittable=True)}
    order: list[dict[str, Any]] = [
        {"graph": "0" * 64},
        {"weights": "0" * 64},
        {"profile": {}, **other},
        {"compute_capabilities": ("8.6",), **other},
        other,
        {"compute_capabilities": ("8.6", "8.9", "12.0")},
    ]
    for changes in order:  # each is nearer than all before it
        engine = publish(cache, sample, identity(sample, "unet", **changes))
        assert answer(sample, cache).nearest == engine.record


def test_a_plan_of_another_size_is_not_there(sample: Bundle, cache: EngineCache) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    near = publish(cache, sample, identity(sample, "unet", options=EngineOptions(tf32=True)))
    os.truncate(engine.plan_path, len(PLAN) - 1)
    found = answer(sample, cache)
    assert (found.nearest, found.differs) == (near.record, ("tf32: on there, off wanted",))
    near.plan_path.unlink()
    found = answer(sample, cache)
    assert (found.nearest, found.differs) == (None, ("nothing is built of unet",))


# Weights


def test_all_weights_changed(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    count = sample.manifest.components["unet"].weights.tensors
    assert count == 208
    assert answer(retrained(tmp_path / "b"), cache).differs == (f"weights changed: unet, {count} arrays",)


def test_some_weights_changed(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    other = retrained(tmp_path / "b", "conv_in.weight", "conv_out.bias", "conv_out.weight")
    assert answer(other, cache).differs == ("weights changed: unet, 3 of 208 arrays",)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"a": 1}', b"\xff"])
def test_weights_of_which_nothing_is_known_any_more(
    sample: Bundle, cache: EngineCache, tmp_path: Path, content: bytes | None
) -> None:
    """The list only tells how many; without it the answer is shorter."""
    place = publish(cache, sample, identity(sample, "unet")).folder / WEIGHTS_NAME
    place.unlink() if content is None else place.write_bytes(content)
    assert answer(retrained(tmp_path / "b", "conv_in.bias"), cache).differs == ("weights changed: unet",)


def test_an_engine_without_weights(sample: Bundle, cache: EngineCache) -> None:
    publish(cache, sample, identity(sample, "unet", weights=None))
    assert answer(sample, cache).differs == ("kept without weights, wanted with: unet",)


def test_damaged_weights_are_not_counted_but_reported(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    publish(cache, sample, identity(sample, "unet"))
    other = retrained(tmp_path / "b", "conv_in.weight")
    change_byte(other.folder / other.manifest.components["unet"].weights.file)
    with pytest.raises(IntegrityError):
        answer(Bundle.open(other.folder), cache)


# Sealed


def test_the_bundles_own_engine_comes_before_the_caches(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    engine = publish(cache, sample, identity(sample, "unet"))
    bundle = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    found = answer(bundle, cache)
    assert (found.nearest, found.sealed, found.differs) == (engine.record, True, ())


def test_a_better_one_in_the_cache_comes_before_the_bundles(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    sealed = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    bundle = seal(sample, [sealed], cache, tmp_path / "out", overwrite=False)
    publish(cache, sample, identity(sample, "unet"))
    found = answer(bundle, cache)
    assert (found.sealed, found.differs) == (False, ())


def test_a_sealed_engine_is_found_without_a_cache(sample: Bundle, cache: EngineCache, tmp_path: Path) -> None:
    engine = publish(cache, sample, identity(sample, "unet", compute_capabilities=("8.6",)))
    bundle = seal(sample, [engine], cache, tmp_path / "out", overwrite=False)
    found = answer(bundle, EngineCache(tmp_path / "empty"))
    assert (found.nearest, found.sealed) == (engine.record, True)
    assert found.differs == ("built for 8.6, wanted 8.9",)
