from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import InputSpec
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import MAX_AXIS_SIZE
from latentrt.engines.record import ShapeRange
from latentrt.errors import RequestError
from latentrt_engines.profiles import (
    DimRange,
    Guidance,
    ImageProfile,
    component_profile,
    image_profile,
    parse_count,
    parse_size,
)
from tests.engines.recording import feeds_of

BUNDLES = ("sd1", "sd2", "sample")
SAMPLE = Bundle.open(bundle_path(), trust_cache=False).manifest
LONG = " ".join(["red circle"] * 60)  # 120 tokens: two chunks of 75


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    if request.param == "sample":
        return Bundle.open(bundle_path())
    return Bundle.open(request.getfixturevalue(request.param).bundle)


def dims(low: int, best: int, high: int) -> DimRange:
    return DimRange(min=low, opt=best, max=high)


@pytest.mark.parametrize(
    ("text", "width", "height"),
    [
        ("512", dims(512, 512, 512), dims(512, 512, 512)),
        ("512x768", dims(512, 512, 512), dims(768, 768, 768)),
        ("512×768", dims(512, 512, 512), dims(768, 768, 768)),
        ("256..1024", dims(256, 640, 1024), dims(256, 448, 1024)),
        ("256x512..512x1024", dims(256, 512, 512), dims(512, 512, 1024)),
        ("704..1024", dims(704, 704, 1024), dims(704, 704, 1024)),
        ("256x256:512x384:1024x768", dims(256, 512, 1024), dims(256, 384, 768)),
        ("256:512:1024", dims(256, 512, 1024), dims(256, 512, 1024)),
    ],
)
def test_the_forms_of_a_size(text: str, width: DimRange, height: DimRange) -> None:
    """The optimum of a range is the default size, here 640 × 448, or the nearest that it includes."""
    assert parse_size(text, (640, 448)) == (width, height)


@pytest.mark.parametrize(
    ("text", "expected"), [("4", dims(4, 4, 4)), ("1..4", dims(1, 1, 4)), ("1:2:4", dims(1, 2, 4))]
)
def test_the_forms_of_a_count(text: str, expected: DimRange) -> None:
    assert parse_count("batch", text) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "512x", "x512", "512x512x3", "a", "256..", "..256", "1..2..3", "1:2", "1:2:3:4", "-64", "6.4e1"]
)
def test_a_size_of_another_form(text: str) -> None:
    with pytest.raises(RequestError, match=r"^`size`: got .*512x512.*min:opt:max"):
        parse_size(text, (64, 64))


@pytest.mark.parametrize("text", ["", "a", "1:2", "1..", "1..2..3", "1.5", "1_0", "²"])
def test_a_count_of_another_form(text: str) -> None:
    with pytest.raises(RequestError, match=r"^`batch`: got .*min:opt:max"):
        parse_count("batch", text)


@pytest.mark.parametrize("text", ["0", "-1", "4..1", "4:1:8", "1:8:4", "0:1:2"])
def test_a_count_in_the_wrong_order(text: str) -> None:
    with pytest.raises(RequestError, match=f"^`chunks`: got '{text}', expected at least 1"):
        parse_count("chunks", text)


@pytest.mark.parametrize("text", ["0", "1024..256", "512x512:256x256:1024x1024"])
def test_a_size_in_the_wrong_order(text: str) -> None:
    with pytest.raises(RequestError, match=f"^`size`: got '{text}', expected at least 1"):
        parse_size(text, (512, 512))


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"size": "2048"}, ("`size`: got a width of 2048", "32 to 1024")),
        ({"size": "64x16"}, ("`size`: got a height of 16", "32 to 1024")),
        ({"size": "64..1028"}, ("`size`: got a width of 1028", "32 to 1024")),
        ({"size": "66x64"}, ("`size`: got a width of 66", "multiple of 4: 64 or 68")),
        ({"size": "64:64:99"}, ("`size`: got a width of 99", "multiple of 4: 96 or 100")),
        ({"batch": "33"}, ("`batch`: got 33", "limit is 32")),
    ],
)
def test_a_profile_beyond_the_limits_of_the_bundle(options: dict[str, str], fragments: tuple[str, str]) -> None:
    with pytest.raises(RequestError) as refusal:
        image_profile(SAMPLE, **options)  # type: ignore[arg-type]
    assert all(fragment in str(refusal.value) for fragment in fragments)


