"""The same memory as numpy has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsqp.arith.bits import bits, keep_bits


@pytest.mark.parametrize(
    ("dtype", "seen"), [(torch.float32, np.float32), (torch.bfloat16, np.uint16), (torch.int32, np.int32)]
)
def test_it_is_the_memory_itself(dtype: torch.dtype, seen: type[np.generic]) -> None:
    for tensor in (torch.zeros(2, 3, dtype=dtype), keep_bits(torch.zeros(2, 3, dtype=dtype))):
        array = bits(tensor)
        assert array.dtype == seen
        assert array.shape == (2, 3)
        tensor[1, 2] = 1
        assert array[1, 2] != 0


def test_what_is_kept_is_at_hand_and_goes_with_its_tensor() -> None:
    tensor = keep_bits(torch.zeros(2, 3))
    assert bits(tensor) is bits(tensor)
    assert bits(tensor[0]) is not bits(tensor), "a view has a shape of its own"
    assert bits(tensor[0]).shape == (3,)
