"""Linear layers on a worker that cannot cheat, and that sees uniform noise: ``docs/masking.md`` §3 and §4.

Covers: a product that differs from x·Wqᵀ in any bit of any row raises before anything is made of it, and every later
call raises (tests/guard/test_hostile.py); in ``masked`` all that reaches the worker is x + r mod p
(tests/guard/test_view.py) and a call's shape (tests/guard/test_transcript.py). Does not cover: lengths, timing, model.
Assumes: this process's memory is private, ``os.urandom`` and AES.

What lies in memory of the line is written once and never read back, and read once into private memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.field import P
from tsqp.arith.rows import row_threads
from tsqp.errors import ChannelClosed, ChannelError, NumericError, PadReused, ProductMismatch, ReplyRangeError
from tsqp.spec.groups import GroupKey
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.pool import PadPool, Piece
from tsqp.trusted.guard.sources import Line, Waiting
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Product

Array = np.ndarray[Any, np.dtype[Any]]

_SPLIT = 1 << 17  # elements from which on a second thread is worth waking


@dataclass(frozen=True)
class Asked:
    """A product under way: R rows, their scales float32 (R,), and what the check is to find, uint32 (R, k)."""

    group: GuardedGroup
    reply: Waiting
    scales: Array
    expected: Array


class GuardedLinears:
    """What ``verified`` and ``masked`` share: every product is checked, and any failure ends everything."""

    digits: Literal[2, 4]

    def __init__(self, line: Line, groups: Mapping[GroupKey, GuardedGroup]) -> None:
        self.checks = 0  # products that were checked
        self._line = line
        self._groups = groups

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """Private memory for the input of one product, float32 (rows, in_features)."""
        return torch.empty(rows, self._groups[key].in_features)

    def close(self) -> None:
        """Overwrite what is secret. Nothing can be asked for any more."""
        for group in self._groups.values():
            group.forget()

    @property
    def soundness_bits(self) -> float:
        """A wrong product in a whole session goes unnoticed with probability 2 to minus this."""
        return len(next(iter(self._groups.values())).secrets) * math.log2(P)

    def _prepare(self, key: GroupKey, x: torch.Tensor, quantise: Callable[..., None], item: Any) -> Asked:
        """Quantise x (R, K) into memory of the line, by the kernel's arguments, and ask for the product."""
        group, rows = self._groups[key], len(x)
        payload = self._line.reserve(rows * group.in_features * item().itemsize)
        out = np.frombuffer(payload, item).reshape(rows, group.in_features)
        scales, expected = np.empty(rows, np.float32), np.empty((rows, len(group.folded)), np.uint32)
        verdicts = np.full(rows, kernels.UNSEEN, np.uint8)
        quantise(x.numpy(), np.float32(group.limit), group.folded, out, scales, expected, verdicts)
        self._judge(verdicts)
        call = Product(self._line.next_id(), *key, rows, self.digits)
        reply = self._line.ask(
            "linear" if key[1] is not None else "lm_head", call, payload, rows * group.out_features * 4
        )
        return Asked(group, reply, scales, expected)

    def _accept(self, asked: Asked, pieces: Sequence[tuple[int, int, Array | None]]) -> torch.Tensor:
        """The product, float32 (R, N), once every row of it has been checked.

        ``pieces``: first row, past-the-last row, and the products of their pads, uint32 (rows, N).
        """
        group, rows = asked.group, len(asked.scales)
        item, check = (np.int32, kernels.check) if self.digits == 2 else (np.uint32, kernels.check_and_unmask)
        reply = np.frombuffer(asked.reply.wait(), item).reshape(rows, group.out_features)
        out = torch.empty(rows, group.out_features)
        verdicts = np.full(rows, kernels.UNSEEN, np.uint8)

        def take(begin: int, stop: int) -> None:
            private = np.empty((BLOCK_ROWS, group.out_features), item)
            for first, end, pads in pieces[begin:stop]:
                own = slice(first, end)
                unchecked_y = private[: end - first]
                np.copyto(unchecked_y, reply[own])  # the one time that a reply is read: the worker can still change it
                check(
                    *(unchecked_y, group.secrets, asked.expected[own], asked.scales[own], group.scales, group.bias),
                    *(out.numpy()[own], verdicts[own], *(() if pads is None else (pads,)), 0, end - first),
                )

        row_threads().run(take, len(pieces), least=2)
        self._judge(verdicts)
        self.checks += 1
        return out

    def _judge(self, verdicts: Array) -> None:
        """Raise what the worst verdict means."""
        match int(verdicts.max()):
            case kernels.OK:
                return
            case kernels.NOT_FINITE:
                raise NumericError("the activations are not numbers: the weights are broken")
            case kernels.ERASED_PAD:
                raise PadReused("a pad was about to be used again")
            case kernels.OUT_OF_RANGE:
                raise ReplyRangeError("the worker's product has numbers out of range: it cheats, or it is broken")
            case _:  # UNSEEN included: a row without a verdict is not accepted either
                raise ProductMismatch("the worker's product is wrong: it cheats, or its machine is broken")

    def _fail(self, error: BaseException) -> NoReturn:
        """End the session, whatever it was: nothing is ever checked with the same vectors again."""
        self._line.fail(error if isinstance(error, ChannelError) else ChannelClosed("a product was given up"))
        self.close()
        raise error


