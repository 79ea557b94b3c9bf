from __future__ import annotations

import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineOptions
from latentrt.errors import BackendError, BundleError, LatentRTError, RequestError
from latentrt_engines.ask import Ask, Wants, ask_options, parse_bytes, target_options
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
def test_bytes_of_another_form_or_none_at_all(text: str) -> None:
    with pytest.raises(RequestError, match=r"^found the workspace '.*', expected such as 2GiB or 512MiB"):
        parse_bytes("workspace", text)


def test_the_options_of_the_builder() -> None:
    assert Ask().options() == EngineOptions()
    given = Ask(
        builder_optimization_level=5,
        workspace="1GiB",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
    )
    assert given.options() == EngineOptions(
        optimization_level=5,
        workspace_bytes=1 << 30,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
    )


def wants(bundle: Bundle, gpus: str | None = "rtx4090", capabilities: str | None = None, **ask: Any) -> Wants:
    return Ask(**ask).wants(bundle, gpus, capabilities, NO_GPU)


def test_every_submodule_for_the_bundles_own_pictures(sample: Bundle) -> None:
    found = wants(sample)
    assert [engine.component for engine in found.engines] == list(sample.manifest.components)
    assert {engine.identity.compute_capabilities for engine in found.engines} == {("8.9",)}
    assert [str(profile) for profile in found.profiles] == ["64x64, batch 1, guidance on"]
    assert found.library.name == "tensorrt_rtx"


def test_gpus_and_capabilities_are_one_set_of_targets(sample: Bundle) -> None:
    found = wants(sample, "rtx4090,rtx3060,rtx4080", "12.0,8.6", component=("unet",))
    assert [engine.identity.compute_capabilities for engine in found.engines] == [("8.6", "8.9", "12.0")]


def test_this_machines_gpu_where_none_is_named(sample: Bundle) -> None:
    found = Ask(library="tensorrt_rtx").wants(sample, None, None, RTX4090)
    assert {engine.identity.compute_capabilities for engine in found.engines} == {("8.9",)}
    assert found.gpu == RTX4090


def test_several_sizes_share_the_engines_that_no_size_changes(sample: Bundle) -> None:
    found = wants(sample, size=("64x64", "128x128", "64x64"))
    names = [engine.component for engine in found.engines]
    assert names.count("text_encoder") == 1
    assert {names.count(name) for name in names if name != "text_encoder"} == {2}
    assert len({engine.key for engine in found.engines}) == len(names)


def test_what_is_asked_for_reaches_every_engine(sample: Bundle) -> None:
    found = wants(
        sample, component=("unet",), precision="float32", batch="1..2", chunks="2", guidance="off", workspace="1GiB"
    )
    (engine,) = found.engines
    assert engine.identity.precision == "float32"
    assert engine.identity.options.workspace_bytes == 1 << 30
    assert engine.identity.profile["encoder_hidden_states"].max == (2, 154, 128)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"gpus": "rtx1"}, RequestError, "found the GPU 'rtx1'"),
        ({"gpus": None, "capabilities": "x"}, RequestError, "found the compute capabilities 'x'"),
        ({"gpus": None}, RequestError, "nothing says which GPU to build for"),
        ({"gpus": "h100", "library": "tensorrt_rtx"}, RequestError, "cannot build for compute capability 9.0"),
        ({"gpus": "9.0"}, RequestError, "cannot build for compute capability 9.0"),
        ({"size": ("63",)}, RequestError, "found a width of 63 pixels"),
        ({"size": ("64", "big")}, RequestError, "found the size 'big'"),
        ({"batch": "99"}, RequestError, "found a batch of 99"),
        ({"component": ("vae",)}, RequestError, "found the component 'vae'"),
        ({"workspace": "much"}, RequestError, "found the workspace 'much'"),
        ({"builder_optimization_level": 9}, RequestError, "found optimization level 9"),
        ({"refittable": True}, RequestError, "refittable plans only on a machine with a GPU"),
        ({"library": "tensorrt"}, BackendError, "tensorrt"),
        ({"precision": "float16", "bundle": "sd1"}, BundleError, "has no float16 graph"),
    ],
)
def test_what_cannot_be_had_is_said_first(
    sample: Bundle, request: pytest.FixtureRequest, given: dict[str, Any], error: type[LatentRTError], sentence: str
) -> None:
    bundle = Bundle.open(request.getfixturevalue(given.pop("bundle")).bundle) if "bundle" in given else sample
    with pytest.raises(error, match=sentence):
        wants(bundle, **given)


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("h100", "h100 are built with TensorRT on itself"),
        ("rtx4090,l4,h100", "l4, h100 are built with TensorRT on themselves"),
    ],
)
def test_gpus_whose_engines_are_built_on_themselves(sample: Bundle, gpus: str, words: str) -> None:
    """Not by a library that they are not meant for, under a name that no run looks for."""
    with pytest.raises(RequestError, match=f"^engines for {words}: run latentrt build there, without --gpu") as error:
        wants(sample, gpus)
    assert "latentrt plan shows who builds what; --library tensorrt_rtx is for whoever" in str(error.value)


