"""One-time pads: keys that lead nowhere back, and rows that exist until they are used.

Covers: a key is used for one block and overwritten, a row is handed out once (test_pads.py); what was used
is overwritten with a value that is no number mod p, so that it cannot be used by mistake either (same file). A forked
process gets no rows (same file), and zeros in place of keys and pads, which are in no core dump: ``secret_memory``.
Does not cover: copies that libraries or the kernel made; a virtual machine that is cloned while it runs. Assumes:
``os.urandom``, AES-256.
"""

from __future__ import annotations

import os

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.field import Array
from tsqp.arith.secret_memory import secret_array, secret_bytes
from tsqp.errors import PadReused
from tsqp.trusted.guard.kernels import ERASED


class Ratchet:
    """A chain of block keys. No state leads back to an earlier one, or to a key that was made before it."""

    def __init__(self, root: bytes) -> None:
        self._state = secret_bytes(root)
        self.process, self.destroyed = os.getpid(), False

    def next_key(self) -> memoryview:
        """The key of one block: the first 32 bytes of the state's key stream are the next state, these the others."""
        self.refuse()
        stream = memoryview(bytearray(2 * KEY_BYTES))
        AesKeyStream(self._state).fill(stream)
        self._state[:], key = stream[:KEY_BYTES], secret_bytes(stream[KEY_BYTES:])
        wipe(stream)
        return key

    def refuse(self) -> None:
        """Raises PadReused when destroyed, and in a forked process: it has the same pads, and only one may use them."""
        if self.destroyed:
            raise PadReused("the pads of this session were destroyed")
        if os.getpid() != self.process:
            raise PadReused("one-time pads belong to the process that made them: open a new LLM after a fork")

    def destroy(self) -> None:
        """Overwrite the state: no more keys."""
        self.destroyed = True
        wipe(self._state)


class PadBlock:
    """16 rows of pads of one group, handed out in order. ``products`` are those rows times Wq, once they are there.

    Pads are uint32 (16, K), products uint32 (16, N); rows that were used are ``ERASED``. The key goes as soon as both
    are there: nothing but the rows is left of it then, and nothing of a row that was used.
    """

    def __init__(self, key: bytearray | memoryview) -> None:
        self._key, self._used = key, 0
        self._pads: Array | None = None
        self._products: Array | None = None

    @property
    def supplied(self) -> bool:
        """Whether the products are there."""
        return self._products is not None

    @property
    def left(self) -> int:
        """Rows that were not handed out."""
        return BLOCK_ROWS - self._used

    def claim(self, rows: int) -> int:
        """Hand out ``rows`` rows: the first of them. They belong to one call, whatever becomes of it."""
        if rows > self.left:
            raise PadReused("a row of pads was asked for twice")
        first = self._used
        self._used += rows
        return first

    def key(self) -> bytearray:
        """A copy of the key, to be wiped, as long as pads or products are to be made from it."""
        key = bytearray(self._key)  # looked at and used as one: another thread may be wiping it
        if not any(key):
            raise PadReused("the key of a block of pads was asked for again")
        return key

    def pads(self, first: int, rows: int, width: int, room: Array | None = None) -> Array:
        """Rows that were claimed, uint32 (rows, ``width``), to be used and erased. The first call expands the key.

        ``room``: secret memory, uint32 (16, ``width``), where all rows of the block are to lie from now on.
        """
        if self._pads is not None and room is not None:
            raise PadReused("the pads of a block were asked for again")
        if self._pads is None:
            pads, key = secret_array((BLOCK_ROWS, width)) if room is None else room, self.key()
            stream = AesKeyStream(key)
            wipe(key)  # before anything can fail: the stream does not need it any more
            expand(stream, pads)
            self._pads = pads
            self._wipe_key()
        return self._pads[first : first + rows]

    def products(self, first: int, rows: int) -> Array:
        """The products of rows that were claimed, uint32 (rows, N), to be used and erased."""
        if self._products is None:
            raise PadReused("the products of a block of pads were asked for before they were made")
        return self._products[first : first + rows]

    def supply(self, products: Array) -> None:
        """Take the products of all rows, (16, N), which have been checked."""
        self._products = products
        self._wipe_key()

    def erase(self, first: int, rows: int) -> None:
        """Overwrite rows that a call has claimed, and the key once all are."""
        for part in (self._pads, self._products):
            if part is not None:
                part[first : first + rows] = ERASED
        if not self.left:
            wipe(self._key)

    def destroy(self) -> None:
        """Overwrite everything, used or not."""
        self._used = BLOCK_ROWS
        self.erase(0, BLOCK_ROWS)

    def _wipe_key(self) -> None:
        if self._pads is not None and self._products is not None:
            wipe(self._key)


def wipe(secret: bytearray | memoryview) -> None:
    """Overwrite with zeros."""
    secret[:] = bytes(len(secret))