class VerifiedLinears(GuardedLinears):
    """The worker sees the activations, as integers. Every product is checked."""

    digits = 2

    def start(self, key: GroupKey, x: torch.Tensor) -> VerifiedPending:
        """Ask for ``x Wᵀ + b``, x float32 (R, in_features). Raises NumericError, ChannelError."""

        def quantise(*arguments: Any) -> None:
            row_threads().run(kernels.quantise, len(x), *arguments, least=max(2, _SPLIT // x.shape[1]))

        return VerifiedPending(self, self._prepare(key, x, quantise, np.int16))

    def finish(self, asked: Asked) -> torch.Tensor:
        """The product, checked. Raises CheckFailed and any other ChannelError, which ends the session."""
        rows = len(asked.scales)
        try:
            return self._accept(
                asked, [(first, min(first + BLOCK_ROWS, rows), None) for first in range(0, rows, BLOCK_ROWS)]
            )
        except BaseException as error:
            self._fail(error)


@dataclass(frozen=True)
class VerifiedPending:
    linears: VerifiedLinears
    asked: Asked

    def wait(self) -> torch.Tensor:
        return self.linears.finish(self.asked)


class MaskedLinears(GuardedLinears):
    """The worker sees uniform noise. Every product is checked."""

    digits = 4

    def __init__(self, line: Line, groups: Mapping[GroupKey, GuardedGroup], pool: PadPool) -> None:
        super().__init__(line, groups)
        self.pool = pool

    def close(self) -> None:
        super().close()
        self.pool.close()

    def start(self, key: GroupKey, x: torch.Tensor) -> MaskedPending:
        """Ask for ``x Wᵀ + b``, x float32 (R, in_features).

        Raises PadsExhausted before anything is sent; PadReused, NumericError, ChannelError.
        """
        pieces = self.pool.take(key, len(x))

        def mask(values: Array, limit: Any, folded: Array, *rows: Array) -> None:
            def some(begin: int, stop: int) -> None:
                for piece in pieces[begin:stop]:
                    own, count = slice(piece.first, piece.end), piece.end - piece.first
                    pads = piece.block.pads(piece.at, count, values.shape[1])
                    kernels.mask(values[own], limit, folded, *(array[own] for array in rows), pads, 0, count)

            row_threads().run(some, len(pieces), least=2)

        try:
            return MaskedPending(self, self._prepare(key, x, mask, np.uint32), pieces)
        except BaseException:
            self._lose(pieces)
            raise

    def finish(self, asked: Asked, pieces: Sequence[Piece]) -> torch.Tensor:
        """The product, checked and unmasked. Raises CheckFailed and any other ChannelError, which ends the session."""
        try:
            self.pool.supply(asked.group.key, pieces)  # while the worker computes, where they are not there yet
            return self._accept(asked, [(p.first, p.end, p.block.products(p.at, p.end - p.first)) for p in pieces])
        except BaseException as error:
            self._lose(pieces)
            self._fail(error)

    def _lose(self, pieces: Sequence[Piece]) -> None:
        """After a failure pads are not used again, whether the worker has seen them or not."""
        for piece in pieces:
            piece.block.erase(piece.at, piece.end - piece.first)


@dataclass(frozen=True)
class MaskedPending:
    linears: MaskedLinears
    asked: Asked
    pieces: Sequence[Piece]

    def wait(self) -> torch.Tensor:
        return self.linears.finish(self.asked, self.pieces)
