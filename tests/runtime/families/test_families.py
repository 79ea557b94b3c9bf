"""The register of families, and the components that every stage opens."""

from __future__ import annotations

import msgspec
import pytest

from latentrt.backends.models import Components, Models
from latentrt.backends.placement import place_components
from latentrt.bundle.bundle import Bundle
from latentrt.errors import BundleError
from latentrt.families import open_family
from latentrt.families.stable_diffusion import StableDiffusion


@pytest.mark.parametrize("name", ["stable-diffusion-1", "stable-diffusion-2"])
def test_a_family_is_found_by_the_manifests_name(bundle: Bundle, name: str) -> None:
    bundle.manifest = msgspec.structs.replace(bundle.manifest, family=name)
    own = Components(place_components(bundle, "cpu"), models=Models())
    family = open_family(bundle, own)
    assert type(family) is StableDiffusion
    assert family.denoiser == "unet"
    assert family.scheduler == bundle.manifest.schedulers["unet"]
    assert family.latent_space == bundle.manifest.latent_spaces["unet"]
    assert family.embedding_width == 128
    assert len(own._models) == 0, "nothing is loaded yet"


def test_an_unknown_family_is_refused(bundle: Bundle) -> None:
    bundle.manifest = msgspec.structs.replace(bundle.manifest, family="hourglass")
    with pytest.raises(BundleError, match=r"'hourglass'.*stable-diffusion-1.*upgrade"):
        open_family(bundle, Components({}))