def test_omitted_options_are_the_bundles_defaults() -> None:
    sixty_four, one = DimRange.of(64), DimRange.of(1)
    expected = ImageProfile(width=sixty_four, height=sixty_four, batch=one, chunks=one, guidance="on")
    assert image_profile(SAMPLE) == expected
    for scale, guidance in ((0.0, "off"), (1.0, "off"), (1.1, "on")):
        defaults = msgspec.structs.replace(SAMPLE.defaults, guidance_scale=scale)
        assert image_profile(msgspec.structs.replace(SAMPLE, defaults=defaults)).guidance == guidance


def test_a_profile_as_text() -> None:
    assert str(image_profile(SAMPLE)) == "64x64, batch 1, guidance on"
    ranged = image_profile(SAMPLE, size="32x32:64x96:128x128", batch="1:1:4", chunks="1..2", guidance="both")
    assert str(ranged) == "32x32:64x96:128x128, batch 1:1:4, chunks 1:1:2, guidance both"


@pytest.mark.parametrize(("tasks", "most"), [(("text-to-image",), 8), (("edit",), 12)])
def test_guidance_multiplies_the_evaluations(tasks: tuple[str, ...], most: int) -> None:
    manifest = msgspec.structs.replace(SAMPLE, tasks=tasks)
    profile = image_profile(manifest, batch="1..4", guidance="both")
    shapes = component_profile("unet", manifest.components["unet"], profile, manifest)
    assert (shapes["timestep"].min, shapes["timestep"].max) == ((1,), (most,))


def test_the_names_of_components_are_open() -> None:
    """Profiles follow from the names of axes and the sources of inputs."""
    renamed = {
        "encoder": SAMPLE.components["text_encoder"],
        "denoiser": msgspec.structs.replace(
            SAMPLE.components["unet"],
            inputs=tuple(
                msgspec.structs.replace(spec, source=spec.source.replace("text_encoder.", "encoder."))
                for spec in SAMPLE.components["unet"].inputs
            ),
        ),
    }
    manifest = msgspec.structs.replace(
        SAMPLE,
        components={**SAMPLE.components, **renamed},
        tokenizers={"encoder": SAMPLE.tokenizers["text_encoder"]},
        latent_spaces={"denoiser": SAMPLE.latent_spaces["unet"]},
    )
    profile = image_profile(manifest, size="64..128", batch="1..2", chunks="1..3")
    for new, old in (("denoiser", "unet"), ("encoder", "text_encoder")):
        shapes = component_profile(new, manifest.components[new], profile, manifest)
        assert shapes == component_profile(old, SAMPLE.components[old], profile, SAMPLE)


def test_joined_embeddings_have_the_tokens_of_one_encoder_and_sizes_a_row_for_each_evaluation() -> None:
    sample, timestep, text = SAMPLE.components["unet"].inputs
    inputs = (
        sample,
        timestep,
        msgspec.structs.replace(text, source=f"vae_encoder.mean+{text.source}"),
        InputSpec("time_ids", "float32", ("evaluations", 6), "micro-conditioning"),
    )
    component = msgspec.structs.replace(SAMPLE.components["unet"], inputs=inputs)
    profile = image_profile(SAMPLE, batch="1..2", chunks="1..3")
    shapes = component_profile("unet", component, profile, SAMPLE)
    plain = component_profile("unet", SAMPLE.components["unet"], profile, SAMPLE)
    assert shapes[text.name] == plain[text.name]
    assert shapes["time_ids"].max == (*plain["timestep"].max, 6)


