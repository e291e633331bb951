"""One call and its answer by compiled code, over a pair of sockets whose other end does what the test says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.links import WAIT_S
from tsqp.wire.codec import encode
from tsqp.wire.direct import done_start
from tsqp.wire.exchange import (
    ANSWERED,
    CROWDED_NS,
    DESCRIPTOR,
    LINE_NUMBERS,
    PATIENCE_MS,
    REST_NS,
    REST_UNTIL,
    SHORT_ANSWER,
    SPIN_NS,
    UNANSWERED,
    UNSENT,
    UNUSUAL,
    exchange,
    now,
)
from tsqp.wire.messages import Done
from tsqp.wire.transport.shm.packets import PACKET_BYTES

DONE = done_start().tobytes()
LONG_NS = 10**11  # longer than any test
PACKET = b"a request"
CALL_ID = 5


class Caller:
    """Calls over one end of a pair of sockets; ``peer`` is the other end."""

    def __init__(self, own: socket.socket, peer: socket.socket) -> None:
        self.own, self.peer = own, peer
        self.line = np.zeros(LINE_NUMBERS, np.int64)
        self.line[DESCRIPTOR] = own.fileno()
        self.line[SPIN_NS], self.line[CROWDED_NS], self.line[REST_NS] = LONG_NS, LONG_NS, LONG_NS
        self.slow = np.zeros(1, np.uint8)
        self._answer = np.zeros(PACKET_BYTES, np.uint8)
        self._clock = np.zeros(2, np.int64)

    def call(self, number: int, packet: bytes = PACKET, call_id: int = CALL_ID) -> tuple[int, bytes]:
        """The verdict, and what is left in ``answer``."""
        memory = np.frombuffer(packet, np.uint8)
        done, self._answer[:] = np.frombuffer(DONE, np.uint8), 0xEE
        sent, room = (memory.ctypes.data, len(packet), number), (self._answer, self.slow, self._clock)
        verdict, size = exchange(self.line, *sent, done, call_id, *room)
        return int(verdict), self._answer[:size].tobytes()

    def now(self) -> int:
        return int(now(self._clock))


@contextmanager
def connected() -> Iterator[Caller]:
    with ExitStack() as stack:
        own, peer = (stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(WAIT_S)
        yield Caller(own, peer)


@pytest.fixture
def caller() -> Iterator[Caller]:
    with connected() as caller:
        yield caller


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """``work`` on a thread of its own meanwhile."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def answer(number: int, rest: bytes = bytes([CALL_ID, 1])) -> bytes:
    return number.to_bytes(8, "little") + DONE + rest


def names_the_call(rest: bytes) -> bool:
    """Whether a number of MessagePack, of any width, stands there first, and is that of the call."""
    wide = [bytes([0xCC + index]) + CALL_ID.to_bytes(1 << index, "big") for index in range(4)]
    return any(rest.startswith(one) for one in (bytes([CALL_ID]), *wide))


