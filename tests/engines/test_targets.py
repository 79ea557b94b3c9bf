from __future__ import annotations

from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import TokenMerging
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineOptions, LibraryName, ShapeRange, engine_key, this_platform
from latentrt.errors import BackendError, BundleError, MissingExtraError, RequestError
from latentrt_engines import targets as module
from latentrt_engines.library import Library, load_library
from latentrt_engines.profiles import check_merging, component_profile, image_profile
from latentrt_engines.targets import (
    EngineTarget,
    choose_capabilities,
    choose_components,
    choose_library,
    list_targets,
)
from tests.engines.made_up import H100, NO_GPU, RTX4090, TENSORRT
from tests.exported import Exported

RTX = load_library("tensorrt_rtx")


def install(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    """Replace the installed libraries by these."""
    found: dict[LibraryName, Library | str] = {"tensorrt": "not installed", "tensorrt_rtx": "not installed"}
    found |= {library.name: library for library in libraries}

    def load(name: LibraryName) -> Library:
        library = found[name]
        if isinstance(library, str):
            raise MissingExtraError(name, "extra", "build")
        return library

    monkeypatch.setattr(module, "load_libraries", lambda: found)
    monkeypatch.setattr(module, "load_library", load)


# Libraries


@pytest.mark.parametrize(
    ("gpu", "named_targets", "expected"),
    [
        (NO_GPU, True, "tensorrt_rtx"),
        (NO_GPU, False, "tensorrt_rtx"),
        (RTX4090, True, "tensorrt_rtx"),
        (RTX4090, False, "tensorrt"),
        (H100, False, "tensorrt"),
    ],
)
def test_the_library_suits_the_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | NoGpu, named_targets: bool, expected: str
) -> None:
    install(monkeypatch, TENSORRT, RTX)
    assert choose_library(None, gpu, named_targets=named_targets).name == expected


def test_the_only_installed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RTX)
    assert choose_library(None, RTX4090, named_targets=False) == RTX
    install(monkeypatch, TENSORRT)
    assert choose_library(None, NO_GPU, named_targets=True) == TENSORRT


def test_tensorrt_rtx_is_not_chosen_for_a_gpu_that_it_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RTX)
    with pytest.raises(MissingExtraError) as missing:
        choose_library(None, H100, named_targets=False)
    assert missing.value.package == "tensorrt"


def test_no_library_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for gpu, package in ((NO_GPU, "tensorrt_rtx"), (H100, "tensorrt")):
        with pytest.raises(MissingExtraError) as missing:
            choose_library(None, gpu, named_targets=False)
        assert missing.value.package == package


def test_the_named_library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, TENSORRT, RTX)
    assert choose_library("tensorrt", NO_GPU, named_targets=True) == TENSORRT
    install(monkeypatch, RTX)
    with pytest.raises(BackendError):
        choose_library("tensorrt", RTX4090, named_targets=False)


# Compute capabilities


def test_named_capabilities_are_sorted_as_numbers_without_duplicates() -> None:
    """The order must not change the engine's key."""
    assert choose_capabilities(RTX, NO_GPU, ["12.0", "8.9", "7.5", "8.9"]) == ("7.5", "8.9", "12.0")


def test_the_gpu_of_this_machine_is_the_default() -> None:
    assert choose_capabilities(RTX, H100, []) == ("9.0",)


def test_a_gpu_must_be_named_where_none_is_installed() -> None:
    with pytest.raises(RequestError, match=r"no NVIDIA driver.*--compute-capabilities.*7\.5, 8\.0, 8\.6, 8\.9"):
        choose_capabilities(RTX, NO_GPU, [])


# Components


def test_named_components_or_all(sample: Bundle) -> None:
    assert choose_components(sample, ["unet", "text_encoder", "unet"]) == ("unet", "text_encoder")
    assert choose_components(sample, []) == tuple(sample.manifest.components)


def test_an_unknown_component(sample: Bundle) -> None:
    with pytest.raises(RequestError, match=r"component 'controlnet'.*preview_decoder"):
        choose_components(sample, ["unet", "controlnet"])


# Targets


