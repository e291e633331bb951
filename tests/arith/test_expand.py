"""Expansion of a key is to the bit what docs/masking.md §5 says, redraws included: two parties must agree on it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.modulus import P

KEY = bytes(range(KEY_BYTES))


def counter_words(key: bytes, count: int) -> list[int]:
    """The key stream as 32-bit words, made of single AES blocks of a counter: no CTR mode of a library."""
    blocks = b"".join(number.to_bytes(16, "big") for number in range(-(-count // 4)))
    stream = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(blocks)
    return list(struct.unpack(f"<{count}I", stream[: 4 * count]))


def elements_of(words: Iterator[int], n: int) -> list[int]:
    """The rule in words of Python."""
    bits = (word & 0x7FFFFFFF for word in words)
    elements = [next(bits) for _ in range(n)]
    return [element if element != P else next(word for word in bits if word != P) for element in elements]


def expanded(key: bytes, *shape: int) -> np.ndarray:
    out = np.empty(shape, np.uint32)
    expand(AesKeyStream(key), out)
    return out


def test_the_first_block_of_the_zero_key() -> None:
    # AES-256 of a block of zeros under a key of zeros: dc95c078 a2408989 ad48a214 92842087.
    words = (0x78C095DC, 0x898940A2, 0x14A248AD, 0x87208492)
    assert expanded(bytes(KEY_BYTES), 4).tolist() == [word & 0x7FFFFFFF for word in words]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 1000, 300_000])  # the last takes several pieces of zeros
def test_known_answer_from_single_blocks(n: int) -> None:
    assert expanded(KEY, n).tolist() == elements_of(iter(counter_words(KEY, n + 8)), n)


class MadeUpStream:
    """The words of a test, and how many were taken."""

    def __init__(self, words: list[int]) -> None:
        self._bytes = struct.pack(f"<{len(words)}I", *words)
        self.taken = 0

    def fill(self, place: memoryview) -> None:
        piece = self._bytes[4 * self.taken : 4 * self.taken + place.nbytes]
        assert len(piece) == place.nbytes, "more words were taken than the rule needs"
        place[:] = piece
        self.taken += place.nbytes // 4


STREAMS: dict[str, tuple[list[int], list[int]]] = {  # the words, and the elements they give
    "none is p": ([1, 2, 3], [1, 2, 3]),
    "top bits are cleared": ([0x80000001, 0xFFFFFFFE, 0x80000000], [1, P - 1, 0]),
    "p in the middle": ([1, P, 3, 70], [1, 70, 3]),
    "p with its top bit set": ([1, 0xFFFFFFFF, 3, 70], [1, 70, 3]),
    "p twice in a row": ([1, P, P, 4, 70, 71], [1, 70, 71, 4]),
    "p at the end": ([1, 2, P, 70], [1, 2, 70]),
    "p first and last": ([P, 2, P, 70, 71], [70, 2, 71]),
    "p drawn again": ([1, P, 3, P, 0xFFFFFFFF, 70], [1, 70, 3]),
    "p drawn again for the first of two": ([P, P, P, 70, P, 71], [70, 71]),
    "a redraw with its top bit set": ([P, 2, 0x80000046], [70, 2]),
    "all are p": ([P, P, P, 70, 71, 72], [70, 71, 72]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_p_is_redrawn_in_order(name: str) -> None:
    words, expected = STREAMS[name]
    stream = MadeUpStream(words)
    out = np.empty(len(expected), np.uint32)
    expand(stream, out)
    assert out.tolist() == expected == elements_of(iter(words), len(expected))
    assert stream.taken == len(words)


def test_elements_are_canonical_and_even() -> None:
    elements = expanded(KEY, 1_000_000)  # the key is fixed, so this either always passes or never
    assert int(elements.max()) < P
    assert abs(elements.mean() / P - 0.5) < 5 * 12**-0.5 * 1e-3
    counts = np.bincount(elements >> np.uint32(26), minlength=32)  # 32 classes of equal size
    chi_square = float(((counts - 31_250.0) ** 2 / 31_250.0).sum())
    assert chi_square < 80  # 31 degrees of freedom: beyond that once in 3·10⁵ keys
    for bit in range(31):
        assert abs(((elements >> np.uint32(bit)) & np.uint32(1)).mean() - 0.5) < 2.5e-3


def test_a_block_is_one_expansion_row_after_row() -> None:
    block = expanded(KEY, BLOCK_ROWS, 37)
    assert block.flatten().tolist() == expanded(KEY, BLOCK_ROWS * 37).tolist()
    assert not np.array_equal(block, expanded(KEY[::-1], BLOCK_ROWS, 37))


def test_a_stream_continues_where_it_ended() -> None:
    stream = AesKeyStream(KEY)
    pieces = [bytearray(size) for size in (1, 15, 17, 4)]
    for piece in pieces:
        stream.fill(memoryview(piece))
    assert b"".join(pieces) == struct.pack("<10I", *counter_words(KEY, 10))[:37]


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="key"):
        AesKeyStream(bytes(size))
