"""The safety graph against the torch checker behind transformers' own Pillow processor, in torch and in ONNX Runtime.

The weights are random; the measured errors come from the preprocessing and from float32, whatever the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt.bundle.gate_inputs import make_images
from latentrt.errors import CheckpointError
from latentrt_export.export_warning import ExportWarning
from latentrt_export.graphs.trace import OPSET, trace
from latentrt_export.modules import safety_checker
from latentrt_export.modules.safety_checker import SafetyChecker
from tests.clip_oracle import Pixels, generate_images, preprocess, write_processor
from tests.loaded import with_weights

pytestmark = [
    # torch.onnx walks torch's own pytree classes
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", params=[224, 56])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("checkpoint"), side=request.param)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A random classifier, its oracle, and the outputs of both for the same images."""

    folder: Path
    module: SafetyChecker
    graph: ir.Model
    session: onnxruntime.InferenceSession
    checker: StableDiffusionSafetyChecker
    images: list[Pixels]
    seen: list[Tensor]
    cosines: NDArray[np.float32]

    @classmethod
    def make(cls, folder: Path, *, side: int) -> Subject:
        write_classifier(folder, side=side)
        module = with_weights(SafetyChecker.load(folder, None))
        processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
        checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
        images = list(generate_images(100))
        seen = [preprocess(processor, image) for image in images]
        with torch.no_grad():
            cosines = np.concatenate([torch_cosines(checker, one) for one in seen])
            set_thresholds(cosines, checker, module)
        graph = trace(module, {"pixels": make_images(2, 320, 256)})
        return cls(
            folder=folder,
            module=module,
            graph=graph,
            session=session(ir.to_proto(graph)),
            checker=checker,
            images=images,
            seen=seen,
            cosines=cosines,
        )

    def torch_outputs(self, images: Pixels) -> list[NDArray[Any]]:
        with torch.no_grad():
            return [output.numpy() for output in self.module(torch.from_numpy(images))]

    def graph_outputs(self, images: Pixels) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self.session.run(None, {"pixels": images})
        return outputs


