"""Linear layers on a worker that cannot cheat, and that sees uniform noise: ``docs/masking.md`` §3 and §4.

Covers: a product that differs from x·Wqᵀ in any bit of any row raises before anything is made of it, and every later
call raises (test_hostile.py); in ``masked`` all that reaches the worker is x + r mod p
(test_view.py) and a call's shape (test_transcript.py). Does not cover: lengths, timing, model.
Assumes: this process's memory is private, ``os.urandom`` and AES.

Memory of the connection is written once and never read back; a reply is read once, into private memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.field import Array, Digits
from tsqp.arith.row_threads import row_threads
from tsqp.config.groups import GroupKey
from tsqp.errors import (
    ChannelClosed,
    ChannelError,
    NumericError,
    PadReused,
    PadsExhausted,
    ProductMismatch,
    ReplyRangeError,
)
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.pool import NoPads, PadPool, PadSlice
from tsqp.trusted.guard.sources import PendingBytes, WorkerConnection
from tsqp.trusted.guard.weights import Groups, GuardedGroup
from tsqp.wire.messages import Product


@dataclass(frozen=True, repr=False)
class PendingProduct:
    """A product under way: R rows in slices, their scales float32 (R,), what the check is to find, uint32 (R, k)."""

    linears: CheckedLinears
    group: GuardedGroup
    reply: PendingBytes
    scales: Array
    expected: Array
    slices: Sequence[PadSlice]

    def wait(self) -> torch.Tensor:
        """The product, checked. Raises CheckFailed and any other ChannelError, and ends the session with it."""
        return self.linears.finish(self)


class CheckedLinears:
    """What both private modes share: every product is checked, and any failure ends the session.

    ``digits`` and ``item``: how the worker gets activations; ``masked``: with pads added. ``pads``: where slices of a
    call's rows come from, with pads or without.
    """

    masked: bool
    digits: Digits
    item: type[np.generic]

    def __init__(self, connection: WorkerConnection, groups: Groups, pads: PadPool | NoPads) -> None:
        self.checks = 0  # products that were checked
        self._under_way = 0
        self._connection = connection
        self._groups = groups
        self._pads = pads

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """Private memory for the input of one product, float32 (rows, in_features)."""
        return torch.empty(rows, self._groups[key].in_features)

    def start(self, key: GroupKey, x: torch.Tensor) -> PendingProduct:
        """Ask for ``x Wᵀ + b``, x float32 (R, in_features).

        Raises PadsExhausted and NumericError before anything is sent; the session goes on after them unless other
        products were under way, which would be given up. Any other exception ends it.
        """
        # Raises what has ended the session.
        payload = self._connection.reserve(x.numel() * np.dtype(self.item).itemsize)
        slices: Sequence[PadSlice] = ()
        try:
            slices = self._pads.take(key, len(x))
            pending = self._ask(key, x.numpy(), slices, payload)
        except BaseException as error:
            if self._under_way or not isinstance(error, PadsExhausted | NumericError):
                self._end(error)
            _lose(slices)
            raise
        self._under_way += 1
        return pending

    def finish(self, pending: PendingProduct) -> torch.Tensor:
        """See ``PendingProduct.wait``."""
        self._under_way -= 1
        try:
            self._pads.supply(pending.group.key, pending.slices)  # while the worker computes
            return self._verify_and_unmask(pending)
        except BaseException as error:
            self._end(error)
            _lose(pending.slices)
            raise

    def close(self) -> None:
        """Overwrite what is secret. Nothing can be asked for any more."""
        self._connection.fail(ChannelClosed("the session was closed"))  # first: no reply may meet forgotten vectors
        for group in self._groups.values():
            group.forget()
        self._pads.close()

    def _end(self, error: BaseException) -> None:
        """End the session because of ``error``: nothing is ever checked with the same vectors again."""
        self._connection.fail(error if isinstance(error, ChannelError) else ChannelClosed("a product was given up"))
        self.close()

    def _ask(self, key: GroupKey, x: Array, slices: Sequence[PadSlice], payload: memoryview) -> PendingProduct:
        """Quantise and mask x, float32 (R, K), into ``payload``, memory of the connection; ask for the product."""
        group, rows = self._groups[key], len(x)
        out = np.frombuffer(payload, self.item).reshape(x.shape)
        scales, expected = np.empty(rows, np.float32), np.empty((rows, len(group.projections)), np.uint32)
        verdicts, limit = np.full(rows, kernels.UNSEEN, np.uint8), np.float32(group.limit)

        def mask(begin: int, stop: int) -> None:
            for rows_of in slices[begin:stop]:
                own, pads = slice(rows_of.first, rows_of.end), rows_of.pads(group)
                part = (out[own], scales[own], expected[own], verdicts[own])
                kernels.quantise_and_mask(x[own], limit, group.projections, self.masked, pads, *part, 0, rows_of.rows)

        row_threads().run(mask, len(slices), least=2)
        _judge(verdicts)
        kind: Literal["linear", "lm_head"] = "lm_head" if key[1] is None else "linear"
        call = Product(self._connection.next_id(), *key, rows, self.digits)
        reply = self._connection.ask(kind, call, payload, rows * group.out_features * 4)
        return PendingProduct(self, group, reply, scales, expected, slices)

    def _verify_and_unmask(self, pending: PendingProduct) -> torch.Tensor:
        """The product, float32 (R, N), once every row of it has been checked."""
        group, shape = pending.group, (len(pending.scales), pending.group.out_features)
        reply = np.frombuffer(pending.reply.wait(), np.uint32).reshape(shape)
        out = torch.empty(shape)
        verdicts = np.full(len(out), kernels.UNSEEN, np.uint8)

        def unmask(begin: int, stop: int) -> None:
            private = np.empty((BLOCK_ROWS, group.out_features), np.uint32)
            for rows_of in pending.slices[begin:stop]:
                own = slice(rows_of.first, rows_of.end)
                unchecked_y = private[: rows_of.rows]
                np.copyto(unchecked_y, reply[own])  # the one time that a reply is read: the worker can still change it
                check = (group.check_vectors, pending.expected[own], self.masked, rows_of.products())
                part = (pending.scales[own], group.scales, group.bias, out.numpy()[own], verdicts[own])
                kernels.verify_and_unmask(unchecked_y, *check, *part, 0, rows_of.rows)

        row_threads().run(unmask, len(pending.slices), least=2)
        _judge(verdicts)
        self.checks += 1
        return out


class VerifiedLinears(CheckedLinears):
    """The worker sees the activations, as integers. Every product is checked."""

    masked, digits, item = False, 2, np.int16

    def __init__(self, connection: WorkerConnection, groups: Groups) -> None:
        super().__init__(connection, groups, NoPads())


class MaskedLinears(CheckedLinears):
    """The worker sees uniform noise: every row it gets has a pad of ``pool`` added. Every product is checked."""

    masked, digits, item = True, 4, np.uint32

    def __init__(self, connection: WorkerConnection, groups: Groups, pool: PadPool) -> None:
        super().__init__(connection, groups, pool)
        self.pool = pool


def _judge(verdicts: Array) -> None:
    """Raise what the worst verdict means. A row without a verdict is not accepted either."""
    match int(verdicts.max()):
        case kernels.OK:
            return
        case kernels.NOT_FINITE:
            raise NumericError("the activations are not numbers: the weights are broken")
        case kernels.ERASED_PAD:
            raise PadReused("a pad was about to be used again")
        case kernels.OUT_OF_RANGE:
            raise ReplyRangeError("the worker's product has numbers out of range: it cheats, or it is broken")
        case _:
            raise ProductMismatch("the worker's product is wrong: it cheats, or its machine is broken")


def _lose(slices: Sequence[PadSlice]) -> None:
    """After a failure pads are not used again, whether the worker has seen them or not."""
    for one in slices:
        if one.block is not None:
            one.block.erase(one.at, one.rows)
