"""The worker's end of a call by compiled code, over a pair of sockets: what it waits for, knows, and answers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.links import WAIT_S
from tsqp.wire.answering import (
    ANSWER_BYTES,
    BELL,
    LISTENING_NUMBERS,
    NOTHING,
    OTHERS,
    await_request,
    call_id,
    say_done,
)
from tsqp.wire.codec import decode_reply, encode
from tsqp.wire.direct import done_start
from tsqp.wire.exchange import CROWDED_NS, DESCRIPTOR, REST_NS, REST_UNTIL, SPIN_NS
from tsqp.wire.messages import Done, Product
from tsqp.wire.transport.shm.packets import PACKET_BYTES

LONG_NS = 10**11  # longer than any test
PLACES = bytes(range(56))
CALL = encode(Product(5, "gate_up", 17, 3, 4))
HEAD, REST = PLACES + CALL[:9], CALL[10:]
KNOWN = np.frombuffer(HEAD + REST + bytes(20), np.uint8)


class Waiter:
    """One end of a pair of sockets, and a bell; ``peer`` is the other end."""

    def __init__(self, own: socket.socket, peer: socket.socket, bell: int) -> None:
        self.own, self.peer, self.bell = own, peer, bell
        self.line = np.zeros(LISTENING_NUMBERS, np.int64)
        self.line[DESCRIPTOR], self.line[BELL] = own.fileno(), bell
        self.line[CROWDED_NS] = self.line[REST_NS] = LONG_NS
        self.packet = np.zeros(PACKET_BYTES, np.uint8)
        self._clock = np.zeros(2, np.int64)

    def wait(self) -> tuple[int, bytes]:
        size = int(await_request(self.line, self.packet, self._clock))
        return size, self.packet[: max(0, size)].tobytes()

    def say(self, packet: bytes, found: int, busy_ns: int) -> bool:
        room = np.zeros(ANSWER_BYTES, np.uint8)
        return bool(say_done(self.line, np.frombuffer(packet, np.uint8), done_start(), found, busy_ns, room))


@contextmanager
def connected() -> Iterator[Waiter]:
    with ExitStack() as stack:
        own, peer = (stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        stack.callback(os.close, bell)
        peer.settimeout(WAIT_S)
        yield Waiter(own, peer, bell)


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    with connected() as waiter:
        yield waiter


# Waiting


@pytest.mark.parametrize("spin_ns", [0, LONG_NS], ids=["asleep", "spinning"])
def test_a_packet_that_is_here_or_comes(waiter: Waiter, spin_ns: int) -> None:
    waiter.line[SPIN_NS] = spin_ns
    waiter.peer.send(b"one")
    assert waiter.wait() == (3, b"one")
    sender = threading.Thread(target=waiter.peer.send, args=(b"later",))
    sender.start()
    found = waiter.wait()
    while found == (NOTHING, b""):  # the other thread had no processor for longer than the patience
        found = waiter.wait()
    assert found == (5, b"later")
    sender.join()


@pytest.mark.parametrize("spin_ns", [0, 1000])
def test_a_bell_is_heard(waiter: Waiter, spin_ns: int) -> None:
    waiter.line[SPIN_NS] = spin_ns
    os.eventfd_write(waiter.bell, 1)
    assert waiter.wait() == (OTHERS, b"")
    waiter.peer.send(b"first")
    assert waiter.wait() == (5, b"first"), "who is here already is served first"


def test_patience_ends(waiter: Waiter) -> None:
    assert waiter.wait() == (NOTHING, b"")


@pytest.mark.parametrize("spin_ns", [0, LONG_NS])
def test_a_client_that_has_gone(waiter: Waiter, spin_ns: int) -> None:
    waiter.line[SPIN_NS] = spin_ns
    waiter.peer.send(b"the last")
    waiter.peer.close()
    assert waiter.wait() == (8, b"the last")
    assert waiter.wait() == (0, b"")


def test_a_client_that_is_reset(waiter: Waiter) -> None:
    waiter.own.send(b"never read")
    waiter.peer.close()
    found = [waiter.wait()[0], waiter.wait()[0]]
    assert found == [NOTHING, 0], "said once, ahead of the end"


@pytest.mark.parametrize("size", [1, 63, 64, PACKET_BYTES, PACKET_BYTES + 1, 100_000])
def test_no_packet_is_written_past_its_room(waiter: Waiter, size: int) -> None:
    waiter.peer.send(bytes([7]) * size)
    assert waiter.wait() == (min(size, PACKET_BYTES), bytes([7]) * min(size, PACKET_BYTES))


def test_a_dear_round_ends_the_spinning_for_a_while(waiter: Waiter) -> None:
    waiter.line[SPIN_NS], waiter.line[CROWDED_NS] = LONG_NS, -1
    assert waiter.wait() == (NOTHING, b""), "without it the spin would not end within the test"
    until = int(waiter.line[REST_UNTIL])
    assert until > 0
    waiter.peer.send(b"x")
    assert waiter.wait() == (1, b"x")
    assert waiter.line[REST_UNTIL] == until, "no round, dear or not"


# Knowing a call again


def packet_of(number: bytes, head: bytes = HEAD, rest: bytes = REST) -> bytes:
    return b"sequence" + head + number + rest


def found_in(packet: bytes) -> int:
    memory = np.frombuffer(packet + b"\xcc" * 8, np.uint8)  # what lies behind it plays no part
    return int(call_id(memory, len(packet), KNOWN, len(HEAD), len(REST)))


def widths(number: int) -> list[bytes]:
    """A number as MessagePack, in every width that holds it."""
    wide = [bytes([0xCC + i]) + number.to_bytes(1 << i, "big") for i in range(4) if number < 1 << (8 << i)]
    return [bytes([number]), *wide] if number < 128 else wide


@given(st.integers(0, 2**64 - 1))
def test_only_the_id_may_differ_however_wide_it_is(number: int) -> None:
    for one in widths(number):
        assert found_in(packet_of(one)) == (number if number < 2**62 else -1)


@given(st.binary(min_size=1, max_size=10))
@example(b"\xc2")  # false, which Python takes for a number
def test_what_is_no_whole_number_is_no_id(number: bytes) -> None:
    found = found_in(packet_of(number))
    try:
        expected = msgspec.msgpack.decode(number)
    except (msgspec.DecodeError, UnicodeDecodeError):
        expected = None
    if found >= 0:
        assert found == expected
    elif type(expected) is int and 0 <= expected < 2**62:
        assert 0xD0 <= number[0] <= 0xD3, "signed numbers are left to Python"


@given(st.data())
def test_every_other_byte_counts(data: st.DataObject) -> None:
    packet = bytearray(packet_of(data.draw(st.sampled_from(widths(99)))))
    at = data.draw(st.integers(8, 8 + len(HEAD) - 1) | st.integers(len(packet) - len(REST), len(packet) - 1))
    packet[at] ^= 1 << data.draw(st.integers(0, 7))
    assert found_in(bytes(packet)) == -1


@given(st.integers(0, 300), st.binary(max_size=5))
def test_every_other_size_is_another_packet(end: int, more: bytes) -> None:
    whole = packet_of(widths(99)[-1])
    cut = whole[:end] + more
    assert (found_in(cut) == 99) == (cut == whole)


# Answering


@given(st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1), st.binary(min_size=8, max_size=20))
def test_an_answer_is_the_message_that_it_says(found: int, busy_ns: int, packet: bytes) -> None:
    with connected() as waiter:
        assert waiter.say(packet, found, busy_ns)
        answer = waiter.peer.recv(PACKET_BYTES)
    assert answer[:8] == packet[:8]
    assert decode_reply(answer[8:]) == Done(found, busy_ns)


def test_a_client_that_has_gone_is_told_nothing(waiter: Waiter) -> None:
    waiter.peer.close()
    assert not waiter.say(bytes(8), 1, 1)


def test_a_client_that_reads_nothing_is_not_waited_for(waiter: Waiter) -> None:
    waiter.own.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            waiter.own.send(b"an answer")
    assert not waiter.say(bytes(8), 1, 1)
