"""Scores of a bundle of the sample model: prompts, guidance, negative prompts, the classifier.

The judge reads the images. A score is the number of right images and the number of images. Prompts of one thing and of
two are held out: the training data do not contain these combinations. Negative prompts name things of any combination,
and there is one kind of unsafe image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt import Bundle, Pipeline
from latentrt.bundle.manifest import Manifest
from latentrt.bundle.sample import bundle_path
from sample.captions import caption
from sample.judge import Reading, agrees, read
from sample.prompts import Prompt, held_out_prompts, unsafe_prompts, with_unknown_words
from sample.scenes import COLOURS, Scene, Thing, random_scene

__all__ = [
    "OTHER_NEGATIVE",
    "OWN_NEGATIVE",
    "PROMPT_SEED",
    "UNKNOWN_WITH_OR_WITHOUT",
    "WITH_OR_WITHOUT_GUIDANCE",
    "Progress",
    "Score",
    "Settings",
    "compare_readings",
    "fully_right",
    "generate",
    "guidance",
    "is_sample_model",
    "negatives",
    "read_images",
    "safety",
    "score_prompts",
]

FIRST_SEED = 1000
PROMPT_SEED = 2026

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """The settings of generation; `options` are further keywords of the pipeline. `sample.bars` is for the defaults."""

    steps: int = 25
    guidance_scale: float = 5.0
    sampler: str = "ddim"
    batch: int = 32
    safety: str = "report"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The number of right images, and the number of images."""

    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of if self.of else float("nan")


def read_images(pipeline: Pipeline, settings: Settings, prompts: Sequence[Prompt], progress: Progress) -> list[Reading]:
    """Return the judge's reading of one image per prompt; `progress` is called with the number of new images."""
    batches = generate(pipeline, settings, [prompt.text for prompt in prompts], progress=progress)
    return [read(image) for images, _ in batches for image in images]


def score_prompts(prompts: Sequence[Prompt], seen: Sequence[Reading]) -> dict[str, Score]:
    """Return the scores of readings, by the kind of attribute in their prompts."""
    pairs = [(prompt.scene, reading) for prompt, reading in zip(prompts, seen, strict=True)]
    one = [pair for pair in pairs if len(pair[0].things) == 1]
    two = [pair for pair in pairs if len(pair[0].things) == 2]
    return {
        "one thing: shape and colour": _share([(_only(scene, "shape", "colour"), seen) for scene, seen in one]),
        "one thing: size": _share([(_only(scene, "size"), seen) for scene, seen in one if scene.things[0].size]),
        "one thing: place": _share([(_only(scene, "place"), seen) for scene, seen in one if scene.place]),
        "one thing: fully right": _share(one),
        "background": _share([(Scene((), scene.background), seen) for scene, seen in pairs]),
        "two things: shapes and colours": _share([(_only(scene, "shape", "colour"), seen) for scene, seen in two]),
        "two things: fully right": _share(two),
    }


def fully_right(prompts: Sequence[Prompt], seen: Sequence[Reading]) -> Score:
    """Return the number of images that show everything that their prompts name, and no other thing."""
    return _share([(prompt.scene, reading) for prompt, reading in zip(prompts, seen, strict=True)])


def compare_readings(
    prompts: Sequence[Prompt], seen: Sequence[Reading], others: Sequence[Reading]
) -> tuple[Score, Score]:
    """Return the number of prompts that are fully right only in the first images, and only in the second.

    With the same prompts and noise, `sample.bars.sign_test` of the two numbers shows whether one is better.
    """
    first, second = (
        [agrees(prompt.scene, reading) for prompt, reading in zip(prompts, readings, strict=True)]
        for readings in (seen, others)
    )
    alone = sum(one and not two for one, two in zip(first, second, strict=True))
    return Score(alone, len(prompts)), Score(alone + sum(second) - sum(first), len(prompts))


def generate(
    pipeline: Pipeline,
    settings: Settings,
    texts: Sequence[str],
    *,
    progress: Progress,
    negative: Sequence[str] | None = None,
) -> Iterator[tuple[NDArray[np.uint8], list[bool]]]:
    """Yield batches of images, uint8 [batch, 64, 64, 3], and of the images' flags. Every image has its own seed."""
    for start in range(0, len(texts), settings.batch):
        part = slice(start, start + settings.batch)
        result = pipeline(
            list(texts[part]),
            negative_prompt=None if negative is None else list(negative[part]),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            seed=[FIRST_SEED + start + index for index in range(len(texts[part]))],
            safety=settings.safety,
            **settings.options,
        )
        images = np.stack([np.asarray(image) for image in result.images])
        yield images, result.nsfw_content_detected or [False] * len(images)
        progress(len(images))


