"""Which bundles are of the sample model, and so can be scored by the judge."""

from __future__ import annotations

import msgspec
import pytest

from latentrt import Bundle
from latentrt.bundle.manifest import Manifest
from latentrt.bundle.sample import bundle_path
from sample.quality import is_sample_model
from tests.exported import Exported


@pytest.fixture
def manifest() -> Manifest:
    return Bundle.open(bundle_path()).manifest


def with_weights(manifest: Manifest, weights: dict[str, str]) -> Manifest:
    return msgspec.structs.replace(manifest, source=msgspec.structs.replace(manifest.source, weights=weights))


def test_the_sample_bundle_is_of_the_sample_model_and_another_is_not(sd1: Exported, manifest: Manifest) -> None:
    assert is_sample_model(manifest)
    assert not is_sample_model(Bundle.open(sd1.bundle).manifest)


def test_only_the_weights_that_images_depend_on_count(manifest: Manifest) -> None:
    weights = manifest.source.weights
    unchecked = {name: digest for name, digest in weights.items() if not name.startswith("safety_checker")}
    assert is_sample_model(with_weights(manifest, unchecked))
    plain = {name: digest for name, digest in weights.items() if not name.startswith("preview_decoder")}
    assert len(plain) < len(weights)
    assert is_sample_model(with_weights(manifest, plain)), "as exported by README's command"
    assert not is_sample_model(
        with_weights(manifest, {**weights, "unet/diffusion_pytorch_model.safetensors": "0" * 64})
    )
    assert not is_sample_model(with_weights(manifest, {}))
