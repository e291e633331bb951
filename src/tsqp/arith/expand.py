"""From a 32-byte key to uniform elements of F_p, to the bit: ``docs/masking.md`` §5. For a pad's owner and a dealer.

The key stream is AES-256 in counter mode from counter 0, read as little-endian 32-bit words without their top bit. The
first n words are the elements; each that is p is replaced, in order, by the next word of the stream that is not p.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tsqp.arith.digits import clear_top_bits
from tsqp.arith.modulus import P

KEY_BYTES = 32
BLOCK_ROWS = 16  # rows of a pad block: they share a key, so they are expanded together

_ZEROS = memoryview(bytes(1 << 20))


class KeyStream(Protocol):
    """Bytes that continue where the last ones ended."""

    def fill(self, place: memoryview) -> None:
        """Overwrite ``place`` with the next bytes of the stream."""


class AesKeyStream:
    """AES-256-CTR under a key of 32 bytes, from an initial counter block of zeros."""

    def __init__(self, key: bytes | bytearray | memoryview) -> None:
        # Safe with a constant counter: every key is used for one stream only.
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, place: memoryview) -> None:
        for start in range(0, len(place), len(_ZEROS)):
            piece = place[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(piece)], piece)


def expand(stream: KeyStream, out: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
    """Fill ``out``, uint32 and contiguous, with elements of F_p."""
    words = out.reshape(-1)
    stream.fill(words.data.cast("B"))
    if clear_top_bits(words) == P:
        for index in np.flatnonzero(words == P):
            while words[index] == P:
                stream.fill(words[index : index + 1].data.cast("B"))
                clear_top_bits(words[index : index + 1])
