"""Refits by name: complete before anything is replaced, with correct digests afterwards. The library is faked; the fake
computes with the weights that it has, so that images show them."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from latentrt.backends.onnxruntime import open_session
from latentrt.backends.tensorrt import refit as seam
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.refit import refit
from latentrt.backends.tensorrt.session import EngineSession, NamedWeights
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.weights import map_weights
from latentrt.engines.record import EngineOptions
from latentrt.engines.store import StoredEngine
from latentrt.errors import EngineError, RequestError
from latentrt_engines.cache import EngineCache
from latentrt_engines.refit import refit_engine
from tests.engines import made_up
from tests.runtime import small_bundle
from tests.runtime.backends import fake_tensorrt
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import fake_library, fake_plan

WEIGHTS = "vae_decoder/model.safetensors"
LATENTS = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)


@pytest.fixture
def base() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def tuned(tmp_path: Path) -> Bundle:
    return retune(Path(shutil.copytree(bundle_path(), tmp_path / "tuned")))


def retune(folder: Path) -> Bundle:
    """Change the decoder's weights in a copy of the sample, as another checkpoint of the same architecture."""
    raw = np.memmap(folder / WEIGHTS, np.uint8, "r+")
    values = raw[8 + int.from_bytes(raw[:8].tobytes(), "little") :].view(np.float16)  # every array is half
    values *= (1 + 0.1 * np.random.default_rng(1).standard_normal(values.shape)).astype(np.float16)
    raw.flush()
    record = file_record(folder / WEIGHTS)
    small_bundle.edit_manifest(
        folder, lambda tree: tree["files"][WEIGHTS].update(sha256=record.sha256, size=record.size)
    )
    return Bundle.open(folder)


@pytest.fixture
def device() -> EngineDevice:
    api = FakeCudaApi()
    return EngineDevice(fake_library(api), api.cuda)


def named(bundle: Bundle) -> NamedWeights:
    return NamedWeights(map_weights(bundle.path(WEIGHTS)), bundle.manifest.files[WEIGHTS].sha256)


def publish(cache: EngineCache, bundle: Bundle, options: EngineOptions) -> StoredEngine:
    identity = made_up.identity(bundle, "vae_decoder", options=options)
    return made_up.publish(cache, bundle, identity, fake_plan(bundle, made_up.record(bundle, identity)))


def generate(session: EngineSession) -> bytes:
    return session.run({"latents": LATENTS})["pixels"].tobytes()


def test_weights_there_and_back_give_the_digests_and_the_images(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache
) -> None:
    """Runs that are recorded in a CUDA graph belong to the earlier weights, and are recorded again."""
    engine = publish(cache, base, EngineOptions(refittable=True))
    session = EngineSession(device, cache.plan(engine), engine.record)
    digests, images = [session.weights], [generate(session) for _ in range(3)]
    for bundle in (tuned, base):
        session.refit(named(bundle))
        digests.append(session.weights)
        images += [generate(session) for _ in range(3)]
    a, b = (bundle.manifest.files[WEIGHTS].sha256 for bundle in (base, tuned))
    assert digests == [a, b, a]
    assert len(set(images[:3])) == len(set(images[3:6])) == 1
    assert images[:3] == images[6:]
    assert images[0] != images[3]
    expected = open_session(tuned, "vae_decoder", threads=1).run({"latents": LATENTS})["pixels"]
    assert images[3] == expected.tobytes()


def test_a_refitted_engine_is_a_new_one_and_the_old_stays(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache
) -> None:
    engine = publish(cache, base, EngineOptions(refittable=True))
    made = refit_engine(engine, tuned, cache, device)
    assert made.record.identity == msgspec.structs.replace(
        engine.record.identity, weights=tuned.manifest.files[WEIGHTS].sha256
    )
    assert made.record.refitted_from == engine.key
    assert engine.key[:12] in (made.record.check.skip_reason or "")
    assert cache.plan(made) != cache.plan(engine)
    assert refit_engine(engine, tuned, cache, device) == made
    assert refit_engine(made, base, cache, device) == engine


