"""Workers that cheat, lie, fall silent or die in a compiled decode step: one named error, and then nothing is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import MODES, Array, record_blocks, secrets_of
from tests.trusted.guard.hostile import AnyProduct, Attack, HostileWorker, NotHereError, edited
from tests.trusted.step_runs import CALLS, MODEL, RecordingWorker, Taken, beside, caches, opened, plain, same, stepped
from tests.wire.links import WAIT_S
from tsqp import LLM, WorkerConfig
from tsqp.api.config import ProtectionName
from tsqp.arith.modulus import P
from tsqp.errors import (
    ChannelClosed,
    ChannelError,
    DeadlineExceeded,
    NumericError,
    ProductMismatch,
    ProtocolError,
    ReplyRangeError,
    TsqpError,
    WorkerFailed,
    WorkerLost,
)
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.trusted import step_loops
from tsqp.trusted.decode_step import DecodeStep
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import Done, Failed, Product, StagedDone
from tsqp.wire.transport.shm.packets import PACKET_BYTES

LENGTHS = [9, 0, 30]
KINDS = {"qkv": 4, "o": 5, "gate_up": 6, "down": 7, "lm_head": 8}  # of the second layer
NUMBERS = {"first": 0, "in the middle": 4, "last": 8}


def assert_over(llm: LLM, error: BaseException, sequences: list[KVCache]) -> None:
    """Check vectors are gone, and every call raises what has ended the session."""
    assert llm.guard is not None
    for group in llm.guard.linears.groups.values():
        assert (group.projections == 1).all()
    calls: tuple[Callable[[], object], ...] = (
        lambda: stepped(llm, sequences),
        lambda: stepped(llm, caches(llm, [3])),
        lambda: llm.engine.run(Batch([[1, 2, 3]], [llm.engine.decoder.new_cache()])),
        lambda: stepped(llm, sequences),
    )
    for call in calls:
        with pytest.raises(ChannelError) as caught:
            call()
        assert caught.value is error


def fails(llm: LLM, worker: RecordingWorker, expected: type[ChannelError], *, asked: int) -> ChannelError:
    """A step of three rows raises ``expected`` and shows nothing; the worker was asked for so many products."""
    sequences = caches(llm, LENGTHS)
    before = held(llm, sequences)
    with pytest.raises(expected) as caught:
        stepped(llm, sequences)
    assert type(caught.value) is expected
    assert [cache.length for cache in sequences] == LENGTHS
    assert same(held(llm, sequences), before)
    assert worker.products == asked
    assert_over(llm, caught.value, sequences)
    assert worker.products == asked
    return caught.value


def held(llm: LLM, sequences: list[KVCache]) -> list[torch.Tensor]:
    return [cache.view(0, 0, cache.length)[0].clone() for cache in sequences]


@contextmanager
def a_run(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Any]:
    """A session; at its end no pad of it is left, and all of its steps were compiled ones."""
    blocks = record_blocks(monkeypatch)
    with opened(mode, **options) as (llm, worker):
        taken = Taken(monkeypatch)
        yield llm, worker
        assert taken.why
        assert bool(blocks) == (mode == "masked")
        assert not secrets_of(blocks)


# Wrong products


@pytest.mark.parametrize("row", range(len(LENGTHS)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_one_bit_of_any_row_of_any_product(
    mode: ProtectionName, kind: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(y: Array) -> None:
        hostile.flip_low_bit(y[row : row + 1])

    with a_run(mode, monkeypatch, attack=edited(flip), at=KINDS[kind]) as (llm, worker):
        fails(llm, worker, ProductMismatch, asked=KINDS[kind] + 1)
        assert worker.calls[-1].group == kind


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_one_bit_of_a_row_beside_a_prompt(
    mode: ProtectionName, kind: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer, and of the last of four rows of a prompt; the LM head has a row of each."""
    row = 0 if not last else 1 if kind == "lm_head" else 4

    def flip(y: Array) -> None:
        hostile.flip_low_bit(y[row : row + 1])

    with a_run(mode, monkeypatch, attack=edited(flip), at=KINDS[kind]) as (llm, worker):
        sequences = caches(llm, [9, 30])
        with pytest.raises(ProductMismatch) as caught:
            beside(llm, sequences, [1, 4])
        assert [cache.length for cache in sequences] == [9, 30]
        assert worker.products == KINDS[kind] + 1
        assert_over(llm, caught.value, sequences)


