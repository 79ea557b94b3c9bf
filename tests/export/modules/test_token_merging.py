"""Token merging, compared with a plain loop after the paper."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentrt.errors import CheckpointError, RequestError
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.precision import select_float32_nodes
from latentrt_export.graphs.trace import trace
from latentrt_export.modules.token_merging import TokenMatching, install, merge, unmerge
from latentrt_export.token_merging_ratio import MATCHING, check_ratio
from tests.export.modules.merged import Merged, noise
from tests.export.small_graph import small_graph
from tests.tiny import unet

Floats = NDArray[np.float32]

SIZES = [(8, 8), (9, 11), (8, 13), (5, 4)]


# The reference


def mates(tokens: Floats, size: tuple[int, int], ratio: str) -> dict[int, int]:
    """Return the destination of each merged token of a sample (N, C), by the token's index."""
    height, width = size
    directions = tokens.astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cells = [row * width + column for row in range(0, height - 1, 2) for column in range(0, width - 1, 2)]
    edges = []
    for source in sorted(set(range(len(tokens))) - set(cells)):
        likeness = [float(directions[source] @ directions[cell]) for cell in cells]
        edges.append((-max(likeness), source, cells[int(np.argmax(likeness))]))
    merged = int(len(tokens) * Fraction(ratio))
    return {source: cell for _, source, cell in sorted(edges)[:merged]}


def merge_by_loop(values: Floats, into: dict[int, int]) -> dict[int, Floats]:
    """Return the tokens [N, C] that remain, by index: each the mean of itself and the tokens merged into it."""
    groups: dict[int, list[Floats]] = {}
    for token, value in enumerate(values):
        groups.setdefault(into.get(token, token), []).append(value)
    return {token: np.asarray(np.mean(group, axis=0), np.float32) for token, group in groups.items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ratio", ["0.5", "0.29", "0.74"])
def test_tokens_are_merged_as_in_the_paper(size: tuple[int, int], ratio: str) -> None:
    tokens, values = noise(2, size[0] * size[1], 24), noise(2, size[0] * size[1], 5)
    matching = TokenMatching(float(ratio))(tokens, size)
    short = merge(values, matching)
    long = unmerge(short, matching)
    for sample in range(2):
        into = mates(tokens[sample].numpy(), size, ratio)
        expected = merge_by_loop(values[sample].numpy(), into)
        # Attention does not ask in which order its tokens stand; these are sorted by their first channel.
        found = sorted(short[sample].numpy().tolist())
        # 1e-6: means of a few float32 of about 1, summed in another order.
        np.testing.assert_allclose(found, sorted(value.tolist() for value in expected.values()), atol=1e-6)
        spread = np.stack([expected[into.get(token, token)] for token in range(len(values[sample]))])
        np.testing.assert_allclose(long[sample], spread, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "ratio", "left"),
    [((64, 64), 0.5, 2048), ((64, 64), 0.25, 3072), ((10, 10), 0.29, 71), ((9, 11), 0.5, 50), ((9, 11), 0.74, 26)],
)
def test_the_number_of_tokens_after_merging(size: tuple[int, int], ratio: float, left: int) -> None:
    tokens = noise(1, size[0] * size[1], 4)
    assert merge(tokens, TokenMatching(ratio)(tokens, size)).shape == (1, left, 4)


def test_many_tokens_of_one_kind_become_one() -> None:
    """Their sum alone would leave half's range; it is a mean, of which nothing is larger than they are."""
    tokens = torch.full((1, 4096, 4), 60000.0)
    matching = TokenMatching(0.5)(tokens, (64, 64))
    assert float(matching.shares.sum(dim=2).max()) < 1
    # 1e-4: two thousand float32, each with a share that was rounded.
    torch.testing.assert_close(merge(tokens, matching), tokens[:, :2048], rtol=1e-4, atol=0)


# In the denoiser


