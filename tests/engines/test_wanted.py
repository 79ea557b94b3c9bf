from __future__ import annotations

from typing import Any

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import TokenMerging
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineOptions, LibraryName, ShapeRange, engine_key, this_platform
from latentrt.errors import BackendError, BundleError, MissingExtraError, RequestError
from latentrt_engines import wanted as module
from latentrt_engines.library import Library, load_library
from latentrt_engines.profiles import check_merging, component_profile, picture_profile
from latentrt_engines.wanted import choose_components, choose_library, choose_targets, wanted_engines
from tests.engines.made_up import H100, NO_GPU, RTX4090, TENSORRT
from tests.exported import Exported

RTX = load_library("tensorrt_rtx")


def install(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    """Make it look as if these libraries were installed, and no other."""
    found: dict[LibraryName, Library | str] = {"tensorrt": "not installed", "tensorrt_rtx": "not installed"}
    found |= {library.name: library for library in libraries}

    def load(name: LibraryName) -> Library:
        library = found[name]
        if isinstance(library, str):
            raise MissingExtraError(name, "extra", "build")
        return library

    monkeypatch.setattr(module, "installed_libraries", lambda: found)
    monkeypatch.setattr(module, "load_library", load)


# Which library


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
def test_the_library_that_fits(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | NoGpu, named_targets: bool, expected: str
) -> None:
    install(monkeypatch, TENSORRT, RTX)
    assert choose_library(None, gpu, named_targets=named_targets).name == expected


def test_the_only_one_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RTX)
    assert choose_library(None, RTX4090, named_targets=False) == RTX
    install(monkeypatch, TENSORRT)
    assert choose_library(None, NO_GPU, named_targets=True) == TENSORRT


def test_tensorrt_rtx_is_not_taken_for_a_gpu_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RTX)
    with pytest.raises(MissingExtraError) as missing:
        choose_library(None, H100, named_targets=False)
    assert missing.value.package == "tensorrt"


def test_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for gpu, package in ((NO_GPU, "tensorrt_rtx"), (H100, "tensorrt")):
        with pytest.raises(MissingExtraError) as missing:
            choose_library(None, gpu, named_targets=False)
        assert missing.value.package == package


def test_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, TENSORRT, RTX)
    assert choose_library("tensorrt", NO_GPU, named_targets=True) == TENSORRT
    install(monkeypatch, RTX)
    with pytest.raises(BackendError):
        choose_library("tensorrt", RTX4090, named_targets=False)


# For which GPU


def test_named_targets_are_sorted_as_numbers_and_stand_there_once() -> None:
    """The same set is the same engine, in whichever order it was given."""
    assert choose_targets(RTX, NO_GPU, ["12.0", "8.9", "7.5", "8.9"]) == ("7.5", "8.9", "12.0")


def test_the_gpu_of_this_machine_is_the_target() -> None:
    assert choose_targets(RTX, H100, []) == ("9.0",)


def test_nothing_says_for_which_gpu() -> None:
    with pytest.raises(RequestError, match=r"here there is no NVIDIA driver; name one.*knows 7\.5, 8\.0, 8\.6, 8\.9"):
        choose_targets(RTX, NO_GPU, [])


# Which submodules


def test_the_submodules_that_are_named_or_all(sample: Bundle) -> None:
    assert choose_components(sample, ["unet", "text_encoder", "unet"]) == ("unet", "text_encoder")
    assert choose_components(sample, []) == tuple(sample.manifest.components)


def test_a_submodule_that_the_bundle_does_not_have(sample: Bundle) -> None:
    with pytest.raises(RequestError, match="found the component 'controlnet', this bundle has preview_decoder"):
        choose_components(sample, ["unet", "controlnet"])


# What identifies them


def of(bundle: Bundle, library: Library = RTX, gpu: Gpu | NoGpu = NO_GPU, **given: Any) -> list[module.Wanted]:
    options = given.pop("options", EngineOptions())
    profile = picture_profile(bundle.manifest)
    capabilities = ("8.9",) if isinstance(gpu, NoGpu) else (gpu.compute_capability,)
    return wanted_engines(
        bundle,
        bundle.manifest.components,
        profile,
        library=library,
        options=options,
        capabilities=capabilities,
        gpu=gpu,
        **given,
    )


