"""Linear layers on a worker that cannot cheat, and that sees uniform noise: ``docs/masking.md`` §3 and §4.

Covers: a product that differs from x·Wqᵀ in any bit of any row raises before anything is made of it, and every later
call raises (test_hostile.py); in ``masked`` all that reaches the worker is x + r mod p
(test_view.py) and a call's shape (test_transcript.py). Does not cover: lengths, timing, model.
Assumes: this process's memory is private, ``os.urandom`` and AES.

Memory of the connection is written once and never read back; a reply is read once, into private memory. Memory of few
rows is used again, by one product at a time, once the decoder has released the last one (test_desks.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tsqp.arith.bits import bits, keep_bits
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.field import Array, Digits
from tsqp.arith.large_memory import large_memory
from tsqp.arith.row_threads import least_rows, row_threads
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
from tsqp.trusted.guard.pool import NoPads, PadPool, PadSlice, pads_together, together
from tsqp.trusted.guard.sources import PendingBytes, WorkerConnection
from tsqp.trusted.guard.weights import Groups, GuardedGroup
from tsqp.wire.messages import Product
from tsqp.wire.slot import Shelf

Item = type[np.generic]  # of what the worker is sent


class Desk:
    """Memory for one product at a time of R rows: x and y, float32 (R, K) and (R, N), and what is between them.

    ``sent`` (R, K) is memory of the connection, all else is private: ``scales`` float32 (R,), what the check is to find
    uint32 (R, ``checks``), a copy of at most a block of the reply.
    """

    def __init__(self, line: WorkerConnection, group: GuardedGroup, rows: int, item: Item, checks: int) -> None:
        self.key, self.rows, inner, outer = group.key, rows, group.in_features, group.out_features
        self.slot = line.slot(rows * inner * np.dtype(item).itemsize, rows * outer * 4)
        self.sent = np.frombuffer(self.slot.tensor, item).reshape(rows, inner)
        self.scales, self.verdicts = np.empty(rows, np.float32), np.empty(rows, np.uint8)
        shapes = (rows, checks), (min(rows, BLOCK_ROWS), outer)
        self.expected, self.unchecked_y = (np.empty(shape, np.uint32) for shape in shapes)
        self.x, self.y = (keep_bits(large_memory().floats(rows, width)) for width in (inner, outer))


@dataclass(repr=False)
class PendingProduct:
    """A product under way at a desk, its rows in slices."""

    linears: CheckedLinears
    group: GuardedGroup
    reply: PendingBytes
    desk: Desk
    slices: Sequence[PadSlice]
    done: bool = False  # the product is there, and was not released

    def wait(self) -> torch.Tensor:
        """The product, checked. Raises CheckFailed and any other ChannelError, and ends the session with it."""
        return self.linears.finish(self)

    def release(self) -> None:
        """Say that nobody will look at the product, or at its input, again. Does nothing before, or a second time."""
        if self.done:
            self.done = False
            self.linears.desks.put_back(self.desk)


class CheckedLinears:
    """What both private modes share: every product is checked, and any failure ends the session.

    ``digits`` and ``item``: how the worker gets activations; ``masked``: with pads added. ``pads``: where slices of a
    call's rows come from, with pads or without. ``under_way``: products that were asked for and not waited for.
    """

    masked: bool
    digits: Digits
    item: Item

    def __init__(self, connection: WorkerConnection, groups: Groups, pads: PadPool | None = None) -> None:
        self.products_checked, self.under_way, self._process = 0, 0, os.getpid()
        # Of any layer: they share desks, and may have other slices. What the shelf calls holds nothing that holds it.
        checks, item = max(len(group.projections) for group in groups.values()), self.item
        self.desks = Shelf(lambda key, rows: Desk(connection, groups[key], rows, item, checks))
        self._connection = connection
        self.groups = groups
        self.pads = pads or NoPads()

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """Private memory for the input of one product, float32 (rows, in_features). Raises what ended the session."""
        return self.desks.hand_out(key, rows).x

    def start(self, key: GroupKey, x: torch.Tensor) -> PendingProduct:
        """Ask for ``x Wᵀ + b``, x float32 (R, in_features).

        Raises PadsExhausted and NumericError before anything is sent; the session goes on after them unless other
        products were under way, which would be given up. Any other exception ends it.
        """
        desk = self.desks.claim(key, x) or self.desks.fresh(key, len(x))
        slices: Sequence[PadSlice] = ()
        try:
            slices = self.pads.take(key, len(x))
            return self._ask(key, bits(x), slices, desk)
        except BaseException as error:
            if self.under_way or not isinstance(error, PadsExhausted | NumericError):
                self.end(error)
            lose(slices)
            raise

    def finish(self, pending: PendingProduct) -> torch.Tensor:
        """See ``PendingProduct.wait``."""
        self.under_way -= 1
        try:
            self.pads.supply(pending.group.key, pending.slices)  # while the worker computes
            return self._verify_and_unmask(pending)
        except BaseException as error:
            self.end(error)
            lose(pending.slices)
            raise

    def close(self) -> None:
        """Overwrite what is secret. Nothing can be asked for any more."""
        self._connection.fail(ChannelClosed("the session was closed"))  # first: no reply may meet forgotten vectors
        self.desks.clear()  # whoever has no desk yet must ask the connection, which says how it ended
        for group in self.groups.values():
            group.forget()
        self.pads.close()

    def end(self, error: BaseException) -> None:
        """End the session because of ``error``: nothing is ever checked with the same vectors again."""
        self._connection.fail(error if isinstance(error, ChannelError) else ChannelClosed("a product was given up"))
        self.close()

    def _ask(self, key: GroupKey, x: Array, slices: Sequence[PadSlice], desk: Desk) -> PendingProduct:
        """Quantise and mask x, float32 (R, K), into memory of the connection; ask for the product."""
        group, to = self.groups[key], (desk.sent, desk.scales, desk.expected, desk.verdicts)
        how = np.float32(group.limit), group.projections, self.masked

        def mask(begin: int, stop: int) -> None:
            for part in together(slices[begin:stop], least_rows(group.in_features)):
                pads = pads_together(part, group.in_features)
                kernels.quantise_and_mask(x, *how, pads, *to, part[0].first, part[-1].first + part[-1].rows)

        self._judge(mask, slices, desk.verdicts, group.in_features)
        call = Product(self._connection.next_id(), *key, len(x), self.digits)
        reply = self._connection.ask("lm_head" if key[1] is None else "linear", call, desk.slot)
        self.under_way += 1
        return PendingProduct(self, group, reply, desk, slices)

    def _verify_and_unmask(self, pending: PendingProduct) -> torch.Tensor:
        """The product, float32 (R, N), once every row of it has been checked."""
        group, desk, y = pending.group, pending.desk, bits(pending.desk.y)
        reply = np.frombuffer(pending.reply.wait(), np.uint32).reshape(y.shape)
        check = group.check_vectors, desk.expected, group.bounds, self.masked
        to = (desk.scales, group.scales, group.bias), y, desk.verdicts

        def unmask(begin: int, stop: int) -> None:
            private = np.empty_like(desk.unchecked_y) if begin else desk.unchecked_y  # one thread's each
            for one in pending.slices[begin:stop]:
                unchecked_y, end = private[: one.rows], one.first + one.rows
                np.copyto(unchecked_y, reply[one.first : end])  # the one time that it is read: it can still be changed
                kernels.verify_and_unmask(unchecked_y, *check, one.products(), *to, one.first, end)

        self._judge(unmask, pending.slices, desk.verdicts, group.out_features)
        self.products_checked, pending.done = self.products_checked + 1, True
        if desk.rows > BLOCK_ROWS:
            del desk.slot, desk.sent  # not used again: the connection may have its memory back at once
        return desk.y

    def _judge(self, work: Callable[[int, int], None], slices: Sequence[PadSlice], verdicts: Array, width: int) -> None:
        """Do the work on slices; raise what the worst verdict means. A row without one is not accepted either.

        Not in a forked process, which has zeros for secrets: any product would pass. Raises PadReused there.
        """
        if os.getpid() != self._process:
            raise PadReused("check vectors belong to the process that made them: open a new LLM after a fork")
        verdicts.fill(kernels.UNSEEN)  # there are those of another product
        row_threads().run(work, len(slices), least=least_rows(BLOCK_ROWS * width))
        refuse(verdicts)


class VerifiedLinears(CheckedLinears):
    """The worker sees the activations, as integers. Every product is checked."""

    masked, digits, item = False, 2, np.int16


class MaskedLinears(CheckedLinears):
    """The worker sees uniform noise: every row it gets has a pad of ``pads`` added. Every product is checked."""

    masked, digits, item = True, 4, np.uint32
    pads: PadPool  # without one every call would raise PadReused


def refuse(verdicts: Array) -> None:
    """Raise what the worst verdict means, if it is not OK. A wrong slice of a row is worse than all else."""
    row = int(verdicts.argmax())
    part, kind = divmod(int(verdicts[row]), kernels.KINDS)
    if kind == kernels.NOT_FINITE:
        raise NumericError("the activations are not numbers: the weights are broken")
    if kind == kernels.ERASED_PAD:
        raise PadReused("a pad was about to be used again")
    if kind == kernels.OUT_OF_RANGE:
        raise ReplyRangeError("the worker's product has numbers out of range: it cheats, or is broken", row, part)
    if kind != kernels.OK:
        raise ProductMismatch("the worker's product is wrong: it cheats, or its machine is broken", row, part)


def lose(slices: Sequence[PadSlice]) -> None:
    """After a failure pads are not used again, whether the worker has seen them or not."""
    for one in slices:
        if one.block is not None:
            one.block.erase(one.at, one.rows)