def until_asleep(thread: int) -> None:
    """Wait until a thread of this process sleeps in the kernel."""
    state = Path(f"/proc/self/task/{thread}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "S":
        pass


# What is sent, and when


def test_the_clock_is_that_of_perf_counter(caller: Caller) -> None:
    before = time.perf_counter_ns()
    moment = caller.now()
    assert before <= moment <= time.perf_counter_ns()


def test_an_answer_that_is_here_at_once(caller: Caller) -> None:
    caller.peer.send(answer(7))
    assert caller.call(7) == (ANSWERED, answer(7))
    assert caller.peer.recv(100) == PACKET
    assert caller.slow == 0


def test_an_answer_while_it_spins(caller: Caller) -> None:
    def work() -> None:
        assert caller.peer.recv(100) == PACKET
        caller.peer.send(answer(7))

    with beside(work):
        assert caller.call(7) == (ANSWERED, answer(7))
    assert caller.slow == 0


def test_an_answer_while_it_sleeps(caller: Caller) -> None:
    main = threading.get_native_id()
    for number in range(20):  # a machine that is busy may wake the other thread too late
        caller.line[SPIN_NS] = 0

        def work(number: int = number) -> None:
            caller.peer.recv(100)
            until_asleep(main)
            caller.peer.send(answer(number))

        with beside(work):
            verdict, came = caller.call(number)
        if verdict == ANSWERED:
            break
        assert (verdict, came) == (UNANSWERED, b"")
        assert caller.own.recv(100) == answer(number)
    assert (verdict, came) == (ANSWERED, answer(number))
    assert caller.slow == 1, "longer than twice a spin of no time"


def test_one_packet_is_taken_for_one_that_is_sent(caller: Caller) -> None:
    for number in (3, 4):
        caller.peer.send(answer(number))
    assert caller.call(3) == (ANSWERED, answer(3))
    assert caller.call(4) == (ANSWERED, answer(4))
    assert [caller.peer.recv(100) for _ in range(2)] == [PACKET] * 2
    caller.peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        caller.peer.recv(100)


@given(st.binary(min_size=1, max_size=PACKET_BYTES), st.integers(0, 2**63 - 1))
def test_every_byte_of_a_packet_is_sent(packet: bytes, number: int) -> None:
    with connected() as caller:
        caller.peer.send(answer(number))
        assert caller.call(number, packet)[0] == ANSWERED
        assert caller.peer.recv(2 * PACKET_BYTES) == packet


# What may come back


@given(st.data())
def test_an_answer_is_what_names_the_call_and_is_short_and_done(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, 2**63 - 1))
    ids = st.sampled_from([encode(Done(CALL_ID, 9))[6:], b"\xcc\x05", b"\xcf" + bytes(7) + b"\x05", b"\xcd\x05\x00"])
    packet = bytearray(answer(number, data.draw(st.one_of(ids, st.binary(max_size=SHORT_ANSWER)))))
    if data.draw(st.booleans()):
        del packet[data.draw(st.integers(1, len(packet))) :]
    if data.draw(st.booleans()):
        packet[data.draw(st.integers(0, len(packet) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    good = packet[:14] == answer(number, b"") and len(packet) <= SHORT_ANSWER and names_the_call(bytes(packet[14:]))
    with connected() as caller:
        caller.peer.send(packet)
        assert caller.call(number) == (ANSWERED if good else UNUSUAL, bytes(packet))


@given(st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1))
def test_an_answer_to_another_call_is_unusual(call_id: int, other: int, busy_ns: int) -> None:
    with connected() as caller:
        for named in (call_id, other):
            packet = (7).to_bytes(8, "little") + encode(Done(named, busy_ns))
            caller.peer.send(packet)
            assert caller.call(7, call_id=call_id) == (ANSWERED if named == call_id else UNUSUAL, packet)


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_the_number_counts(caller: Caller, bit: int) -> None:
    number = 0x0123_4567_89AB_CDEF
    packet = (number ^ 1 << bit).to_bytes(8, "little") + DONE
    caller.peer.send(packet)
    assert caller.call(number) == (UNUSUAL, packet)


@pytest.mark.parametrize("at", range(len(DONE)))
def test_every_byte_of_done_counts(caller: Caller, at: int) -> None:
    packet = bytearray(answer(5))
    packet[8 + at] ^= 1
    caller.peer.send(packet)
    assert caller.call(5) == (UNUSUAL, bytes(packet))


@pytest.mark.parametrize("size", [1, 7, 8, 13, 14, 63, 64, 65, 1000, PACKET_BYTES, PACKET_BYTES + 1, 100_000])
def test_the_size_of_an_answer(caller: Caller, size: int) -> None:
    packet = answer(9, bytes([CALL_ID]) * 100_000)[:size]
    caller.peer.send(packet)
    good = 15 <= size <= SHORT_ANSWER
    assert caller.call(9) == (ANSWERED if good else UNUSUAL, packet[:PACKET_BYTES])


def test_any_number_is_named_exactly(caller: Caller) -> None:
    for number in (0, 1, 255, 256, 2**31, 2**32, 2**56 - 1, 2**62, 2**63 - 1):
        caller.peer.send(answer(number))
        assert caller.call(number) == (ANSWERED, answer(number))


# When nothing comes, or nothing can be sent


def test_patience_ends(caller: Caller) -> None:
    assert PATIENCE_MS <= 100, "whoever presses Ctrl-C waits for as long"
    caller.line[SPIN_NS] = 0
    assert caller.call(1) == (UNANSWERED, b"")
    assert caller.peer.recv(100) == PACKET
    assert caller.slow == 1


def test_a_peer_that_has_gone_is_sent_nothing(caller: Caller) -> None:
    caller.peer.close()
    assert caller.call(1) == (UNSENT, b"")


def test_a_peer_that_says_no_more(caller: Caller) -> None:
    caller.line[SPIN_NS] = 0
    caller.peer.shutdown(socket.SHUT_WR)
    assert caller.call(1) == (UNANSWERED, b"")
    assert caller.peer.recv(100) == PACKET


def test_a_peer_that_goes_while_it_is_awaited(caller: Caller) -> None:
    def work() -> None:
        caller.peer.recv(100)
        caller.peer.close()

    caller.line[SPIN_NS] = 10**6
    with beside(work):
        assert caller.call(1) == (UNANSWERED, b"")


def test_a_full_socket_is_sent_nothing(caller: Caller) -> None:
    caller.own.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            caller.own.send(b"%8d" % sent)
            sent += 1
    assert caller.call(1, b"one more") == (UNSENT, b"")
    assert [caller.peer.recv(100) for _ in range(sent)] == [b"%8d" % n for n in range(sent)]
    caller.peer.send(answer(1))
    assert caller.call(1, b"one more") == (ANSWERED, answer(1)), "there is room again"
    assert caller.peer.recv(100) == b"one more"


# Spinning and not spinning


def spun(caller: Caller) -> bool:
    """Whether a call spins: every round is dear, and a dear round moves ``REST_UNTIL``."""
    caller.line[CROWDED_NS] = -1
    before = caller.line[REST_UNTIL]
    caller.peer.send(answer(1))
    assert caller.call(1) == (ANSWERED, answer(1))
    assert caller.peer.recv(100) == PACKET
    return bool(caller.line[REST_UNTIL] != before)


def test_a_dear_round_ends_the_spinning_for_a_while(caller: Caller) -> None:
    before = caller.now()
    assert spun(caller)
    assert before + LONG_NS <= caller.line[REST_UNTIL] <= caller.now() + LONG_NS
    assert not spun(caller)
    caller.line[REST_UNTIL] = caller.now()
    assert spun(caller)


def test_a_dear_round_with_nothing_leads_to_sleep(caller: Caller) -> None:
    caller.line[CROWDED_NS] = -1
    assert caller.call(1) == (UNANSWERED, b""), "without it the spin would not end within the test"
    assert caller.line[REST_UNTIL] > 0


def test_rounds_that_are_not_dear_end_nothing(caller: Caller) -> None:
    caller.peer.send(answer(1))
    assert caller.call(1)[0] == ANSWERED
    assert caller.line[REST_UNTIL] == 0


def test_who_was_slow_is_not_spun_for_until_it_is_quick(caller: Caller) -> None:
    caller.slow[0] = 1
    assert not spun(caller)
    assert caller.slow == 0, "this one was here at once"
    caller.line[REST_UNTIL] = 0
    assert spun(caller)


def test_a_sleep_shorter_than_two_spins_was_worth_it(caller: Caller) -> None:
    caller.slow[0] = 1
    main = threading.get_native_id()

    def work() -> None:
        caller.peer.recv(100)
        until_asleep(main)
        caller.peer.send(answer(1))

    with beside(work):
        verdict, _ = caller.call(1)
    assert caller.slow == (verdict != ANSWERED)  # a machine that is busy may wake the other thread too late


def test_a_sleep_longer_than_two_spins_was_not(caller: Caller) -> None:
    caller.line[SPIN_NS] = 0
    caller.peer.send(answer(1))
    assert caller.call(1) == (ANSWERED, answer(1))
    assert caller.slow == 1
