from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.bundle.tensors import MAX_AXIS_SIZE
from latentrt.engines.record import (
    EngineIdentity,
    EngineOptions,
    ShapeRange,
    describe_differences,
    engine_key,
    serves,
    this_platform,
)

LATENTS = ShapeRange(min=(1, 4, 64, 64), opt=(2, 4, 64, 64), max=(8, 4, 64, 64))
TOKENS = ShapeRange(min=(1, 77), opt=(2, 77), max=(8, 77))
IDENTITY = EngineIdentity(
    component="unet",
    precision="float16",
    graph="a" * 64,
    weights="b" * 64,
    profile={"sample": LATENTS, "tokens": TOKENS},
    options=EngineOptions(),
    library="tensorrt",
    library_version="11.0.0.1+cu13",
    platform="linux-x86_64",
    compute_capabilities=("8.9",),
    gpu="NVIDIA L4",
)

# Each field, another value of it, and the clause for the difference.
CHANGES: dict[str, tuple[Any, str]] = {
    "component": ("vae_decoder", "built from unet, wanted vae_decoder"),
    "precision": ("float32", "found float16, wanted float32"),
    "graph": ("c" * 64, "graph changed: unet"),
    "weights": ("c" * 64, "weights changed: unet"),
    "profile": (
        {"sample": msgspec.structs.replace(LATENTS, max=(9, 4, 64, 64)), "tokens": TOKENS},
        "profile of sample: found 1×4×64×64 … 2×4×64×64 … 8×4×64×64, wanted 1×4×64×64 … 2×4×64×64 … 9×4×64×64",
    ),
    "options": (EngineOptions(tf32=True), "tf32: found off, wanted on"),
    "library": ("tensorrt_rtx", "built by tensorrt, wanted tensorrt_rtx"),
    "library_version": ("11.1.0.0+cu13", "built by tensorrt 11.0.0.1+cu13, this is 11.1.0.0+cu13"),
    "platform": ("win32-amd64", "built for linux-x86_64, this is win32-amd64"),
    "compute_capabilities": (("9.0",), "built for 8.9, this GPU is 9.0"),
    "gpu": ("NVIDIA L40S", "built for NVIDIA L4, this is NVIDIA L40S"),
}
OPTIONS: dict[str, tuple[Any, str]] = {
    "optimization_level": (5, "optimization level: found 3, wanted 5"),
    "workspace_bytes": (1 << 30, "workspace bytes: found the library's default, wanted 1073741824"),
    "version_compatible": (True, "version compatible: found off, wanted on"),
    "hardware_compatibility": ("ampere_plus", "hardware compatibility: found none, wanted ampere_plus"),
    "refittable": (True, "refittable: found off, wanted on"),
    "weight_streaming": (True, "weight streaming: found off, wanted on"),
    "strip_weights": (True, "strip weights: found off, wanted on"),
    "tf32": (True, "tf32: found off, wanted on"),
}


def changed(**fields: Any) -> EngineIdentity:
    return msgspec.structs.replace(IDENTITY, **fields)


def test_every_field_is_tested() -> None:
    assert set(CHANGES) == set(EngineIdentity.__struct_fields__)
    assert set(OPTIONS) == set(EngineOptions.__struct_fields__)


# The key


def test_the_key_changes_with_every_field() -> None:
    others = [changed(**{field: value}) for field, (value, _) in CHANGES.items()]
    others += [changed(options=EngineOptions(**{field: value})) for field, (value, _) in OPTIONS.items()]
    keys = {engine_key(identity) for identity in [IDENTITY, *others]}
    assert len(keys) == len({msgspec.json.encode(identity) for identity in [IDENTITY, *others]})
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_the_key_changes_with_every_number_of_a_profile() -> None:
    wide = ShapeRange(min=(1, 3, 64, 64), opt=(3, 6, 70, 70), max=(8, 8, 80, 80))
    keys = {engine_key(changed(profile={"sample": wide, "tokens": TOKENS}))}
    for field in ("min", "opt", "max"):
        for axis in range(4):
            shape = list(getattr(wide, field))
            shape[axis] += 1
            shapes = msgspec.structs.replace(wide, **{field: tuple(shape)})
            keys.add(engine_key(changed(profile={"sample": shapes, "tokens": TOKENS})))
    assert len(keys) == 1 + 3 * 4


