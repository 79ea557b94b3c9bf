from __future__ import annotations

import hashlib

import numpy as np

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.weights import map_weights
from latentrt_engines.array_digests import array_digests


def test_a_digest_is_of_the_bytes() -> None:
    ones = np.ones((3, 5), np.float16)
    expected = hashlib.blake2b(ones.tobytes(), digest_size=8).hexdigest()
    assert array_digests({"ones": ones}) == {"ones": expected}
    assert len(expected) == 16


def test_equal_arrays_have_equal_digests_and_others_do_not() -> None:
    array = np.arange(12, dtype=np.float32)
    one_bit = array.copy()
    one_bit.view(np.uint8)[47] ^= 1
    found = array_digests({"a": array, "b": array.copy(), "one bit": one_bit, "minus": -array})
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_arrays_of_any_rank() -> None:
    """A scalar, and one with nothing in it, are weights too."""
    found = array_digests({"scalar": np.array(2, np.float32), "empty": np.empty((0, 4), np.float32)})
    assert found["scalar"] == hashlib.blake2b(np.array(2, np.float32).tobytes(), digest_size=8).hexdigest()
    assert found["empty"] == hashlib.blake2b(digest_size=8).hexdigest()


def test_the_arrays_of_real_weights_differ(sample: Bundle) -> None:
    _, weights = sample.component_files("unet", "float16")
    arrays = map_weights(sample.path(weights))
    found = array_digests(arrays)
    assert list(found) == list(arrays)
    different = {array.tobytes() for array in arrays.values()}
    assert len(set(found.values())) == len(different)