def test_a_library_for_them_all_the_same(sample: Bundle) -> None:
    found = wants(sample, "l4", library="tensorrt_rtx", component=("unet",))
    assert [engine.identity.compute_capabilities for engine in found.engines] == [("8.9",)]
    assert found.library.name == "tensorrt_rtx"


def test_this_machines_gpu_by_its_name(sample: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    found = Ask().wants(sample, "h100", None, H100)
    assert {engine.identity.gpu for engine in found.engines} == {H100.name}
    assert [engine.key for engine in found.engines] == [
        engine.key for engine in Ask().wants(sample, None, None, H100).engines
    ]
    with pytest.raises(RequestError, match=r"^engines for l4 are built with TensorRT on itself"):
        Ask().wants(sample, "l4", None, H100)


def test_a_card_without_a_name_by_its_capability(sample: Bundle) -> None:
    found = wants(sample, "8.9,rtx3060,8.6", component=("unet",))
    assert [engine.identity.compute_capabilities for engine in found.engines] == [("8.6", "8.9")]
    assert [engine.key for engine in wants(sample, "8.9").engines] == [engine.key for engine in wants(sample).engines]


def test_the_options_on_the_command_line() -> None:
    asked: list[Ask] = []
    targets: list[tuple[str | None, str | None]] = []

    @click.command()
    @target_options
    @ask_options
    def command(ask: Ask, gpus: str | None, capabilities: str | None) -> None:
        asked.append(ask)
        targets.append((gpus, capabilities))

    def call(line: str) -> int:
        return CliRunner().invoke(command, line.split()).exit_code

    assert call("") == 0
    flags = "--version-compatible --refittable --weight-streaming --strip-weights --tf32"
    sizes = "--component unet --component vae_decoder --size 64 --size 128x64 --batch 1:1:4 --chunks 2 --guidance both"
    rest = "--builder-optimization-level 5 --workspace 2GiB --hardware-compatibility ampere_plus --library tensorrt"
    assert call(f"{flags} {sizes} {rest} --precision float32 --gpu rtx4090 --compute-capabilities 8.6") == 0
    assert asked[0] == Ask()
    assert asked[1] == Ask(
        component=("unet", "vae_decoder"),
        precision="float32",
        size=("64", "128x64"),
        batch="1:1:4",
        chunks="2",
        guidance="both",
        builder_optimization_level=5,
        workspace="2GiB",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
        library="tensorrt",
    )
    assert call("--gpus rtx4090") == 0
    assert targets == [(None, None), ("rtx4090", "8.6"), ("rtx4090", None)]
    for wrong in ("--guidance maybe", "--library onnx", "--precision int8", "--builder-optimization-level high"):
        assert call(wrong) == 2
