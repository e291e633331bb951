"""Linear layers on a worker that sees their inputs."""

from __future__ import annotations

import torch

from tsqp.arith.bits import keep_bits
from tsqp.config.groups import GroupKey, LinearGroup, linear_groups
from tsqp.model.local import call_kind
from tsqp.model.pending import Joined, Pending
from tsqp.trusted.remote.session import PendingReply, WorkerSession
from tsqp.wire.messages import Linear
from tsqp.wire.payload import bytes_tensor
from tsqp.wire.slot import Shelf


class Desk:
    """Memory for one product after another of one shape: ``x`` (rows, in) is where the input is sent from."""

    def __init__(
        self, session: WorkerSession, dtype: torch.dtype, key: GroupKey, rows: int, group: LinearGroup
    ) -> None:
        self.key, self.rows = key, rows
        self.slot = session.slot(rows * group.in_features * dtype.itemsize, rows * group.out_features * dtype.itemsize)
        self.x = keep_bits(bytes_tensor(self.slot.tensor, dtype, (rows, group.in_features)))
        self._shape, self._dtype = (rows, group.out_features), dtype
        self._memory = memoryview(b"")
        self._y = self.x

    def product(self, memory: memoryview) -> torch.Tensor:
        """The reply as a tensor (rows, out), not copied; over shm it is the same one each time."""
        if memory is not self._memory:
            self._memory, self._y = memory, keep_bits(bytes_tensor(memory, self._dtype, self._shape))
        return self._y


class OpenProduct:
    """A product under way at a desk; see ``Pending``."""

    def __init__(self, shelf: Shelf[Desk], desk: Desk, reply: PendingReply[memoryview]) -> None:
        self._shelf, self._desk, self._reply = shelf, desk, reply
        self._done = False  # the product is there, and was not released

    def wait(self) -> torch.Tensor:
        product = self._desk.product(self._reply.wait())
        self._done = True
        return product

    def release(self) -> None:
        if self._done:
            self._done = False
            self._shelf.put_back(self._desk)


class OpenLinears:
    """Every product on the worker, which sees the activations in clear and is believed.

    ``split``: one call per matrix, all of a group in flight together, instead of one call per group.
    """

    def __init__(self, session: WorkerSession, *, split: bool) -> None:
        self._session = session
        self._groups = linear_groups(session.config)
        self._split = split
        self._desks = Shelf(self._new_desk)

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        group = self._groups[key[0]]
        if not self._session.plain or (self._split and len(group.parts) > 1):
            return self._session.input((rows, group.in_features))
        return self._desks.hand_out(key, rows).x

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        desk = self._desks.claim(key, x)
        if desk is not None:
            call = Linear(self._session.next_id(), *key, None, desk.rows)
            return OpenProduct(self._desks, desk, self._session.ask(call_kind(key), call, desk.slot))
        parts = len(self._groups[key[0]].parts)
        if not self._split or parts == 1:
            return self._call(key, None, x)
        return Joined([self._call(key, part, x) for part in range(parts)])

    def _new_desk(self, key: GroupKey, rows: int) -> Desk:
        return Desk(self._session, self._session.dtype, key, rows, self._groups[key[0]])

    def _call(self, key: GroupKey, part: int | None, x: torch.Tensor) -> Pending:
        name, layer = key
        rows = x.shape[0]
        first, end = self._groups[name].part_rows(part)
        call = Linear(self._session.next_id(), name, layer, part, rows)
        return self._session.start(call_kind(key), call, [x], (rows, end - first))
