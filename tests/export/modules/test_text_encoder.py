"""The text encoders of Stable Diffusion XL beside those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt_export.modules.text_encoder import PenultimateTextEncoder, ProjectedTextEncoder
from tests.tiny_xl import POOLED_WIDTH, TEXT_WIDTH, TEXT_WIDTH_2, make_xl_checkpoint

LAYERS = (3, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_xl_checkpoint(tmp_path_factory.mktemp("xl"), text_layers=LAYERS)


def ids_of(folder: Path, count: int) -> torch.Tensor:
    """Return random ids framed as chunks are: the second ends early."""
    config = CLIPTextModel.config_class.from_pretrained(folder)
    ids = torch.randint(0, config.vocab_size - 2, (count, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
    ids[1, 9:] = config.eos_token_id
    return ids


def test_the_first_is_before_its_last_layer(checkpoint: Path) -> None:
    module = PenultimateTextEncoder.load(checkpoint, None)
    ids = ids_of(checkpoint / "text_encoder", 3)
    skips = np.array([0, 1, 2])
    found = module.torch_outputs({"input_ids": ids.numpy(), "clip_skip": skips})["hidden_states"]
    assert found.shape == (3, 77, TEXT_WIDTH)
    model = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    for row, skip in enumerate(skips):
        np.testing.assert_array_equal(found[row], states[-(skip + 2)][row].numpy())


def test_what_nothing_reads_is_left_out(checkpoint: Path) -> None:
    names = {*PenultimateTextEncoder.load(checkpoint, None).weights()}
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"0", "1"}
    assert not any("final_layer_norm" in name for name in names)
    second = ProjectedTextEncoder.load(checkpoint, None).weights()
    assert {*second} == {*CLIPTextModelWithProjection.from_pretrained(checkpoint / "text_encoder_2").state_dict()}


def test_the_second_has_a_projection(checkpoint: Path) -> None:
    module = ProjectedTextEncoder.load(checkpoint, None)
    ids = ids_of(checkpoint / "text_encoder_2", 4)
    skips = np.array([3, 0, 1, 2])
    found = module.torch_outputs({"input_ids": ids.numpy(), "clip_skip": skips})
    assert found["hidden_states"].shape == (4, 77, TEXT_WIDTH_2)
    assert found["pooled"].shape == (4, POOLED_WIDTH)
    model = CLIPTextModelWithProjection.from_pretrained(checkpoint / "text_encoder_2").eval()
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True)
    np.testing.assert_array_equal(found["pooled"], expected.text_embeds.numpy())
    for row, skip in enumerate(skips):
        np.testing.assert_array_equal(found["hidden_states"][row], expected.hidden_states[-(skip + 2)][row].numpy())
