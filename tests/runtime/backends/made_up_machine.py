"""A machine with a GPU and engines that ONNX Runtime computes, for tests of placement."""

from __future__ import annotations

import pytest

from latentrt.backends import placement
from latentrt.backends.tensorrt import device as engine_device
from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import Gpu
from latentrt_engines.cache import EngineCache
from latentrt_engines.profiles import component_profile, image_profile
from tests.engines import made_up
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import fake_library, fake_plan

COMPONENTS = ["preview_decoder", "safety_checker", "text_encoder", "unet", "vae_decoder", "vae_encoder"]


def with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> FakeCudaApi:
    api = FakeCudaApi()
    library = fake_library(api, "tensorrt_rtx", made_up.RTX.version)
    monkeypatch.setattr(placement, "find_gpu", lambda: gpu)
    monkeypatch.setattr(placement, "find_libraries", lambda: {"tensorrt": "not here", "tensorrt_rtx": library})
    monkeypatch.setattr(engine_device, "load_cuda", lambda: api.cuda)
    return api


def build(cache: EngineCache, bundle: Bundle, *components: str, size: str = "32..64", batch: str = "1") -> None:
    """Engines of stand-in plans that ONNX Runtime computes."""
    images = image_profile(bundle.manifest, size=size, batch=batch)
    for name in components or COMPONENTS:
        profile = component_profile(name, bundle.manifest.components[name], images, bundle.manifest)
        identity = made_up.identity(bundle, name, profile=profile)
        made_up.publish(cache, bundle, identity, fake_plan(bundle, made_up.record(bundle, identity)))