def inputs(height: int, width: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(height)
    return {
        "sample": rng.standard_normal((2, 4, height, width)).astype(np.float32),
        "timestep": np.array([981.0, 21.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32)).astype(np.float32),
    }


def output(model: Any, feeds: dict[str, NDArray[Any]]) -> Tensor:
    with torch.inference_mode():
        made: Tensor = model(*(torch.from_numpy(array) for array in feeds.values()), return_dict=False)[0]
    return made


def test_a_ratio_that_merges_no_token_changes_nothing() -> None:
    """Of 16 tokens; a graph of that size is refused, as it would compute empty tensors."""
    torch.manual_seed(0)
    model, feeds = unet("sd1"), inputs(4, 4)
    exact = output(model, feeds)
    install(model, 0.05)
    # Tokens stand in another order, so sums are taken in another order.
    torch.testing.assert_close(output(model, feeds), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_half_of_the_tokens_changes_something() -> None:
    torch.manual_seed(0)
    model, feeds = unet("sd1"), inputs(16, 24)
    exact = output(model, feeds)
    install(model, 0.5)
    assert 1e-3 < float((output(model, feeds) - exact).abs().max() / exact.abs().max()) < 1


def test_the_blocks_input_decides_the_matching_and_its_norm_is_merged() -> None:
    torch.manual_seed(0)
    model, size = unet("sd1"), (9, 11)
    transformer = model.down_blocks[0].attentions[0]
    block = transformer.transformer_blocks[0]
    tokens, text = noise(1, 99, 16), noise(1, 77, 32)
    with torch.inference_mode():
        normed = block.norm1(tokens)
        into = mates(tokens[0].numpy(), size, "0.5")
        left = merge_by_loop(normed[0].numpy(), into)
        attended = block.attn1(torch.from_numpy(np.stack([*left.values()]))[None])[0]
        places = {token: place for place, token in enumerate(left)}
        expected = tokens + attended[[places[into.get(token, token)] for token in range(99)]]
        expected = expected + block.attn2(block.norm2(expected), encoder_hidden_states=text)
        expected = expected + block.ff(block.norm3(expected))
        install(model, 0.5)
        transformer.proj_in.register_forward_hook(lambda *_: _as_feature_map(tokens, size))
        caught: list[Tensor] = []
        block.register_forward_hook(lambda module, given, made: caught.append(made))
        transformer(torch.zeros(1, 16, *size), encoder_hidden_states=text, return_dict=False)
    # 1e-5: as above, through a block.
    torch.testing.assert_close(caught[0], expected, rtol=0, atol=1e-5)


def _as_feature_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size)


def test_the_blocks_of_the_highest_resolution_merge() -> None:
    record = install(unet("sd1"), 0.5)
    assert record.ratio == 0.5
    assert record.blocks == (
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "up_blocks.2.attentions.0.transformer_blocks.0",
        "up_blocks.2.attentions.1.transformer_blocks.0",
    )


def test_merging_has_no_weights() -> None:
    model = unet("sd1")
    before = {name for name, _ in model.named_parameters()}
    install(model, 0.5)
    assert {name for name, _ in model.named_parameters()} == before


def test_where_the_latents_own_resolution_has_no_attention_the_next_one_merges() -> None:
    model = unet("sd1")
    for block in (model.down_blocks[0], model.up_blocks[-1]):
        del block.attentions
    assert install(model, 0.5).blocks == (
        "down_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    )


def test_a_denoiser_without_attention_is_refused() -> None:
    model = unet("sd1")
    for block in (*model.down_blocks, *model.up_blocks):
        if hasattr(block, "attentions"):
            del block.attentions
    with pytest.raises(CheckpointError, match=r"no attention in its down and up blocks.*omit --token-merging"):
        install(model, 0.5)


@pytest.mark.parametrize("ratio", [0, 0.049, -0.5, 0.75, 1, float("nan"), float("inf")])
def test_an_invalid_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match=r"expected at least 0\.05 and below 0\.75"):
        check_ratio(ratio)
    with pytest.raises(RequestError, match="got the token merging ratio"):
        install(unet("sd1"), ratio)


# As a graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "model.onnx"
    ir.save(trace(Merged(), {"x": noise(2, 8, 16, 24).numpy()}), path)
    return path


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (2, 8, 9, 11), (3, 8, 8, 13), (1, 8, 5, 4), (2, 8, 32, 32)], ids=str)
def test_both_of_a_cpus_backends_choose_as_torch_does(graph: Path, shape: tuple[int, ...]) -> None:
    feeds = {"x": noise(*shape).numpy()}
    model = openvino.Core().read_model(graph)
    model.reshape({"x": list(shape)})
    on_openvino = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)
    on_onnxruntime = Graph(graph).run(feeds)
    for name, expected in Merged().torch_outputs(feeds).items():
        # 1e-6: means of a few float32 of about 1. A token that went elsewhere is off by about 1.
        np.testing.assert_allclose(on_onnxruntime[name], expected, atol=1e-6)
        np.testing.assert_allclose(on_openvino[name], expected, atol=1e-6)


def test_nodes_of_the_matching_are_named(graph: Path) -> None:
    deciding = [node for node in ir.load(graph).graph if node.op_type in ("ArgMax", "TopK")]
    assert [str(node.name) for node in deciding] == [f"{MATCHING}/ArgMax", f"{MATCHING}/TopK"]


def test_the_matching_stays_float32() -> None:
    model = small_graph("g (float[2, 3] x) => (float[2, 3] z) { y = Neg(x) z = Neg(y) }")
    model.graph[0].name = f"down_blocks.0.attentions.0.transformer_blocks.0.{MATCHING}/Neg"
    assert select_float32_nodes(model, {}) == (model.graph[0].name,)