def list_all(bundle: Bundle, library: Library = RTX, gpu: Gpu | NoGpu = NO_GPU, **given: Any) -> list[EngineTarget]:
    options = given.pop("options", EngineOptions())
    profile = image_profile(bundle.manifest)
    capabilities = ("8.9",) if isinstance(gpu, NoGpu) else (gpu.compute_capability,)
    return list_targets(
        bundle,
        bundle.manifest.components,
        profile,
        library=library,
        options=options,
        capabilities=capabilities,
        gpu=gpu,
        **given,
    )


def test_more_merged_tokens_than_the_library_ranks_are_rejected(sample: Bundle) -> None:
    """TensorRT-RTX itself: tests/engines/test_network.py."""
    blocks = ("down_blocks.1.attentions.0.transformer_blocks.0",)  # of half the latents' sides, an eighth of pixels
    merged = msgspec.structs.replace(
        sample.manifest.components["unet"], token_merging=TokenMerging(ratio=0.5, blocks=blocks)
    )
    components = {**sample.manifest.components, "unet": merged}
    sample.manifest = msgspec.structs.replace(sample.manifest, components=components)

    def shapes(size: str) -> dict[str, ShapeRange]:
        return component_profile("unet", merged, image_profile(sample.manifest, size=size), sample.manifest)

    check_merging(merged, shapes("480x512"))  # 60 × 64 = 3840
    check_merging(sample.manifest.components["vae_decoder"], {})
    with pytest.raises(RequestError, match=r"4,096 .*3,840"):
        check_merging(merged, shapes("64..512"))
    assert list_all(sample)


def test_int8_is_for_cpus(sample: Bundle) -> None:
    with pytest.raises(BundleError, match="int8"):
        list_all(sample, precision="int8")


@pytest.mark.parametrize("precision", [None, "float16", "float32"])
def test_an_identity_has_the_bundles_hashes(sample: Bundle, precision: Any) -> None:
    targets = list_all(sample, precision=precision)
    assert [target.component for target in targets] == list(sample.manifest.components)
    for target in targets:
        component, identity = sample.manifest.components[target.component], target.identity
        assert identity.precision == precision or (precision is None and identity.precision == "float16")
        assert identity.graph == sample.manifest.files[component.graphs[identity.precision].file].sha256
        assert identity.weights == sample.manifest.files[component.weights.file].sha256
        assert identity.profile == component_profile(
            target.component, component, image_profile(sample.manifest), sample.manifest
        )
        assert (identity.library, identity.library_version) == ("tensorrt_rtx", RTX.version)
        assert (identity.platform, identity.compute_capabilities, identity.gpu) == (this_platform(), ("8.9",), None)
        assert target.key == engine_key(identity)
    assert len({target.key for target in targets}) == len(targets)


def test_a_tensorrt_plan_is_for_one_gpu_model_unless_it_is_compatible(sample: Bundle) -> None:
    assert {target.identity.gpu for target in list_all(sample, TENSORRT, H100)} == {H100.name}
    compatible = EngineOptions(hardware_compatibility="same_compute_capability")
    assert {target.identity.gpu for target in list_all(sample, TENSORRT, H100, options=compatible)} == {None}
    assert {target.identity.gpu for target in list_all(sample, RTX, RTX4090)} == {None}


def test_a_precision_that_the_bundle_lacks(sd1: Exported) -> None:
    with pytest.raises(BundleError, match="float16"):
        list_all(Bundle.open(sd1.bundle), precision="float16")


def test_other_weights_are_another_engine_unless_they_are_stripped(sample: Bundle) -> None:
    place = sample.manifest.components["unet"].weights.file
    files = {**sample.manifest.files, place: msgspec.structs.replace(sample.manifest.files[place], sha256="0" * 64)}
    other = Bundle.open(sample.folder)
    other.manifest = msgspec.structs.replace(sample.manifest, files=files)

    def keys(**options: Any) -> list[set[str]]:
        return [{one.key for one in list_all(each, options=EngineOptions(**options))} for each in (sample, other)]

    first, second = keys()
    assert len(first - second) == 1
    first, second = keys(strip_weights=True)
    assert first == second
