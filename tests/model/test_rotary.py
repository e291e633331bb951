from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tsqp.checkpoint import open_checkpoint
from tsqp.config.model import RopeConfig
from tsqp.model.rotary import Rotary, inverse_frequencies

CONFIG = open_checkpoint("synthetic:tiny").config  # heads of 16
SHORT, LONG = tuple(1.0 + i / 8 for i in range(8)), tuple(2.0 + i for i in range(8))
LONGROPE = RopeConfig(
    10_000.0, "longrope", original_max_positions=20, attention_factor=1.5, short_factors=SHORT, long_factors=LONG
)
DYNAMIC = RopeConfig(10_000.0, "dynamic", factor=4.0, original_max_positions=20)


def tables(rope: RopeConfig, positions: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = Rotary(replace(CONFIG, rope=rope), torch.float32)
    cos, sin = rotary.tables(torch.tensor(positions), torch.tensor(lengths))
    return cos[0], sin[0]


def test_a_layer_without_rope_turns_nothing() -> None:
    cos, sin = tables(RopeConfig(10_000.0, "none"), [0, 7, 2000], [2001] * 3)
    assert (cos == 1).all()
    assert (sin == 0).all()


def test_the_numbers_that_are_not_rotated_stay_as_they_are() -> None:
    rope = RopeConfig(10_000.0, "yarn", factor=4.0, attention_factor=1.3, rotary_dim=12)
    cos, sin = tables(rope, [3], [4])
    kept = [6, 7, 14, 15]  # of pairs 6 and 7
    assert (cos[0, kept] == 1).all()
    assert (sin[0, kept] == 0).all()
    turned = [i for i in range(16) if i not in kept]
    torch.testing.assert_close(cos[0, turned] ** 2 + sin[0, turned] ** 2, torch.full((12,), 1.3**2))


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_each_row_has_the_tables_of_its_own_length(rope: RopeConfig) -> None:
    lengths = [20, 21, 30, 20]
    together = tables(rope, [5, 5, 6, 7], lengths)
    for row, (position, length) in enumerate(zip([5, 5, 6, 7], lengths, strict=True)):
        for whole, alone in zip(together, tables(rope, [position], [length]), strict=True):
            assert torch.equal(whole[row], alone[0])
    assert not torch.equal(together[0][0], together[0][1])


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_equal_table_lengths_are_equal_tables(rope: RopeConfig) -> None:
    by_number: dict[int, torch.Tensor] = {}
    for length in range(1, 40):
        inverse = inverse_frequencies(rope, 16, length)
        assert torch.equal(by_number.setdefault(rope.table_length(length), inverse), inverse)
    assert len(by_number) == (2 if rope is LONGROPE else 20)