WRONG: dict[str, tuple[Attack, type[ChannelError]]] = {
    "adds p": (edited(hostile.add_p), ReplyRangeError),
    "all ones": (edited(lambda y: y.fill(0xFFFFFFFF)), ReplyRangeError),
    "p for zero": (edited(lambda y: y.__setitem__((1, 3), P)), ReplyRangeError),
    "zeros": (edited(hostile.zeros), ProductMismatch),
    "last row wrong": (edited(hostile.wrong_last_row), ProductMismatch),
    "rows change places": (edited(lambda y: y.__setitem__([0, 1], y[[1, 0]])), ProductMismatch),
    "swaps layers": (hostile.other_layer, ProductMismatch),
    "other weights": (hostile.other_weights, ProductMismatch),
    "changes x": (hostile.changed_input, ProductMismatch),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", MODES)
def test_wrong_products(mode: ProtectionName, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, expected = WRONG[wrong]
    with a_run(mode, monkeypatch, attack=attack, at=2) as (llm, worker):
        fails(llm, worker, expected, asked=3)


@pytest.mark.parametrize("mode", MODES)
def test_a_product_of_the_step_before(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_run(mode, monkeypatch, attack=hostile.replayed, at=CALLS + 3) as (llm, worker):
        stepped(llm, caches(llm, LENGTHS))
        fails(llm, worker, ProductMismatch, asked=CALLS + 4)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_sent_is_never_read_back(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(mode, attack=hostile.overwritten_input, at=4) as (llm, worker):
        taken = Taken(monkeypatch)
        logits = stepped(llm, caches(llm, LENGTHS))
        assert worker.attacked == 4
        with plain(llm):
            assert torch.equal(logits, stepped(llm, caches(llm, LENGTHS)))
        assert taken.steps == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_that_changes_once_it_was_read_changes_nothing(mode: ProtectionName) -> None:
    """At every call the worker spoils its last product."""
    replies: list[memoryview] = []

    def spoil(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        for reply in replies:
            reply[:] = bytes(reply.nbytes)
        assert arrival.reply is not None
        replies[:] = [arrival.reply]
        raise NotHereError

    with opened(mode, attack=spoil) as (llm, worker):
        logits = [stepped(llm, caches(llm, LENGTHS), seed) for seed in range(2)]
        assert worker.products == 2 * CALLS
    with opened(mode) as (llm, _), plain(llm):
        assert same(logits, [stepped(llm, caches(llm, LENGTHS), seed) for seed in range(2)])


# Other answers


Packets = Callable[[int, int], list[bytes]]  # of a packet's number and a call's id


def number(value: int) -> bytes:
    return (value % 2**64).to_bytes(8, "little")


def done(call: int, busy_ns: int = 5) -> bytes:
    return encode(Done(call, busy_ns))


BAD_PACKETS: dict[str, Packets] = {
    "the next number": lambda n, i: [number(n + 1) + done(i)],
    "the number before": lambda n, i: [number(n - 1) + done(i)],
    "no such number": lambda n, i: [number(n + 2**63) + done(i)],
    "the opening's number": lambda n, i: [number(0) + done(i)],
    "a number alone": lambda n, i: [number(n)],
    "half a number": lambda n, i: [number(n)[:4]],
    "no number": lambda n, i: [done(i)[:7]],
    "junk": lambda n, i: [number(n) + b"\xc1" * 20],
    "a huge answer": lambda n, i: [number(n) + done(i) + bytes(100_000)],
    "an answer as long as any": lambda n, i: [(number(n) + done(i)).ljust(PACKET_BYTES, b"\0")],
    "a byte too many": lambda n, i: [number(n) + done(i) + b"\0"],
    "a byte too few": lambda n, i: [number(n) + done(i)[:-1]],
    "done and no more": lambda n, i: [number(n) + done(i)[:6]],
    "a field too many": lambda n, i: [number(n) + b"\x94" + done(i)[1:] + b"\x01"],
    "the id before": lambda n, i: [number(n) + done(i - 1)],
    "the next id": lambda n, i: [number(n) + done(i + 1)],
    "an id of another time": lambda n, i: [number(n) + done(i + 2**40)],
    "a negative time": lambda n, i: [number(n) + done(i, 1)[:-1] + b"\xff"],
    "a time too long": lambda n, i: [number(n) + done(i, 1)[:-1] + b"\xcf" + b"\xff" * 8],
    "an id that is text": lambda n, i: [number(n) + done(0)[:6] + b"\xa11" + b"\x05"],
    "a call": lambda n, i: [number(n) + encode(Product(i, "o", 0, 1, 4))],
}


def answering(packets: Packets) -> Attack:
    """The right product, and these packets for an answer to its call."""

    def attack(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        worker.honest(arrival)
        send(worker, *packets(arrival.ticket, call.id))

    return attack


def send(worker: HostileWorker, *packets: bytes) -> None:
    assert isinstance(worker, RecordingWorker)
    (connection,) = worker.listener._connections.values()  # type: ignore[attr-defined]
    for packet in packets:
        connection.line.send(packet)


@pytest.mark.parametrize("at", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("bad", BAD_PACKETS)
def test_a_packet_that_is_no_answer(bad: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not plainly the answer ends the step at once; what is only said wrong in it may be noticed at its end."""
    with a_run("masked", monkeypatch, attack=answering(BAD_PACKETS[bad]), at=at) as (llm, worker):
        sequences = caches(llm, LENGTHS)
        with pytest.raises(ProtocolError) as caught:
            stepped(llm, sequences)
        assert [cache.length for cache in sequences] == LENGTHS
        assert worker.products in (at + 1, CALLS)
        assert_over(llm, caught.value, sequences)


@pytest.mark.parametrize("at", NUMBERS.values(), ids=NUMBERS)
def test_two_answers_to_one_call(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = answering(lambda n, i: [number(n) + done(i)] * 2)
    with a_run("masked", monkeypatch, attack=twice, at=at) as (llm, _):
        if at == NUMBERS["last"]:
            stepped(llm, caches(llm, LENGTHS))
        with pytest.raises(ProtocolError) as caught:
            stepped(llm, caches(llm, LENGTHS))
        assert_over(llm, caught.value, caches(llm, LENGTHS))


def test_an_answer_before_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes this side look at a product that is not there."""
    early = answering(lambda n, i: [number(n) + done(i), number(n + 1) + done(i + 1)])

    def attack(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        if worker.products == 3:  # later ones get neither a product nor an answer
            early(worker, call, arrival)

    with a_run("masked", monkeypatch, attack=attack, at=2, every=True) as (llm, _):
        with pytest.raises(ProductMismatch) as caught:
            stepped(llm, caches(llm, LENGTHS))
        assert_over(llm, caught.value, caches(llm, LENGTHS))


def test_an_empty_packet_is_the_end_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket of packets says that it has ended by one: whoever sends it may count as gone."""
    empty = answering(lambda n, i: [b"", number(n) + done(i)])
    with opened("masked", attack=empty, at=3) as (llm, _):
        taken = Taken(monkeypatch)
        try:
            logits = stepped(llm, caches(llm, LENGTHS))
        except WorkerLost as error:
            assert_over(llm, error, caches(llm, LENGTHS))
        else:
            with plain(llm):
                assert torch.equal(logits, stepped(llm, caches(llm, LENGTHS)))
            assert taken.steps == 1


def long_done(call: int, busy_ns: int) -> bytes:
    """The longest way to say it with the usual beginning."""
    return done(0)[:6] + b"\xcf" + call.to_bytes(8, "big") + b"\xcf" + busy_ns.to_bytes(8, "big")


LATEST = 2**53  # nanoseconds, with which that answer is longer than any other

UNUSUAL: dict[str, Callable[[int, int], bytes]] = {
    "long integers": long_done,
    "a long array": lambda call, busy_ns: b"\xdc\x00\x03" + done(call, busy_ns)[1:],
    "a longer array": lambda call, busy_ns: b"\xdd\x00\x00\x00\x03" + done(call, busy_ns)[1:],
    "a long name": lambda call, busy_ns: b"\x93\xd9\x04" + done(call, busy_ns)[2:],
    "all as long as can be": lambda call, busy_ns: (
        b"\xdd\x00\x00\x00\x03\xdb\x00\x00\x00\x04done" + long_done(call, busy_ns)[6:]
    ),
    "how long it took in a device's queues": lambda call, busy_ns: encode(
        StagedDone(call, busy_ns, ((0, LATEST), (LATEST, LATEST), (LATEST, LATEST)))
    ),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_unusual_ways_to_say_that_it_is_done(unusual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call of a step; a figure of the worker's is counted."""

    attack = answering(lambda n, i: [number(n) + UNUSUAL[unusual](i, 1)])
    with opened("masked", attack=attack, every=True) as (llm, worker):
        taken = Taken(monkeypatch)
        logits = stepped(llm, caches(llm, LENGTHS))
        assert taken.steps == 1
        assert worker.products == CALLS
        assert sum(row.worker_s for row in llm.stats.calls.values()) == pytest.approx(CALLS * 1e-9)
    with opened("masked") as (llm, _), plain(llm):
        assert torch.equal(logits, stepped(llm, caches(llm, LENGTHS)))


@pytest.mark.parametrize("busy_ns", [0, 2**62 - 1])
def test_a_worker_may_lie_about_its_time_without_effect(busy_ns: int) -> None:
    lie = answering(lambda n, i: [number(n) + done(i, busy_ns)])
    with opened("verified", attack=lie, every=True) as (llm, worker):
        stepped(llm, caches(llm, LENGTHS))
        assert worker.products == CALLS
        for row in llm.stats.calls.values():
            assert 0 <= row.worker_s <= row.rpc_s


@pytest.mark.parametrize("at", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_that_fails_says_why(mode: ProtectionName, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
        return Frames(encode(Failed(call.id, "no\x1b[31m memory " + "x" * 400)))

    with a_run(mode, monkeypatch, attack=fail, at=at) as (llm, worker):
        error = fails(llm, worker, WorkerFailed, asked=at + 1)
        assert " memory xxx" in str(error)
        assert "\x1b" not in str(error)


# Late, or never


def when_settled(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[int]:
    """``act`` whenever the loop has left something to the channel, before that is done: why it has."""
    why: list[int] = []
    real = DecodeStep._settle

    def settle(step: DecodeStep, plan: Any, verdict: int, size: int) -> None:
        why.append(verdict)
        act()
        real(step, plan, verdict, size)

    monkeypatch.setattr(DecodeStep, "_settle", settle)
    return why


@pytest.mark.parametrize("at", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_may_be_late(mode: ProtectionName, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later than the loop has patience: the channel waits on."""
    waits = threading.Event()

    def late(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
        assert waits.wait(WAIT_S)
        return worker.honest(arrival)

    with opened(mode, attack=late, at=at) as (llm, worker):
        why, taken = when_settled(monkeypatch, waits.set), Taken(monkeypatch)
        logits = stepped(llm, caches(llm, LENGTHS))
        assert worker.attacked == at
        assert len(why) >= 1
        assert taken.steps == 1
        with plain(llm):
            assert torch.equal(logits, stepped(llm, caches(llm, LENGTHS)))
        assert torch.equal(logits, stepped(llm, caches(llm, LENGTHS)))
        assert taken.steps == 2


@pytest.mark.parametrize("mode", MODES)
def test_no_answer_before_the_deadline(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_run(mode, monkeypatch, attack=hostile.stalled, at=5, deadline_s=hostile.DEADLINE_S) as (llm, worker):
        hostile.pass_the_deadline_once_stalled(monkeypatch, worker)
        fails(llm, worker, DeadlineExceeded, asked=6)


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_while_an_answer_is_awaited(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker holds back its answer until the test is over."""
    over, main = threading.Event(), threading.get_ident()

    def hold(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        over.wait(WAIT_S)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with a_run(mode, monkeypatch, attack=hold, at=3) as (llm, worker):
            sequences = caches(llm, LENGTHS)
            try:
                with pytest.raises(KeyboardInterrupt):
                    stepped(llm, sequences)
                assert not over.is_set()
            finally:
                over.set()
            with pytest.raises(ChannelClosed, match="given up") as caught:
                stepped(llm, sequences)
            assert_over(llm, caught.value, sequences)
            assert worker.products == 4
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def process(mode: ProtectionName) -> Iterator[tuple[LLM, int]]:
    """A run whose worker is a process beside this one; its id."""
    with LLM(MODEL, protection=mode, worker=WorkerConfig(patience_s=0)) as llm:
        worker = llm.worker_pid
        assert worker is not None
        try:
            stepped(llm, caches(llm, LENGTHS))
            yield llm, worker
        finally:
            os.kill(worker, signal.SIGKILL)


def error_of(llm: LLM, expected: type[TsqpError]) -> None:
    sequences = caches(llm, LENGTHS)
    with pytest.raises(expected) as caught:
        stepped(llm, sequences)
    assert [cache.length for cache in sequences] == LENGTHS
    with pytest.raises(expected) as again:
        stepped(llm, sequences)
    assert again.value is caught.value


def test_a_worker_that_is_killed_while_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    with process("masked") as (llm, worker):
        os.kill(worker, signal.SIGSTOP)
        why = when_settled(monkeypatch, lambda: os.kill(worker, signal.SIGKILL))
        error_of(llm, WorkerLost)
        assert len(why) == 1


def test_a_worker_that_is_killed_between_two_steps() -> None:
    with process("verified") as (llm, worker):
        descriptor = os.pidfd_open(worker)
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
        os.close(descriptor)
        error_of(llm, WorkerLost)


def test_a_worker_that_is_stopped() -> None:
    with process("masked") as (llm, worker):
        os.kill(worker, signal.SIGSTOP)
        session: Any = llm.session
        session.deadline_s = 0.05  # from now on: it has answered until here in whatever time it took
        error_of(llm, DeadlineExceeded)


# Numbers of this side that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "sent"), [("attention", 0), ("mlp", 2), ("final", CALLS - 1)])
@pytest.mark.parametrize("mode", MODES)
def test_activations_that_are_not_numbers_are_not_sent(
    mode: ProtectionName, kind: str, sent: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(mode) as (llm, worker):
        taken = Taken(monkeypatch)
        norms = llm.engine.decoder._layers.norms  # type: ignore[attr-defined]
        (norms.final if kind == "final" else getattr(norms.layers[0], kind))[7] = bad
        with pytest.raises(NumericError):
            stepped(llm, caches(llm, LENGTHS))
        assert worker.products == sent
        assert taken.own == [step_loops.REFUSED]


@pytest.mark.parametrize("row", range(len(LENGTHS)))
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_no_numbers_stops_the_others_too(
    mode: ProtectionName, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence has a broken key. The session goes on without it, as the plain way does; its pads are lost."""
    blocks = record_blocks(monkeypatch)
    with opened(mode) as (llm, worker):
        taken, sequences = Taken(monkeypatch), caches(llm, [4, 5, 6])
        sequences[row].view(0, 0, 4)[1][0, 2, 5] = float("nan")
        with pytest.raises(NumericError):
            stepped(llm, sequences)
        assert worker.products == 1
        assert [cache.length for cache in sequences] == [4, 5, 6]
        del sequences[row]
        logits = stepped(llm, sequences)
        assert taken.steps == 1
        assert worker.products == 1 + CALLS
        lengths = [cache.length - 1 for cache in sequences]
        assert [block._used for block in blocks] == [5] * len(blocks)
        assert len(blocks) == (CALLS if mode == "masked" else 0)
        for block in blocks:
            assert (block._products[:5] == 0xFFFFFFFF).all()  # type: ignore[index]
        assert len(lengths) == len(logits) == 2