def test_an_engine_that_is_not_refittable(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish(cache, base, EngineOptions())
    with pytest.raises(RequestError, match="latentrt build --refittable"):
        refit_engine(engine, tuned, cache, device)
    monkeypatch.setattr(fake_tensorrt.FakeEngine, "refittable", False)
    session = EngineSession(device, cache.plan(engine), engine.record)
    with pytest.raises(EngineError, match="vae_decoder: this engine was not built to be refitted"):
        session.refit(named(tuned))


def test_another_architecture_is_rejected(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache
) -> None:
    engine = publish(cache, base, EngineOptions(refittable=True))
    record = msgspec.structs.replace(
        engine.record, identity=msgspec.structs.replace(engine.record.identity, graph="0" * 64)
    )
    with pytest.raises(RequestError, match="another graph of vae_decoder"):
        refit_engine(StoredEngine(engine.folder, record), tuned, cache, device)


@pytest.mark.parametrize("case", ["missing", "unknown", "size", "dtype"])
def test_completeness_is_checked_before_anything_is_replaced(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache, case: str
) -> None:
    engine = publish(cache, base, EngineOptions(refittable=True))
    session = EngineSession(device, cache.plan(engine), engine.record)
    before = generate(session)
    arrays = dict(named(tuned).arrays)
    name = "decoder.conv_in.bias"
    array = arrays[name]
    if case == "missing":
        del arrays[name]
        message = f"{name} is missing"
    elif case == "unknown":
        arrays["decoder.conv_in.lora"] = array
        message = "decoder.conv_in.lora is unknown to the engine"
    elif case == "size":
        arrays[name] = array[:-1]
        message = f"{name} has {array.size - 1} float16, the engine {array.size} float16"
    else:
        arrays[name] = array.astype(np.float32)
        message = f"{name} has {array.size} float32, the engine {array.size} float16"
    with pytest.raises(EngineError, match=f"nothing was replaced: {message}"):
        session.refit(NamedWeights(arrays, "0" * 64))
    assert session.weights == base.manifest.files[WEIGHTS].sha256
    assert generate(session) == before


def test_the_library_rejects_the_weights(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = publish(cache, base, EngineOptions(refittable=True))
    loaded = device.deserialize(cache.plan(engine), engine.record)
    arrays = named(tuned).arrays

    def refitted() -> None:
        refit(device.library, loaded, device.logger, "vae_decoder", arrays)

    monkeypatch.setattr(fake_tensorrt.FakeRefitter, "refit_cuda_engine", lambda self: False)
    with pytest.raises(EngineError, match="failed to replace the weights; load the engine anew"):
        refitted()
    monkeypatch.setattr(fake_tensorrt.FakeRefitter, "get_missing_weights", lambda self: ["another"])
    with pytest.raises(EngineError, match="also needs another; nothing was replaced"):
        refitted()
    monkeypatch.setattr(fake_tensorrt.FakeRefitter, "set_named_weights", lambda self, name, weights: False)
    with pytest.raises(EngineError, match="rejects the weights of"):
        refitted()


def test_a_plan_without_weights_gets_the_bundles_weights(
    base: Bundle, tuned: Bundle, device: EngineDevice, cache: EngineCache
) -> None:
    identity = made_up.identity(base, "vae_decoder", weights=None, options=EngineOptions(strip_weights=True))
    record = made_up.record(base, identity)
    session = EngineSession(device, fake_plan(base, record), record, weights=named(tuned))
    expected = open_session(tuned, "vae_decoder", threads=1).run({"latents": LATENTS})["pixels"]
    assert generate(session) == expected.tobytes()
    assert session.weights == tuned.manifest.files[WEIGHTS].sha256


def test_the_fake_has_names_of_the_real_library() -> None:
    import tensorrt_rtx

    for fake, real in (
        (fake_tensorrt.FakeRefitter, "Refitter"),
        (fake_tensorrt.FakeSerializationConfig, "ISerializationConfig"),
    ):
        assert {name for name in vars(fake) if not name.startswith("_")} <= set(dir(getattr(tensorrt_rtx, real)))
    assert hasattr(tensorrt_rtx, "Weights")
    assert {"EXCLUDE_WEIGHTS", "INCLUDE_REFIT"} <= set(tensorrt_rtx.SerializationFlag.__members__)
    assert seam._DTYPES.keys() <= set(tensorrt_rtx.DataType.__members__)