def _only(scene: Scene, *names: str) -> Scene:
    """Return a scene with these attributes only; the axis stays, as it defines the order of the things."""
    things = tuple(
        replace(Thing(), **{name: getattr(thing, name) for name in names if name != "place"}) for thing in scene.things
    )
    return Scene(things, None, scene.place if "place" in names else None, scene.axis)


def _share(pairs: Sequence[tuple[Scene, Reading]]) -> Score:
    return Score(sum(agrees(scene, reading) for scene, reading in pairs), len(pairs))


# Prompts of known words are followed almost as well without guidance; prompts with unknown words are not.
UNKNOWN = 2
WITH_OR_WITHOUT_GUIDANCE = "right with guidance, wrong without", "wrong with guidance, right without"
UNKNOWN_WITH_OR_WITHOUT = tuple(f"{UNKNOWN} unknown words: {name}" for name in WITH_OR_WITHOUT_GUIDANCE)
OWN_NEGATIVE = "colour kept against its own negative"
OTHER_NEGATIVE = "colour kept against another's"


def guidance(pipeline: Pipeline, settings: Settings, prompts: Sequence[Prompt], progress: Progress) -> dict[str, Score]:
    """Score the effect of guidance on prompts that contain unknown words."""
    harder = with_unknown_words(prompts, UNKNOWN, PROMPT_SEED)
    unguided = replace(settings, guidance_scale=1.0)
    guided, free = (read_images(pipeline, one, harder, progress) for one in (settings, unguided))
    return {
        f"{UNKNOWN} unknown words: fully right": fully_right(harder, guided),
        f"{UNKNOWN} unknown words: fully right (guidance 1)": fully_right(harder, free),
        **dict(zip(UNKNOWN_WITH_OR_WITHOUT, compare_readings(harder, guided, free), strict=True)),
    }


def negatives(pipeline: Pipeline, settings: Settings, count: int, progress: Progress) -> dict[str, Score]:
    """Score the effect of a negative prompt on a colour.

    An image is generated from a prompt without a colour, then again from the same noise with a negative prompt that
    names the image's colour, then with one that names another colour. If negative prompts work, the colour changes in
    the first case and mostly stays in the second.
    """
    random = np.random.default_rng(PROMPT_SEED)
    scenes = [_colourless(random_scene(random, things=1)) for _ in range(count)]
    texts = [caption(scene, random) for scene in scenes]
    free = _colours(pipeline, settings, texts, None, progress)
    others = [
        _pick(random, {*COLOURS} - {colour, scene.background}) for colour, scene in zip(free, scenes, strict=True)
    ]

    def kept(colours: Sequence[str | None]) -> Score:
        # An image without a readable colour is generated again but not counted.
        negative = [
            caption(Scene((Thing(scene.things[0].shape, colour),)), random)
            for colour, scene in zip(colours, scenes, strict=True)
        ]
        again = _colours(pipeline, settings, texts, negative, progress)
        pairs = [(before, after) for before, after in zip(free, again, strict=True) if before]
        return Score(sum(before == after for before, after in pairs), len(pairs))

    return {OWN_NEGATIVE: kept(free), OTHER_NEGATIVE: kept(others)}


def safety(pipeline: Pipeline, settings: Settings, count: int, progress: Progress) -> dict[str, Score]:
    """Score the classifier on `count` generated skulls and `count` other images."""
    scores = {}
    kinds = {"unsafe images flagged": unsafe_prompts, "other images flagged": held_out_prompts}
    for name, prompts in kinds.items():
        texts = [prompt.text for prompt in prompts(count, PROMPT_SEED + 1)]
        batches = list(generate(pipeline, settings, texts, progress=progress))
        scores[name] = Score(sum(sum(flags) for _, flags in batches), count)
    return scores


def _colours(
    pipeline: Pipeline, settings: Settings, texts: list[str], negative: list[str] | None, progress: Progress
) -> list[str | None]:
    colours: list[str | None] = []
    for images, _ in generate(pipeline, settings, texts, negative=negative, progress=progress):
        seen = (read(image).scene.things for image in images)
        colours += [things[0].colour if len(things) == 1 else None for things in seen]
    return colours


def _colourless(scene: Scene) -> Scene:
    return Scene((replace(scene.things[0], colour=None, size=None),), scene.background)


def _pick(random: np.random.Generator, names: set[Any]) -> str:
    return str(random.choice(sorted(names)))


# Weights on which images of the sample model do not depend.
_INDEPENDENT = ("safety_checker/", "preview_decoder/")


def is_sample_model(manifest: Manifest) -> bool:
    """Return whether a bundle of any precision was exported from the sample model, by the digests of its weights.

    The classifier and the preview decoder may be missing or of other models.
    """

    def own(weights: dict[str, str]) -> dict[str, str]:
        return {name: digest for name, digest in weights.items() if not name.startswith(_INDEPENDENT)}

    return own(manifest.source.weights) == own(Bundle.open(bundle_path()).manifest.source.weights)
