"""Whole numbers of a few bits in int32 words."""

from __future__ import annotations

import torch

WORD = 32


def words_for(count: int, bits: int) -> int:
    """How many words hold ``count`` numbers without gaps."""
    return -(-count * bits // WORD)


def unpacked(words: torch.Tensor, bits: int, count: int, *, axis: int = 1) -> torch.Tensor:
    """``count`` numbers of each row: int32 (rows, words) → int32 (rows, count), each in [0, 2^bits).

    A row is one string of bits, lowest first: number k has the bits k·bits to k·bits + bits - 1, in two words where
    it does not fit into one. With ``axis`` 0 columns are packed, (words, columns) → (count, columns).
    """
    mask, along = (1 << bits) - 1, (-1,) + (1,) * (1 - axis)
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32).view(along)
        # The shift keeps a word's sign; the mask takes it away.
        return ((words.unsqueeze(axis + 1) >> shifts) & mask).flatten(axis, axis + 1).narrow(axis, 0, count)
    starts = torch.arange(count) * bits
    word, offset = starts // WORD, (starts % WORD).view(along)
    unsigned = words.long() & 0xFFFF_FFFF
    low = unsigned.index_select(axis, word) >> offset
    high = unsigned.index_select(axis, (word + 1).clamp_(max=words.shape[axis] - 1)) << (WORD - offset)
    return ((low | high) & mask).int()


def unpacked_part(words: torch.Tensor, bits: int, first: int, end: int) -> torch.Tensor:
    """Numbers ``first`` to ``end`` of each row, (rows, end - first); other words are hardly looked at."""
    start = first - first % WORD  # a number that begins a word, whatever the bits
    part = words[:, start * bits // WORD : words_for(end, bits)]
    return unpacked(part, bits, end - start)[:, first - start :]
