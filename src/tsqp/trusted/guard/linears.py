"""Linear layers on a worker that cannot cheat, and that sees uniform noise: ``docs/masking.md`` §3 and §4.

Covers: a product that differs from x·Wqᵀ in any bit of any row raises before anything is made of it, and every later
call raises (test_hostile.py); in ``masked`` all that reaches the worker is x + r mod p
(test_view.py) and a call's shape (test_transcript.py). Does not cover: lengths, timing, model.
Assumes: this process's memory is private, ``os.urandom`` and AES.

What lies in memory of the line is written once and never read back, and read once into private memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tsqp.trusted.guard.pool import PadPool, Piece
from tsqp.trusted.guard.sources import Line, Waiting
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Product


@dataclass(frozen=True, repr=False)
class Asked:
    """A product under way: R rows in pieces, their scales float32 (R,), what the check is to find, uint32 (R, k)."""

    linears: VerifiedLinears
    group: GuardedGroup
    reply: Waiting
    scales: Array
    expected: Array
    pieces: Sequence[Piece]

    def wait(self) -> torch.Tensor:
        """The product, checked. Raises CheckFailed and any other ChannelError, and ends the session with it."""
        return self.linears.finish(self)


class VerifiedLinears:
    """The worker sees the activations, as integers. Every product is checked, and any failure ends the session."""

    masked = False
    digits: Digits = 2
    item: type[np.generic] = np.int16

    def __init__(self, line: Line, groups: Mapping[GroupKey, GuardedGroup]) -> None:
        self.checks = 0  # products that were checked
        self._under_way = 0
        self._line = line
        self._groups = groups

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """Private memory for the input of one product, float32 (rows, in_features)."""
        return torch.empty(rows, self._groups[key].in_features)

    def start(self, key: GroupKey, x: torch.Tensor) -> Asked:
        """Ask for ``x Wᵀ + b``, x float32 (R, in_features).

        Raises PadsExhausted and NumericError before anything is sent; the session goes on after them unless other
        products were under way, which would be given up. Any other exception ends it.
        """
        payload = self._line.reserve(x.numel() * np.dtype(self.item).itemsize)  # raises what has ended the session
        pieces: Sequence[Piece] = ()
        try:
            pieces = self._pieces(key, len(x))
            asked = self._send(key, x.numpy(), pieces, payload)
        except BaseException as error:
            if self._under_way or not isinstance(error, PadsExhausted | NumericError):
                self._end(error)
            _lose(pieces)
            raise
        self._under_way += 1
        return asked

    def finish(self, asked: Asked) -> torch.Tensor:
        """See ``Asked.wait``."""
        self._under_way -= 1
        try:
            self._supply(asked)
            return self._accept(asked)
        except BaseException as error:
            self._end(error)
            _lose(asked.pieces)
            raise

    def close(self) -> None:
        """Overwrite what is secret. Nothing can be asked for any more."""
        self._line.fail(ChannelClosed("the session was closed"))  # first: no reply may meet vectors of zeros
        for group in self._groups.values():
            group.forget()

    def _end(self, error: BaseException) -> None:
        """End the session because of ``error``: nothing is ever checked with the same vectors again."""
        self._line.fail(error if isinstance(error, ChannelError) else ChannelClosed("a product was given up"))
        self.close()

    def _pieces(self, key: GroupKey, rows: int) -> list[Piece]:
        """The rows of a call in pieces, as long as blocks of pads, which they come with if they are to be masked."""
        return [Piece(None, 0, first, min(first + BLOCK_ROWS, rows)) for first in range(0, rows, BLOCK_ROWS)]

    def _supply(self, asked: Asked) -> None:
        """Make what is missing, while the worker computes."""

    def _send(self, key: GroupKey, x: Array, pieces: Sequence[Piece], payload: memoryview) -> Asked:
        """Quantise and mask x, float32 (R, K), into ``payload``, memory of the line, and ask for the product."""
        group, rows = self._groups[key], len(x)
        out = np.frombuffer(payload, self.item).reshape(x.shape)
        scales, expected = np.empty(rows, np.float32), np.empty((rows, len(group.folded)), np.uint32)
        verdicts, limit = np.full(rows, kernels.UNSEEN, np.uint8), np.float32(group.limit)

        def send(begin: int, stop: int) -> None:
            for piece in pieces[begin:stop]:
                own = slice(piece.first, piece.end)
                part = (out[own], scales[own], expected[own], verdicts[own])
                kernels.send(x[own], limit, group.folded, self.masked, piece.pads(group), *part, 0, piece.rows)

        row_threads().run(send, len(pieces), least=2)
        _judge(verdicts)
        kind: Literal["linear", "lm_head"] = "lm_head" if key[1] is None else "linear"
        call = Product(self._line.next_id(), *key, rows, self.digits)
        reply = self._line.ask(kind, call, payload, rows * group.out_features * 4)
        return Asked(self, group, reply, scales, expected, pieces)

    def _accept(self, asked: Asked) -> torch.Tensor:
        """The product, float32 (R, N), once every row of it has been checked."""
        group, shape = asked.group, (len(asked.scales), asked.group.out_features)
        reply = np.frombuffer(asked.reply.wait(), np.uint32).reshape(shape)
        out = torch.empty(shape)
        verdicts = np.full(len(out), kernels.UNSEEN, np.uint8)

        def accept(begin: int, stop: int) -> None:
            private = np.empty((BLOCK_ROWS, group.out_features), np.uint32)
            for piece in asked.pieces[begin:stop]:
                own = slice(piece.first, piece.end)
                unchecked_y = private[: piece.rows]
                np.copyto(unchecked_y, reply[own])  # the one time that a reply is read: the worker can still change it
                check = (group.secrets, asked.expected[own], self.masked, piece.products())
                part = (asked.scales[own], group.scales, group.bias, out.numpy()[own], verdicts[own])
                kernels.accept(unchecked_y, *check, *part, 0, piece.rows)

        row_threads().run(accept, len(asked.pieces), least=2)
        _judge(verdicts)
        self.checks += 1
        return out


class MaskedLinears(VerifiedLinears):
    """The worker sees uniform noise: every row it gets has a pad of ``pool`` added. Every product is checked."""

    masked = True
    digits = 4
    item = np.uint32

    def __init__(self, line: Line, groups: Mapping[GroupKey, GuardedGroup], pool: PadPool) -> None:
        super().__init__(line, groups)
        self.pool = pool

    def close(self) -> None:
        super().close()
        self.pool.close()

    def _pieces(self, key: GroupKey, rows: int) -> list[Piece]:
        return self.pool.take(key, rows)

    def _supply(self, asked: Asked) -> None:
        self.pool.supply(asked.group.key, asked.pieces)


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


def _lose(pieces: Sequence[Piece]) -> None:
    """After a failure pads are not used again, whether the worker has seen them or not."""
    for piece in pieces:
        if piece.block is not None:
            piece.block.erase(piece.at, piece.rows)