def write_classifier(folder: Path, *, side: int) -> None:
    """A small classifier under its checkpoint names, with the old or the new form of the processor's configuration."""
    torch.manual_seed(side)
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision |= {"image_size": side, "patch_size": side // 4, "projection_dim": 8, "initializer_factor": 2.0}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        nn.init.normal_(embeds)
    checker.save_pretrained(folder / "safety_checker")
    weights = folder / "safety_checker" / "model.safetensors"
    tensors = {published_name(name): value for name, value in load_file(weights).items()}
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # published files have it
    save_file(tensors, weights, metadata={"format": "pt"})
    sizes: dict[str, Any] = {"size": side, "crop_size": side}
    if side == 56:  # a shorter edge that is not the crop, so that offsets matter
        sizes = {"size": {"shortest_edge": 63}, "crop_size": {"height": side, "width": side}}
    sizes |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    write_processor(folder / "feature_extractor", sizes)


def published_name(name: str) -> str:
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


def torch_cosines(checker: StableDiffusionSafetyChecker, seen: Tensor) -> NDArray[np.float32]:
    """Special-care and concept cosines, side by side, as the checker's forward computes them."""
    embeds = checker.visual_projection(checker.vision_model(seen)[1])
    both = [cosine_distance(embeds, concepts) for concepts in (checker.special_care_embeds, checker.concept_embeds)]
    cosines: NDArray[np.float32] = torch.cat(both, dim=1).numpy()
    return cosines


def set_thresholds(cosines: NDArray[np.float32], *holders: nn.Module) -> None:
    """Set thresholds that a third of the images' special-care and a fifteenth of their concept cosines exceed."""
    special, concept = np.quantile(cosines[:, :3], 0.67, axis=0), np.quantile(cosines[:, 3:], 0.93, axis=0)
    for holder in holders:
        holder.get_parameter("special_care_embeds_weights").copy_(torch.from_numpy(special))
        holder.get_parameter("concept_embeds_weights").copy_(torch.from_numpy(concept))


def session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


def numpy_scores(cosines: NDArray[np.float32], thresholds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run the loop of diffusers' checker for one image: special-care scores, then concept scores."""
    adjustment, scores = 0.0, []
    for index, (cosine, threshold) in enumerate(zip(cosines, thresholds, strict=True)):
        scores.append(round(cosine - threshold.item() + adjustment, 3))
        if index < 3 and scores[-1] > 0:
            adjustment = 0.01
    return np.array(scores, dtype=np.float32)


def test_cosines_and_verdicts_are_the_torch_checkers(subject: Subject) -> None:
    thresholds = np.concatenate(
        [subject.checker.special_care_embeds_weights.detach(), subject.checker.concept_embeds_weights.detach()]
    )
    verdicts, raised = [], 0
    for outputs in (subject.torch_outputs, subject.graph_outputs):
        for image, seen, cosines in zip(subject.images, subject.seen, subject.cosines, strict=True):
            concept_scores, special_scores, flagged, *both = (one[0] for one in outputs(image[None]))
            found = np.concatenate(both[::-1])
            error = np.abs(found - cosines).max()
            assert error <= 1e-3
            scores = np.concatenate([special_scores, concept_scores])
            np.testing.assert_array_equal(scores, numpy_scores(found, thresholds))
            if distance_to_decision(cosines, thresholds) > error:
                assert bool(flagged) == torch_verdict(subject.checker, seen)
                verdicts.append(bool(flagged))
            raised += bool((special_scores > 0).any())
    assert 0.1 < np.mean(verdicts) < 0.9  # both verdicts are common, and few images were too close to call
    assert len(verdicts) > 0.9 * 2 * len(subject.images)
    assert raised > 0.1 * 2 * len(subject.images)


def distance_to_decision(cosines: NDArray[np.float32], thresholds: NDArray[np.float32]) -> float:
    """Return the distance of the closest margin, raised or not, from 0.0005: smaller ones round to 0."""
    margins = cosines - thresholds
    return float(min(np.abs(margins - 0.0005).min(), np.abs(margins + 0.01 - 0.0005).min()))


def torch_verdict(checker: StableDiffusionSafetyChecker, seen: Tensor) -> bool:
    _, flagged = checker(seen, np.zeros((1, 8, 8, 3)))
    return bool(flagged[0])


def test_a_batch_equals_its_images_one_by_one(subject: Subject) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 72, 104, 3), dtype=np.uint8)
    for outputs in (subject.torch_outputs, subject.graph_outputs):
        together = outputs(images)
        alone = [outputs(image[None]) for image in images]
        for spec, batch, singles in zip(subject.module.outputs, together, zip(*alone, strict=True), strict=True):
            assert (batch.dtype.name, batch.shape) == (spec.dtype, (3, *spec.shape[1:]))
            if spec.name.endswith("cosines"):  # float32 sums in another order; scores are these, rounded
                np.testing.assert_allclose(batch, np.concatenate(singles), atol=1e-5)


@torch.no_grad()
def test_the_special_care_adjustment_changes_a_verdict(subject: Subject) -> None:
    image, cosines = subject.images[20], subject.cosines[20]
    module = with_weights(SafetyChecker.load(subject.folder, None))
    # the second special-care concept triggers; the third and one concept pass with its 0.01, and not without
    module.special_care_embeds_weights.copy_(torch.from_numpy(cosines[:3]) + torch.tensor([0.005, -0.02, 0.005]))
    module.concept_embeds_weights.copy_(torch.from_numpy(cosines[3:]) + torch.tensor([0.005] + [0.5] * 16))
    raised = module(torch.from_numpy(image)[None])
    module.special_care_embeds_weights.add_(0.5)
    plain = module(torch.from_numpy(image)[None])
    step = 1.1e-3  # of the rounding, and the cosines' error
    np.testing.assert_allclose(raised[1][0], [-0.005, 0.02, 0.005], atol=step)
    assert (bool(raised[2]), bool(plain[2])) == (True, False)


class Scores(nn.Module):
    """The decision alone, on margins [batch, 3 + 17]."""

    def forward(self, margins: Tensor) -> Tensor:
        concept, special_care = safety_checker._compute_scores(margins[:, 3:], margins[:, :3])
        return torch.cat([special_care, concept], dim=1)