def test_more_merged_tokens_than_a_library_ranks_are_refused(sample: Bundle) -> None:
    """TensorRT-RTX itself: tests/engines/test_network.py."""
    blocks = ("down_blocks.1.attentions.0.transformer_blocks.0",)  # of half the latents' sides, an eighth of pixels
    merged = msgspec.structs.replace(
        sample.manifest.components["unet"], token_merging=TokenMerging(ratio=0.5, blocks=blocks)
    )
    components = {**sample.manifest.components, "unet": merged}
    sample.manifest = msgspec.structs.replace(sample.manifest, components=components)

    def shapes(size: str) -> dict[str, ShapeRange]:
        return component_profile("unet", merged, picture_profile(sample.manifest, size=size), sample.manifest)

    check_merging(merged, shapes("480x512"))  # 60 × 64 = 3840
    check_merging(sample.manifest.components["vae_decoder"], {})
    with pytest.raises(RequestError, match=r"found 4,096 tokens to merge in the largest picture, .* at most 3,840"):
        check_merging(merged, shapes("64..512"))
    assert of(sample)


def test_a_bundle_of_int8_is_for_cpus(sample: Bundle) -> None:
    with pytest.raises(BundleError, match="is a bundle of int8, which is for CPUs; engines are built of float16"):
        of(sample, precision="int8")


@pytest.mark.parametrize("precision", [None, "float16", "float32"])
def test_an_identity_is_made_of_the_bundles_own_hashes(sample: Bundle, precision: Any) -> None:
    engines = of(sample, precision=precision)
    assert [engine.component for engine in engines] == list(sample.manifest.components)
    for engine in engines:
        component, identity = sample.manifest.components[engine.component], engine.identity
        assert identity.precision == precision or (precision is None and identity.precision == "float16")
        assert identity.graph == sample.manifest.files[component.graphs[identity.precision].file].sha256
        assert identity.weights == sample.manifest.files[component.weights.file].sha256
        assert identity.profile == component_profile(
            engine.component, component, picture_profile(sample.manifest), sample.manifest
        )
        assert (identity.library, identity.library_version) == ("tensorrt_rtx", RTX.version)
        assert (identity.platform, identity.compute_capabilities, identity.gpu) == (this_platform(), ("8.9",), None)
        assert engine.key == engine_key(identity)
    assert len({engine.key for engine in engines}) == len(engines)


def test_a_tensorrt_plan_is_for_one_model_unless_it_is_built_to_be_compatible(sample: Bundle) -> None:
    assert {engine.identity.gpu for engine in of(sample, TENSORRT, H100)} == {H100.name}
    compatible = EngineOptions(hardware_compatibility="same_compute_capability")
    assert {engine.identity.gpu for engine in of(sample, TENSORRT, H100, options=compatible)} == {None}
    assert {engine.identity.gpu for engine in of(sample, RTX, RTX4090)} == {None}


def test_a_precision_that_the_bundle_does_not_have(sd1: Exported) -> None:
    with pytest.raises(BundleError, match="has no float16 graph of"):
        of(Bundle.open(sd1.bundle), precision="float16")


def test_other_weights_are_another_engine_unless_they_are_stripped(sample: Bundle) -> None:
    place = sample.manifest.components["unet"].weights.file
    files = {**sample.manifest.files, place: msgspec.structs.replace(sample.manifest.files[place], sha256="0" * 64)}
    other = Bundle.open(sample.folder)
    other.manifest = msgspec.structs.replace(sample.manifest, files=files)

    def keys(**options: Any) -> list[set[str]]:
        return [{one.key for one in of(each, options=EngineOptions(**options))} for each in (sample, other)]

    first, second = keys()
    assert len(first - second) == 1
    first, second = keys(strip_weights=True)
    assert first == second
