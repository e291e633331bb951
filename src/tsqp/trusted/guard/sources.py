"""Who multiplies pads by the weights. Both answers are unchecked: the pool checks them like a worker's.

Covers: a dealer gets keys and the place they are for, nothing else (test_dealer.py). Does not cover: a
dealer in league with the worker. Assumes: nobody but the dealer reads the connection to it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES
from tsqp.arith.field import Array
from tsqp.errors import ChannelError
from tsqp.trusted.guard.pads import wipe
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Call, MultiplyPads
from tsqp.wire.slot import Slot


class PendingBytes(Protocol):
    """A call under way."""

    def wait(self) -> memoryview:
        """The bytes of its product, of the size asked for. **The other side may change them at any time.**"""


class WorkerConnection(Protocol):
    """A connection to one worker. After any error it is dead, and every call raises that error."""

    def next_id(self) -> int: ...

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """Memory for payloads: **the other side can read it while it is written, and change it.**"""

    def ask(self, kind: Literal["linear", "lm_head"], call: Call, slot: Slot) -> PendingBytes: ...

    def fail(self, error: ChannelError) -> None:
        """End the connection: every later call raises ``error``, or what has ended it before."""


class PadSource(Protocol):
    """Makes the products of pads."""

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        """Unchecked r·Wqᵀ mod p, uint32 (16·blocks, N), in private memory.

        ``keys``: one for each block; ``pads``: what they expand to, uint32 (16·blocks, K).
        """


class LocalPadSource:
    """This process multiplies."""

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        if group.weights is None:
            raise ValueError(f"the weights of {group.key} were left to a dealer")
        out = torch.empty(len(pads), group.out_features, dtype=torch.int32)
        group.weights.product(torch.from_numpy(pads.view(np.int32)), 4, out=out)
        return out.numpy().view(np.uint32)


class DealerPadSource:
    """A second worker multiplies, which gets keys and nothing else, and must not collude with the first."""

    def __init__(self, connection: WorkerConnection) -> None:
        self._connection, self._one_at_a_time = connection, threading.Lock()  # of the pool's thread and the run's

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        with self._one_at_a_time:
            slot = self._connection.slot(len(keys) * KEY_BYTES, len(keys) * BLOCK_ROWS * group.out_features * 4)
            try:
                for index, key in enumerate(keys):
                    slot.tensor[index * KEY_BYTES : (index + 1) * KEY_BYTES] = key
                call = MultiplyPads(self._connection.next_id(), *group.key, len(keys))
                reply = self._connection.ask("linear", call, slot).wait()
                return np.frombuffer(reply, np.uint32).reshape(len(keys) * BLOCK_ROWS, -1).copy()  # read once
            finally:
                wipe(slot.tensor)