def test_an_axis_that_does_not_follow_from_a_profile() -> None:
    unet = SAMPLE.components["unet"]
    depth = InputSpec("depth", "float32", ("batch", "layers"), "image")
    strange = msgspec.structs.replace(unet, inputs=(*unet.inputs, depth))
    with pytest.raises(RequestError, match=r"unet has the input depth float32\[batch, layers\].* axis layers "):
        component_profile("unet", strange, image_profile(SAMPLE), SAMPLE)


def test_an_axis_larger_than_a_record_may_have() -> None:
    """An engine that is built must be one whose record can be read again."""
    most = MAX_AXIS_SIZE // SAMPLE.tokenizers["text_encoder"].length
    largest, beyond = (image_profile(SAMPLE, chunks=f"1..{chunks}") for chunks in (most, most + 1))
    component_profile("unet", SAMPLE.components["unet"], largest, SAMPLE)
    with pytest.raises(RequestError, match=r"whose axis tokens would have .* expected at most 1,048,576; build for"):
        component_profile("unet", SAMPLE.components["unet"], beyond, SAMPLE)


def test_every_input_of_every_component_has_shapes_of_its_rank(bundle: Bundle) -> None:
    manifest = bundle.manifest
    profile = image_profile(manifest, size="64:64:128", batch="1..4")
    always = {"text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker"}
    assert always == set(manifest.components) - {"preview_decoder"}
    for name, component in manifest.components.items():
        shapes = component_profile(name, component, profile, manifest)
        assert list(shapes) == [spec.name for spec in component.inputs]
        for spec in component.inputs:
            fixed = [(index, axis) for index, axis in enumerate(spec.shape) if isinstance(axis, int)]
            for shape in (shapes[spec.name].min, shapes[spec.name].opt, shapes[spec.name].max):
                assert len(shape) == len(spec.shape)
                assert [(index, shape[index]) for index, _ in fixed] == fixed


def test_the_encoder_takes_one_image_in_pixels() -> None:
    profile = image_profile(SAMPLE, size="64x32:64x64:128x96", batch="4")
    found = component_profile("vae_encoder", SAMPLE.components["vae_encoder"], profile, SAMPLE)
    assert found == {"pixels": ShapeRange(min=(1, 3, 32, 64), opt=(1, 3, 64, 64), max=(1, 3, 96, 128))}


def test_the_image_encoder_takes_one_image_of_any_size() -> None:
    """Its graph resizes the input image, which need not have the size of the result."""
    pixels = InputSpec("pixels", "uint8", ("batch", "pixel_height", "pixel_width", 3), "image")
    encoder = msgspec.structs.replace(SAMPLE.components["vae_encoder"], inputs=(pixels,))
    found = component_profile("image_encoder", encoder, image_profile(SAMPLE, size="64x32", batch="4"), SAMPLE)
    assert found == {"pixels": ShapeRange(min=(1, 32, 32, 3), opt=(1, 32, 64, 3), max=(1, 1024, 1024, 3))}


def spans(smallest: int, largest: int, factor: int = 1) -> st.SearchStrategy[DimRange]:
    numbers = st.lists(st.integers(smallest, largest), min_size=3, max_size=3).map(sorted)
    return numbers.map(lambda three: dims(*(number * factor for number in three)))


@given(
    st.builds(
        ImageProfile,
        width=spans(8, 256, factor=4),
        height=spans(8, 256, factor=4),
        batch=spans(1, 32),
        chunks=spans(1, 9),
        guidance=st.sampled_from(["on", "off", "both"]),
    )
)
def test_the_usual_shape_lies_between_the_smallest_and_the_largest(profile: ImageProfile) -> None:
    for name, component in SAMPLE.components.items():
        for shapes in component_profile(name, component, profile, SAMPLE).values():
            for low, best, high in zip(shapes.min, shapes.opt, shapes.max, strict=True):
                assert 1 <= low <= best <= high


# The shapes that the pipeline feeds, compared with the profiles of engines


