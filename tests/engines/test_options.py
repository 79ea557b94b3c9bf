from __future__ import annotations

import sys
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineOptions
from latentrt.errors import BackendError, BundleError, LatentRTError, RequestError
from latentrt_engines.options import BuildOptions, BuildRequest, parse_bytes
from tests.engines.made_up import H100, NO_GPU, RTX4090, FakeTensorRT


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("0.5GiB", 1 << 29),
        ("512MiB", 512 << 20),
        ("64KiB", 64 << 10),
        ("4G", 4 << 30),
        ("4M", 4 << 20),
        ("4k", 4 << 10),
        ("1000000", 1000000),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes("workspace", text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2TiB", "2GB", "1e9", "0", "0GiB", "0.0", "0.5", "1GiB2", "²"])
def test_bytes_of_another_form_or_zero(text: str) -> None:
    with pytest.raises(RequestError, match=r"workspace .*2GiB"):
        parse_bytes("workspace", text)


def test_the_options_of_the_builder() -> None:
    assert BuildOptions().parse_engine_options() == EngineOptions()
    given = BuildOptions(
        builder_optimization_level=5,
        workspace="1GiB",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
    )
    assert given.parse_engine_options() == EngineOptions(
        optimization_level=5,
        workspace_bytes=1 << 30,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
    )


def resolve(
    bundle: Bundle, gpus: str | None = "rtx4090", capabilities: str | None = None, **options: Any
) -> BuildRequest:
    return BuildOptions(**options).resolve(bundle, gpus, capabilities, NO_GPU)


def test_every_component_for_the_bundles_default_images(sample: Bundle) -> None:
    request = resolve(sample)
    assert [target.component for target in request.targets] == list(sample.manifest.components)
    assert {target.identity.compute_capabilities for target in request.targets} == {("8.9",)}
    assert [str(profile) for profile in request.profiles] == ["64x64, batch 1, guidance on"]
    assert request.library.name == "tensorrt_rtx"


def test_gpus_and_capabilities_are_one_set_of_targets(sample: Bundle) -> None:
    request = resolve(sample, "rtx4090,rtx3060,rtx4080", "12.0,8.6", component=("unet",))
    assert [target.identity.compute_capabilities for target in request.targets] == [("8.6", "8.9", "12.0")]


def test_this_machines_gpu_where_none_is_named(sample: Bundle) -> None:
    request = BuildOptions(library="tensorrt_rtx").resolve(sample, None, None, RTX4090)
    assert {target.identity.compute_capabilities for target in request.targets} == {("8.9",)}
    assert request.gpu == RTX4090


def test_several_sizes_share_the_engines_that_no_size_changes(sample: Bundle) -> None:
    request = resolve(sample, size=("64x64", "128x128", "64x64"))
    names = [target.component for target in request.targets]
    assert names.count("text_encoder") == 1
    assert {names.count(name) for name in names if name != "text_encoder"} == {2}
    assert len({target.key for target in request.targets}) == len(names)


def test_the_options_reach_every_target(sample: Bundle) -> None:
    request = resolve(
        sample, component=("unet",), precision="float32", batch="1..2", chunks="2", guidance="off", workspace="1GiB"
    )
    (target,) = request.targets
    assert target.identity.precision == "float32"
    assert target.identity.options.workspace_bytes == 1 << 30
    assert target.identity.profile["encoder_hidden_states"].max == (2, 154, 128)


@pytest.mark.parametrize(
    ("given", "error", "fragment"),
    [
        ({"gpus": "rtx1"}, RequestError, "rtx1"),
        ({"gpus": None, "capabilities": "x"}, RequestError, "compute capabilities 'x'"),
        ({"gpus": None}, RequestError, "--compute-capabilities"),
        ({"gpus": "h100", "library": "tensorrt_rtx"}, RequestError, "compute capability 9.0"),
        ({"gpus": "9.0"}, RequestError, "compute capability 9.0"),
        ({"size": ("63",)}, RequestError, "`size`: got a width of 63"),
        ({"size": ("64", "big")}, RequestError, "`size`: got 'big'"),
        ({"batch": "99"}, RequestError, "`batch`: got 99"),
        ({"component": ("vae",)}, RequestError, "component 'vae'"),
        ({"workspace": "much"}, RequestError, "workspace 'much'"),
        ({"builder_optimization_level": 9}, RequestError, "optimization-level 9"),
        ({"refittable": True}, RequestError, "--refittable"),
        ({"library": "tensorrt"}, BackendError, "tensorrt"),
        ({"precision": "float16", "bundle": "sd1"}, BundleError, "float16"),
    ],
)
def test_invalid_options_are_rejected(
    sample: Bundle, request: pytest.FixtureRequest, given: dict[str, Any], error: type[LatentRTError], fragment: str
) -> None:
    bundle = Bundle.open(request.getfixturevalue(given.pop("bundle")).bundle) if "bundle" in given else sample
    with pytest.raises(error, match=fragment):
        resolve(bundle, **given)


@pytest.mark.parametrize(
    ("gpus", "named"),
    [("h100", "--gpu h100,"), ("rtx4090,l4,h100", "--gpu l4,h100,")],
)
def test_gpus_whose_engines_are_built_on_the_gpu_itself(sample: Bundle, gpus: str, named: str) -> None:
    """Another library would build them under a key that no run looks for."""
    with pytest.raises(RequestError, match=named) as error:
        resolve(sample, gpus)
    assert "--library tensorrt_rtx" in str(error.value)


def test_a_named_library_builds_for_them(sample: Bundle) -> None:
    request = resolve(sample, "l4", library="tensorrt_rtx", component=("unet",))
    assert [target.identity.compute_capabilities for target in request.targets] == [("8.9",)]
    assert request.library.name == "tensorrt_rtx"


def test_this_machines_gpu_by_its_name(sample: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    request = BuildOptions().resolve(sample, "h100", None, H100)
    assert {target.identity.gpu for target in request.targets} == {H100.name}
    assert [target.key for target in request.targets] == [
        target.key for target in BuildOptions().resolve(sample, None, None, H100).targets
    ]
    with pytest.raises(RequestError, match="--gpu l4,"):
        BuildOptions().resolve(sample, "l4", None, H100)


def test_a_card_without_a_name_by_its_capability(sample: Bundle) -> None:
    request = resolve(sample, "8.9,rtx3060,8.6", component=("unet",))
    assert [target.identity.compute_capabilities for target in request.targets] == [("8.6", "8.9")]
    assert [target.key for target in resolve(sample, "8.9").targets] == [
        target.key for target in resolve(sample).targets
    ]