def test_the_key_does_not_depend_on_the_order_of_the_inputs() -> None:
    assert engine_key(changed(profile={"tokens": TOKENS, "sample": LATENTS})) == engine_key(IDENTITY)


def test_the_key_is_stable() -> None:
    """Caches and sealed bundles are looked up by it; a change of the key needs a new ENGINE_FORMAT."""
    assert engine_key(IDENTITY) == "1e79d384991d5cebb9b1d202b056d932640277b6056739035ed1548396986d0a"


def test_the_key_survives_json() -> None:
    assert engine_key(msgspec.json.decode(msgspec.json.encode(IDENTITY), type=EngineIdentity)) == engine_key(IDENTITY)


# Differences


def test_nothing_differs() -> None:
    assert describe_differences(IDENTITY, changed()) == []


@pytest.mark.parametrize("field", CHANGES)
def test_one_clause_for_each_field(field: str) -> None:
    value, fragment = CHANGES[field]
    (clause,) = describe_differences(IDENTITY, changed(**{field: value}))
    assert fragment in clause


@pytest.mark.parametrize("field", OPTIONS)
def test_one_clause_for_each_option(field: str) -> None:
    value, expected = OPTIONS[field]
    assert describe_differences(IDENTITY, changed(options=EngineOptions(**{field: value}))) == [expected]


def test_another_precision_is_another_graph() -> None:
    wanted = changed(precision="float32", graph="c" * 64)
    assert describe_differences(IDENTITY, wanted) == ["graph changed: unet (found float16, wanted float32)"]


def test_an_additional_input_is_a_difference() -> None:
    """In either engine."""
    assert describe_differences(IDENTITY, changed(profile={"sample": LATENTS})) != []
    assert describe_differences(changed(profile={"sample": LATENTS}), IDENTITY) != []


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (((1, 4), (1, 4), (8, 4)), ((1, 4), (8, 4), (8, 4))),
        (((1, 4), (1, 4), (1, 4)), ((1, 4), (1, 4), (8, 4))),
    ],
)
def test_the_two_sides_of_a_clause_differ(there: Any, here: Any) -> None:
    """`--batch 1:1:8` and `--batch 1:8:8` are two profiles."""
    found, wanted = (ShapeRange(min=low, opt=best, max=high) for low, best, high in (there, here))
    (clause,) = describe_differences(changed(profile={"sample": found}), changed(profile={"sample": wanted}))
    left, right = clause.removeprefix("profile of sample: found ").split(", wanted ")
    assert left != right


def test_differences_of_weights() -> None:
    without = changed(weights=None)
    assert describe_differences(IDENTITY, changed(weights="c" * 64), "686 arrays") == [
        "weights changed: unet, 686 arrays"
    ]
    assert describe_differences(IDENTITY, without, "686 arrays") == [
        "stored with weights, wanted without weights: unet"
    ]
    assert describe_differences(without, IDENTITY, "686 arrays") == [
        "stored without weights, wanted with weights: unet"
    ]


def test_differences_of_gpus() -> None:
    portable = changed(gpu=None, compute_capabilities=("8.6", "8.9"))
    assert describe_differences(portable, changed(gpu=None)) == [], "the plan is for this GPU too"
    more = changed(gpu=None, compute_capabilities=("8.9", "12.0"))
    assert describe_differences(portable, more) == ["built for 8.6, 8.9, wanted 8.9, 12.0"]
    assert describe_differences(changed(gpu=None), IDENTITY) == [
        "built for any GPU of its compute capability, this is NVIDIA L4"
    ]
    (any_gpu,) = describe_differences(IDENTITY, changed(gpu=None))
    assert any_gpu.startswith("built for NVIDIA L4, ")


def test_everything_at_once() -> None:
    other = {field: value for field, (value, _) in CHANGES.items() if field != "component"}
    clauses = describe_differences(IDENTITY, changed(**other))
    # Versions of different libraries are not compared, nor names of GPUs of different capabilities.
    assert len(clauses) == len(other) - len(["precision", "library_version", "gpu"])
    assert len(set(clauses)) == len(clauses)


# Serving


PORTABLE = changed(gpu=None, compute_capabilities=("8.6", "8.9", "12.0"))


@pytest.mark.parametrize("wanted", [("8.6",), ("8.9",), ("8.6", "12.0"), ("8.6", "8.9", "12.0")])
def test_one_plan_for_more_gpus_serves_fewer(wanted: tuple[str, ...]) -> None:
    assert serves(PORTABLE, changed(gpu=None, compute_capabilities=wanted))


