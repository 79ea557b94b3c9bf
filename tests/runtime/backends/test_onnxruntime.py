"""Graphs on ONNX Runtime: which graph is taken, what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from latentrt import Bundle
from latentrt.backends.onnxruntime import open_session
from latentrt.errors import BackendError, FeedError, MissingExtraError
from latentrt.session import run
from tests.exported import Exported


def test_a_half_bundle_computes_in_float32_on_a_cpu(sd2: Exported) -> None:
    bundle = Bundle.open(sd2.bundle)
    opened: list[str] = []
    read = bundle.read
    bundle.read = lambda name: opened.append(name) or read(name)  # type: ignore[method-assign, func-returns-value]
    session = open_session(bundle, "text_encoder", threads=1)
    assert opened == ["text_encoder/model.float32.onnx"]
    outputs = run(session, input_ids=np.zeros((2, 77), np.int64), clip_skip=np.zeros(2, np.int64))
    assert outputs["hidden_states"].dtype == np.float32
    assert outputs["hidden_states"].shape == (2, 77, 32)


def test_feeds_are_checked_before_the_graph_runs(sd1: Exported) -> None:
    session = open_session(Bundle.open(sd1.bundle), "vae_decoder", threads=1)
    with pytest.raises(FeedError, match="found float64, expected float32"):
        run(session, latents=np.zeros((1, 4, 8, 8)))


def test_what_the_backend_refuses_is_an_error_of_ours(sd1: Exported) -> None:
    session = open_session(Bundle.open(sd1.bundle), "text_encoder", threads=1)
    ids = np.full((1, 77), 10**9, np.int64)  # a token that the vocabulary does not have
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        run(session, input_ids=ids, clip_skip=np.zeros(1, np.int64))


def test_a_missing_backend_names_its_extra(sd1: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[cpu\]'"):
        open_session(Bundle.open(sd1.bundle), "unet")
