"""Workers that cheat: a real one, whose answer to one call is changed."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.conftest import fresh_address
from tests.trusted.guard.fakes import Array
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.field import FieldWeights
from tsqp.arith.modulus import P
from tsqp.checkpoint import open_checkpoint
from tsqp.trusted.decode_step import DecodeStep
from tsqp.trusted.remote.session import WorkerSession
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.exchange import UNANSWERED
from tsqp.wire.messages import Done, MultiplyPads, Product
from tsqp.wire.transport import listen

AnyProduct = Product | MultiplyPads
Attack = Callable[["HostileWorker", AnyProduct, Arrival], "Frames | None"]


class NotHereError(Exception):
    """An attack that this call gives no chance for: the worker stays honest until the next."""


class HostileWorker(Worker):
    """Honest, but for one answer: ``attack`` on product number ``at``, or the first after it that gives a chance."""

    def __init__(self, store: WeightStore, attack: Attack | None = None, at: int = 0) -> None:
        super().__init__(store)
        self.attacked: int | None = None  # the number of that product
        self.products = 0
        self.calls: list[AnyProduct] = []
        self.history: list[tuple[AnyProduct, bytes]] = []
        self._attack = attack
        self._at = at
        weights = store.prepare("field")
        assert isinstance(weights, FieldWorkerWeights)
        self.weights = weights

    def answer(self, arrival: Arrival) -> Frames | None:
        call = decode_to_worker(arrival.frames.control)
        if not isinstance(call, Product | MultiplyPads):
            return super().answer(arrival)
        number, self.products = self.products, self.products + 1
        self.calls.append(call)
        if self._attack is not None and self.attacked is None and number >= self._at:
            try:
                answer = self._attack(self, call, arrival)
            except NotHereError:
                pass
            else:
                self.attacked = number
                return answer
        answer = self.honest(arrival)
        self.history.append((call, bytes(answer.tensors[0])))
        return answer

    def honest(self, arrival: Arrival) -> Frames:
        answer = super().answer(arrival)
        assert answer is not None
        return answer


@cache
def store_of(model: str) -> WeightStore:
    """The field path of a model's weights, made once."""
    store = WeightStore(open_checkpoint(model), "float32", torch.device("cpu"))
    store.prepare("field")
    return store


@contextmanager
def serving(worker: Worker, transport: str = "mem") -> Iterator[str]:
    """A worker on a thread of this process: its address."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(listen(fresh_address(transport))))
        thread = threading.Thread(target=worker.serve, args=(listener,), daemon=True)
        thread.start()
        stack.callback(thread.join, 10)
        stack.callback(listener.interrupt)
        yield listener.address


@contextmanager
def serve(
    model: str | Path, attack: Attack | None = None, at: int = 0, transport: str = "mem"
) -> Iterator[tuple[HostileWorker, str]]:
    """A worker of the field path, and its address."""
    worker = HostileWorker(store_of(str(model)), attack, at)
    with serving(worker, transport) as address:
        yield worker, address


def rows_of(call: AnyProduct) -> int:
    return call.rows if isinstance(call, Product) else call.blocks * BLOCK_ROWS


def product_of(call: AnyProduct, answer: Frames) -> Array:
    """The product in an answer, uint32 (rows, N), to be changed in place."""
    return np.frombuffer(answer.tensors[0], np.uint32).reshape(rows_of(call), -1)


def edited(change: Callable[[Array], None]) -> Attack:
    """An attack that changes the right product in place."""

    def attack(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
        answer = worker.honest(arrival)
        change(product_of(call, answer))
        return answer

    return attack


def other_number(y: Array, row: int, column: int) -> None:
    """Another number, in range."""
    y[row, column] = 0 if y[row, column] else 1


def flip_low_bit(y: Array) -> None:
    """One bit of one number that stays in range."""
    column = int(np.flatnonzero(y[0] < P - 1)[0])
    y[0, column] ^= np.uint32(1)


def add_p(y: Array) -> None:
    """The same number mod p, in another form."""
    y[len(y) // 2, 1] += np.uint32(P)


def zeros(y: Array) -> None:
    y[:] = 0


def wrong_last_row(y: Array) -> None:
    other_number(y, -1, -1)


def _like(worker: HostileWorker, arrival: Arrival, call: AnyProduct) -> Frames:
    """The answer to ``arrival`` as if it had asked for ``call``."""
    frames = arrival.frames._replace(control=encode(call))
    return worker.honest(arrival._replace(frames=frames))


def other_layer(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """The product by the same group of another layer."""
    if call.layer is None:
        raise NotHereError
    return _like(worker, arrival, msgspec.structs.replace(call, layer=1 - call.layer))


def replayed(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """The last product of this shape once more, as the answer to this call."""
    shape = (call.group, rows_of(call))
    answer = worker.honest(arrival)
    past = [product for other, product in worker.history if (other.group, rows_of(other)) == shape]
    if not past:
        raise NotHereError
    answer.tensors[0].cast("B")[:] = past[-1]
    return answer


def old_id(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """The right product, as the answer to the call before."""
    return Frames(encode(Done(call.id - 1)), worker.honest(arrival).tensors)


def short(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """One number too few."""
    answer = worker.honest(arrival)
    return Frames(answer.control, (answer.tensors[0].cast("B")[:-4],))


def other_weights(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """The right product by weights with their rows in another order."""
    groups = {
        key: FieldWeights.of(group.wq.roll(1, 0).contiguous(), group.kernel)
        for key, group in worker.weights.groups.items()
    }
    product = FieldOperators(replace(worker.weights, groups=groups))(call, arrival.frames.tensors, arrival.reply)
    assert isinstance(product, memoryview)
    return Frames(encode(Done(call.id)), (product,))


def changed_input(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """Another x, written over the one that was sent, and the right product of that."""
    payload = np.frombuffer(arrival.frames.tensors[0], np.uint8)
    payload[0] ^= 1
    return worker.honest(arrival)


def overwritten_input(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
    """The right product; but x is noise by the time that it is there."""
    answer = worker.honest(arrival)
    payload = np.frombuffer(arrival.frames.tensors[0], np.uint8)
    payload[:] = np.frombuffer(np.random.default_rng(0).bytes(len(payload)), np.uint8)
    return answer


def stalled(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
    """No answer at all."""


DEADLINE_S = 60.0  # of sessions with such workers


def pass_the_deadline_once_stalled(monkeypatch: pytest.MonkeyPatch, worker: HostileWorker) -> None:
    """The deadline passes at once for an answer that is held back, and not for one that is late on a busy machine."""
    receive, settle = WorkerSession._receive, DecodeStep._settle

    def left_of(within_s: float) -> float:
        return within_s if worker.attacked is None else max(0.0, within_s - DEADLINE_S + 0.05)

    def received(session: WorkerSession, within_s: float) -> None:
        while worker.attacked is None and not session.channel.arrived(0.01):
            pass
        receive(session, left_of(within_s))

    def settled(step: DecodeStep, plan: Any, why: int, size: int) -> None:
        line = step._line.descriptor
        while why == UNANSWERED and worker.attacked is None and not select.select([line], [], [], 0.01)[0]:
            pass
        step._session.deadline_s = left_of(step._session.deadline_s)
        settle(step, plan, why, size)

    monkeypatch.setattr(WorkerSession, "_receive", received)
    monkeypatch.setattr(DecodeStep, "_settle", settled)