def uncovered(bundle: Bundle, request: dict[str, Any], options: dict[str, Any]) -> set[str]:
    """Return the components whose inputs in a request are not covered by the engine profile of `options`."""
    profile = image_profile(bundle.manifest, **options)
    fed = {name: shapes for name, shapes in feeds_of(bundle, **request).items() if shapes}
    assert set(fed) == {"text_encoder", "unet", "vae_decoder", "safety_checker"}
    return {
        name
        for name, feeds in fed.items()
        for shapes in feeds
        for given, shape in shapes.items()
        if not component_profile(name, bundle.manifest.components[name], profile, bundle.manifest)[given].covers(shape)
    }


THREE = ["a red circle", "a blue star", "a green heart"]
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({"prompt": "a red circle"}, {}),
    "several prompts": ({"prompt": THREE}, {"batch": "3"}),
    "the same prompt twice": ({"prompt": [THREE[0], *THREE[:2]]}, {"batch": "3"}),
    "several images of a prompt": ({"prompt": "a red circle", "num_images_per_prompt": 2}, {"batch": "2"}),
    "no guidance": ({"prompt": THREE, "guidance_scale": 0.0}, {"batch": "3", "guidance": "off"}),
    "guidance": ({"prompt": THREE, "guidance_scale": 3.0}, {"batch": "3", "guidance": "on"}),
    "wide": ({"prompt": "a red circle", "width": 128, "height": 64}, {"size": "128x64"}),
    "high": ({"prompt": "a red circle", "width": 72, "height": 96}, {"size": "72x96"}),
    "a long prompt": ({"prompt": LONG}, {"chunks": "2"}),
    "a long negative prompt": ({"prompt": THREE, "negative_prompt": LONG}, {"chunks": "2", "batch": "3"}),
    "clip skip": ({"prompt": THREE, "clip_skip": 1}, {"batch": "3"}),
    "short and long": ({"prompt": [*THREE, LONG]}, {"chunks": "1..2", "batch": "1..4"}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_profile_covers_the_shapes_of_its_images_in_the_pipeline(bundle: Bundle, case: str) -> None:
    assert uncovered(bundle, *SAME[case]) == set()


@pytest.mark.parametrize("guidance", ["on", "off"])
@pytest.mark.parametrize("side", [64, 96, 128])
@pytest.mark.parametrize("prompts", [THREE[:1], THREE, [LONG, *THREE]])
def test_a_range_covers_every_size_and_batch_within_it(
    sd1: Any, prompts: list[str], side: int, guidance: Guidance
) -> None:
    request = {"prompt": prompts, "width": side, "guidance_scale": 2.0 if guidance == "on" else 1.0}
    options = {"size": "64:64:128", "batch": "1..4", "chunks": "1..2", "guidance": "both"}
    assert uncovered(Bundle.open(sd1.bundle), request, options) == set()


@pytest.mark.parametrize(
    ("request_", "options", "expected"),
    [
        ({"prompt": "a", "width": 128}, {}, {"unet", "vae_decoder", "safety_checker"}),
        ({"prompt": "a", "height": 72}, {"size": "64x80:64x80:64x96"}, {"unet", "vae_decoder", "safety_checker"}),
        ({"prompt": THREE}, {"batch": "1..2"}, {"text_encoder", "unet", "safety_checker"}),
        ({"prompt": "a", "num_images_per_prompt": 3}, {"batch": "1..2"}, {"unet", "safety_checker"}),
        ({"prompt": "a"}, {"batch": "2"}, {"unet", "safety_checker"}),
        ({"prompt": LONG}, {}, {"text_encoder", "unet"}),
        ({"prompt": "a"}, {"chunks": "2"}, {"unet"}),
        ({"prompt": "a", "guidance_scale": 1.0}, {"guidance": "on"}, {"unet"}),
        ({"prompt": "a", "guidance_scale": 5.0}, {"guidance": "off"}, {"unet"}),
    ],
)
def test_other_shapes_are_not_covered(
    bundle: Bundle, request_: dict[str, Any], options: dict[str, Any], expected: set[str]
) -> None:
    assert uncovered(bundle, request_, options) == expected