@pytest.mark.parametrize("wanted", [("9.0",), ("8.9", "9.0"), ("8.6", "8.9", "12.0", "12.1")])
def test_a_plan_does_not_serve_other_gpus(wanted: tuple[str, ...]) -> None:
    assert not serves(PORTABLE, changed(gpu=None, compute_capabilities=wanted))


@pytest.mark.parametrize("field", [field for field in CHANGES if field != "compute_capabilities"])
def test_any_other_difference_excludes_an_engine(field: str) -> None:
    """The plan is for the same GPUs, or for more."""
    other = changed(**{field: CHANGES[field][0]})
    more = msgspec.structs.replace(other, compute_capabilities=("8.6", "8.9"))
    for found in (other, more):
        assert not serves(found, IDENTITY)
        assert describe_differences(found, IDENTITY) != []


@pytest.mark.parametrize("field", OPTIONS)
def test_an_engine_of_another_option_does_not_serve(field: str) -> None:
    found = changed(options=EngineOptions(**{field: OPTIONS[field][0]}))
    assert not serves(found, IDENTITY)
    assert not serves(IDENTITY, found)


def test_plans_with_weights_and_without_do_not_serve_each_other() -> None:
    assert not serves(changed(weights=None), IDENTITY)
    assert not serves(IDENTITY, changed(weights=None))


# Shapes


def test_shapes_that_a_range_covers() -> None:
    for shape in ((1, 4, 64, 64), (2, 4, 64, 64), (8, 4, 64, 64), (5, 4, 64, 64)):
        assert LATENTS.covers(shape)
    others: list[tuple[int, ...]] = [
        (0, 4, 64, 64),
        (9, 4, 64, 64),
        (2, 3, 64, 64),
        (2, 4, 64, 65),
        (2, 4, 64),
        (2, 4, 64, 64, 1),
        (),
    ]
    for other in others:
        assert not LATENTS.covers(other)


@given(st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4).map(sorted), min_size=1, max_size=4))
def test_a_range_covers_the_shapes_between_its_ends_only(axes: list[list[int]]) -> None:
    low, inside, best, high = (tuple(axis[index] for axis in axes) for index in range(4))
    shapes = ShapeRange(min=low, opt=best, max=high)
    assert all(map(shapes.covers, (low, inside, best, high)))
    for index in range(len(axes)):
        assert not shapes.covers((*high[:index], high[index] + 1, *high[index + 1 :]))
        assert not shapes.covers((*low[:index], low[index] - 1, *low[index + 1 :]))


@pytest.mark.parametrize(
    ("low", "best", "high", "fault"),
    [
        ((0, 4), (1, 4), (1, 4), "`int` >= 1"),
        ((1, 4), (1, 4), (1,), "shapes of 2, 2, 1 axes"),
        ((), (1,), (1,), "shapes of 0, 1, 1 axes"),
        ((2, 4), (1, 4), (2, 4), "got (2, 4), (1, 4) and (2, 4), expected minimum ≤ optimum ≤ maximum"),
        ((1, 4), (1, 5), (1, 4), "expected minimum ≤ optimum ≤ maximum"),
        ((1, 4), (1, 4), (1 << 40, 4), f"`int` <= {MAX_AXIS_SIZE}"),
        ((1,) * 9, (1,) * 9, (1,) * 9, "length <= 8"),
    ],
)
def test_a_range_that_no_input_has_is_not_decoded(low: Any, best: Any, high: Any, fault: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape(fault)):
        msgspec.convert({"min": low, "opt": best, "max": high}, ShapeRange)


def test_the_largest_range() -> None:
    shapes = msgspec.convert({"min": [1] * 8, "opt": [1] * 8, "max": [MAX_AXIS_SIZE] * 8}, ShapeRange)
    assert shapes.covers((MAX_AXIS_SIZE,) * 8)


def test_shapes_as_text() -> None:
    assert str(LATENTS) == "1×4×64×64 … 2×4×64×64 … 8×4×64×64"
    assert str(ShapeRange(min=(1, 77), opt=(1, 77), max=(1, 77))) == "1×77"


def test_the_platform_is_a_system_and_a_processor() -> None:
    assert re.fullmatch(r"[a-z0-9]+-[a-z0-9_]+", this_platform())