def test_scores_round_as_numpy_does() -> None:
    rng = np.random.default_rng(2)
    margins = rng.uniform(-0.03, 0.03, (2000, 20)).astype(np.float32)
    margins[1000:] = np.float32(0.0005) * rng.integers(-25, 26, (1000, 20))  # ties
    none = np.zeros(20, dtype=np.float32)
    expected = np.stack([numpy_scores(row, none) for row in margins])
    np.testing.assert_array_equal(Scores()(torch.from_numpy(margins)), expected)
    program = torch.onnx.export(
        Scores().eval(),
        (torch.from_numpy(margins[:2]),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=({0: "batch"},),
        input_names=["margins"],
    )
    assert program is not None
    np.testing.assert_array_equal(session(program.model_proto).run(None, {"margins": margins})[0], expected)


def test_half_weights_keep_preprocessing_and_cosines_in_float32(subject: Subject) -> None:
    half = with_weights(SafetyChecker.load(subject.folder, None)).half()
    pixels = torch.from_numpy(subject.images[20])[None]
    assert torch.equal(half.preprocessing(pixels), subject.module.preprocessing(pixels))
    with torch.no_grad():
        concept_scores, _, _, concept_cosines, _ = half(pixels)
    assert (concept_scores.dtype, concept_cosines.dtype) == (torch.float32, torch.float32)
    np.testing.assert_allclose(concept_cosines[0], subject.cosines[20, 3:], atol=1e-2)  # half has 11 bits


def test_the_graph_is_clean(subject: Subject) -> None:
    found = (
        (subject.session.get_inputs(), subject.module.inputs),
        (subject.session.get_outputs(), subject.module.outputs),
    )
    for arguments, specs in found:
        assert [(one.name, one.shape) for one in arguments] == [(spec.name, list(spec.shape)) for spec in specs]
    nodes = list(subject.graph.graph)
    assert not {"IsNaN", "Pow", "If", "Loop", "Resize"} & {node.op_type for node in nodes}
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    assert ir.DataType.DOUBLE not in {value.dtype for value in values}  # which TensorRT does not compute in
    assert {node.op_type for node, _ in subject.graph.graph.inputs[0].uses()} <= {"Cast", "Shape"}  # nor with uint8


def test_parameters_have_their_checkpoint_names(subject: Subject) -> None:
    published = set(load_file(subject.folder / "safety_checker" / "model.safetensors"))
    names = set(subject.module.weights())
    assert names == published - {"vision_model.vision_model.embeddings.position_ids"}
    assert {subject.module.canonical_name(name) for name in names} == names


def test_a_classifier_alone_in_its_folder(subject: Subject, tmp_path: Path) -> None:
    for file in (*(subject.folder / "safety_checker").iterdir(), *(subject.folder / "feature_extractor").iterdir()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    alone = with_weights(SafetyChecker.load(tmp_path, None))
    assert torch.equal(alone.concept_embeds, subject.module.concept_embeds)


def test_missing_weights_are_refused_and_unexpected_ones_ignored(tmp_path: Path) -> None:
    write_classifier(tmp_path, side=56)
    file = tmp_path / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "more": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.warns(ExportWarning, match="safety_checker: ignored 1 tensors.*the first is more"):
        SafetyChecker.load(tmp_path, None)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, the first is visual_projection\.weight"):
        SafetyChecker.load(tmp_path, None)


def test_no_weights_are_refused(tmp_path: Path) -> None:
    write_classifier(tmp_path, side=56)
    (tmp_path / "safety_checker" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; expected model\.safetensors"):
        SafetyChecker.load(tmp_path, None)


def test_a_crop_of_another_size_than_the_classifiers_is_refused(tmp_path: Path) -> None:
    write_classifier(tmp_path, side=56)
    write_processor(tmp_path / "feature_extractor", {"size": 64, "crop_size": 64})
    with pytest.raises(CheckpointError, match=r"crops to \(64, 64\), expected \(56, 56\)"):
        SafetyChecker.load(tmp_path, None)
