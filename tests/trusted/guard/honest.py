"""An honest worker in this process behind a WorkerConnection: exact products in int64, and a copy of all it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelError
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.linears import MaskedLinears, VerifiedLinears
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import LocalPadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Call, Product
from tsqp.wire.slot import Slot

Array = np.ndarray[Any, np.dtype[Any]]

KEY: GroupKey = ("qkv", 0)
OTHER: GroupKey = ("down", 0)


class HonestConnection:
    """``change`` may alter a reply, uint32 (R, N), in place before it is handed out. ``memory`` makes payloads."""

    def __init__(self, weights: Mapping[GroupKey, torch.Tensor]) -> None:
        self.sent: list[Array] = []  # uint32 or int16 (R, K), as the worker got it
        self.change: Callable[[Array], None] = lambda reply: None
        self.memory: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size))
        self.dead: ChannelError | None = None
        self._weights = {key: wq.numpy().astype(np.int64) for key, wq in weights.items()}
        self._id = 0

    def next_id(self) -> int:
        self._id += 1
        return self._id

    def slot(self, size: int, reply_bytes: int) -> Slot:
        self._raise_if_dead()
        return Slot(self.memory(size), reply_bytes)

    def ask(self, kind: str, call: Call, slot: Slot) -> HonestReply:
        self._raise_if_dead()
        if not isinstance(call, Product):
            raise AssertionError(f"the worker is asked for products, not for {call}")
        x = np.frombuffer(slot.tensor, np.uint32 if call.digits == 4 else np.int16).reshape(call.rows, -1).copy()
        self.sent.append(x)
        product = x.astype(np.int64) @ self._weights[call.group, call.layer].T % P  # below 2³¹·127·K: fits
        reply = product.astype(np.uint32)
        self.change(reply)
        if reply.nbytes != slot.reply_bytes:
            raise AssertionError(f"a product of {reply.nbytes} bytes was asked for as {slot.reply_bytes}")
        return HonestReply(self, reply)

    def fail(self, error: ChannelError) -> None:
        self.dead = self.dead or error

    def _raise_if_dead(self) -> None:
        if self.dead is not None:
            raise self.dead


class HonestReply:
    def __init__(self, line: HonestConnection, reply: Array) -> None:
        self.reply = reply
        self._line = line

    def wait(self) -> memoryview:
        self._line._raise_if_dead()
        return self.reply.data.cast("B")


def small_weights(columns: int = 48, rows: int = 40) -> dict[GroupKey, torch.Tensor]:
    """Wq int8 of two groups (rows, columns) and (columns, rows)."""
    generator = torch.Generator().manual_seed(5)
    shapes = {KEY: (rows, columns), OTHER: (columns, rows)}
    return {
        key: torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for key, shape in shapes.items()
    }


def guarded(weights: Mapping[GroupKey, torch.Tensor], *, checks: int = 2) -> dict[GroupKey, GuardedGroup]:
    """The groups as the guard holds them, with scales of 1 and no bias: a product is the integers times s_x."""
    return {
        key: GuardedGroup.of(key, Int8Weights(wq, torch.ones(len(wq)), None), BlockedKernel(), checks=checks)
        for key, wq in weights.items()
    }


def masked(weights: Mapping[GroupKey, torch.Tensor]) -> tuple[MaskedLinears, HonestConnection]:
    """Masked linear layers with a fresh pool, on an honest line."""
    line, groups = HonestConnection(weights), guarded(weights)
    return MaskedLinears(line, groups, PadPool(groups, LocalPadSource(), wait=True)), line


def verified(weights: Mapping[GroupKey, torch.Tensor]) -> tuple[VerifiedLinears, HonestConnection]:
    """The same without masks."""
    line = HonestConnection(weights)
    return VerifiedLinears(line, guarded(weights)), line


def activations(rows: int, columns: int = 48, seed: int = 1) -> torch.Tensor:
    """float32 (rows, columns)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def send(x: Array, limit: int, projections: Array, pads: Array | None, out: Array | None = None) -> tuple[Array, ...]:
    """All rows through the loop of that name: out, scales, expected and verdicts."""
    scales, expected = np.zeros(len(x), np.float32), np.zeros((len(x), len(projections)), np.uint32)
    verdicts = np.full(len(x), kernels.UNSEEN, np.uint8)
    if out is None:
        out = np.zeros(x.shape, np.int16 if pads is None else np.uint32)
    given = np.empty((len(x), 0), np.uint32) if pads is None else pads
    results = (out, scales, expected, verdicts)
    kernels.quantise_and_mask(x, np.float32(limit), projections, pads is not None, given, *results, 0, len(x))
    return results
