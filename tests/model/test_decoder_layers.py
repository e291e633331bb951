from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tsqp.checkpoint import open_checkpoint
from tsqp.model.decoder_layers import DecoderLayers

SHARED: Any = None  # what the other arguments of the layers would be


def embedded(hidden: torch.Tensor, *, rounded: bool) -> float:
    """A hidden state of one number, multiplied by the square root of 3,072."""
    config = replace(
        open_checkpoint("synthetic:tiny").config, embedding_multiplier=3072**0.5, rounded_multiplier=rounded
    )
    layers = DecoderLayers(config, SHARED, SHARED, SHARED, SHARED, SHARED)
    return float(layers.embedded(hidden))


def test_a_multiplier_may_be_one_of_the_compute_dtype() -> None:
    """55.43 is 55.5 in bfloat16, and 55.5 · (1 + 2⁻⁷) = 55.93 is 56, where 55.43 · (1 + 2⁻⁷) = 55.86 is 55.75."""
    one = 1 + 2**-7
    assert embedded(torch.tensor([one], dtype=torch.bfloat16), rounded=True) == 56
    assert embedded(torch.tensor([one], dtype=torch.bfloat16), rounded=False) == 55.75
    wide = torch.tensor([one])
    assert embedded(wide.clone(), rounded=True) == embedded(wide.clone(), rounded=False) == float(wide * 3072**0.5)
