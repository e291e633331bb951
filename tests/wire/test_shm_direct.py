"""The direct line of a shared-memory channel: who has one, its packets, and what is left to the channel."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.wire.links import WAIT_S, Link
from tests.wire.shm_peers import RawWorker, decode_request, raw_worker
from tsqp.errors import ChannelClosed, ChannelError, DeadlineExceeded, ProtocolError, WorkerLost
from tsqp.wire.channel import Channel, DirectLine, Frames
from tsqp.wire.codec import MAX_CONTROL_BYTES
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.slot import Slot
from tsqp.wire.transport.shm.channel import ShmChannel
from tsqp.wire.transport.shm.packets import OPENING, PACKET_BYTES, Answer, encode_answer
from tsqp.wire.transport.shm.spin import CROWDED_S, REST_S

CONTROL = b"a call"


class Ends:
    """A channel that has been opened, its direct line, and its worker."""

    def __init__(self, worker: RawWorker, channel: ShmChannel) -> None:
        self.worker, self.channel = worker, channel
        worker.answer(OPENING)
        channel.send(Frames(b"hello"))
        assert worker.next_request().control == b"hello"
        worker.answer(1, b"welcome")
        assert channel.receive(WAIT_S).control == b"welcome"
        direct = channel.direct()
        assert direct is not None
        self.line: DirectLine = direct
        self.slot = channel.slot(64, 128)

    def numbered(self, number: int) -> bytes:
        """The packet of a call from the slot."""
        packet, _ = self.line.packet(self.slot, CONTROL)
        assert packet[:8] == bytes(8)
        return number.to_bytes(8, "little") + packet[8:]

    def sent(self) -> int:
        """Send a call from the slot, as those do who use the line; its number."""
        number = self.line.numbers(1)
        assert os.write(self.line.descriptor, self.numbered(number))
        return number

    def settled(self, number: int, *, unsent: bytes = b"", came: bytes = b"", deadline_s: float = WAIT_S) -> bytes:
        return self.line.settle(self.slot, number, deadline_s, unsent=unsent, came=came)

    def assert_dead(self, error: type[ChannelError]) -> None:
        calls = (
            lambda: self.line.numbers(1),
            lambda: self.settled(9, came=encode_answer(Answer(9, b""))),
            lambda: self.channel.receive(0.0),
            self.channel.direct,
        )
        for call in calls:
            with pytest.raises(ChannelClosed, match=error.__name__):
                call()


@pytest.fixture
def ends(private_dir: Path) -> Iterator[Ends]:
    with raw_worker(private_dir) as (worker, channel):
        yield Ends(worker, channel)


# Who has one


def test_shared_memory_has_a_direct_line_and_nothing_else(link: Link, channel: Channel) -> None:
    line = channel.direct()
    assert (line is None) == (not link.name.startswith("shm"))
    if line is not None:
        assert str(Path(f"/proc/self/fd/{line.descriptor}").readlink()).startswith("socket:")
        assert (line.crowded_s, line.rest_s, line.packet_bytes) == (CROWDED_S, REST_S, PACKET_BYTES)


def test_a_channel_in_front_of_another_has_none(ends: Ends) -> None:
    """Nothing goes past whoever changes or records what is sent."""
    assert ForwardingChannel(ends.channel).direct() is None


def test_spinning_is_as_the_channel_was_told(private_dir: Path) -> None:
    with raw_worker(private_dir, spin_s=0.25) as (_, channel):
        line = channel.direct()
        assert line is not None
        assert line.spin_s == 0.25


def test_a_closed_channel_has_none(ends: Ends) -> None:
    ends.channel.close()
    with pytest.raises(ChannelClosed):
        ends.channel.direct()


# Packets and numbers


def test_a_packet_says_where_slot_and_reply_lie(ends: Ends) -> None:
    packet, product = ends.line.packet(ends.slot, CONTROL)
    ends.slot.tensor[:] = b"t" * 64
    product[:] = b"p" * 128
    request = decode_request(packet)
    (tensor,) = request.tensors
    assert (request.sequence, request.control) == (0, CONTROL)
    assert ends.worker.memory[tensor.offset :][: tensor.size] == b"t" * 64
    assert ends.worker.memory[request.product.offset :][: request.product.size] == b"p" * 128


def test_what_is_sent_directly_is_the_request_that_send_from_sends(ends: Ends) -> None:
    direct = ends.sent()
    first = ends.worker.next_request()
    ends.worker.answer(direct)
    ends.settled(direct)
    ends.channel.send_from(ends.slot, CONTROL)
    second = ends.worker.next_request()
    assert (first.sequence, second.sequence) == (direct, direct + 1)
    assert (first.control, first.tensors, first.product) == (second.control, second.tensors, second.product)


def test_a_control_frame_over_the_limit_has_no_packet(ends: Ends) -> None:
    with pytest.raises(ProtocolError, match="control frame"):
        ends.line.packet(ends.slot, bytes(MAX_CONTROL_BYTES + 1))


def test_a_slot_of_another_channel_is_refused(ends: Ends, tmp_path: Path) -> None:
    """Its places are of another arena: here they would name memory of something else."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    with raw_worker(other) as (_, channel):
        foreign = channel.slot(64, 128)
        plain = Slot(memoryview(bytearray(64)), 128)
        for slot in (foreign, plain):
            with pytest.raises(ProtocolError, match="another channel"):
                ends.line.packet(slot, CONTROL)
        with pytest.raises(ProtocolError, match="another channel"):
            ends.line.settle(foreign, 2, WAIT_S, came=encode_answer(Answer(2, b"")))
        ends.assert_dead(ProtocolError)


def test_numbers_are_used_once(ends: Ends) -> None:
    first = ends.line.numbers(5)
    assert ends.line.numbers(3) == first + 5
    ends.channel.send(Frames(b"as ever"))
    assert ends.worker.next_request().sequence == first + 8


def test_no_numbers_while_another_call_is_under_way(ends: Ends) -> None:
    ends.channel.send(Frames(b"first"))
    with pytest.raises(ChannelClosed, match="under way"):
        ends.line.numbers(1)
    ends.worker.answer(ends.worker.next_request().sequence)
    ends.channel.receive(WAIT_S)
    assert ends.line.numbers(1) == 3


def test_no_numbers_before_the_opening_is_answered(private_dir: Path) -> None:
    with raw_worker(private_dir) as (_, channel):
        line = channel.direct()
        assert line is not None
        with pytest.raises(ChannelClosed, match="under way"):
            line.numbers(1)


# What is left to the channel


def test_an_answer_that_has_come(ends: Ends) -> None:
    number = ends.sent()
    assert ends.settled(number, came=encode_answer(Answer(number, b"it failed"))) == b"it failed"
    assert ends.line.numbers(1) == number + 1, "nothing is under way"


def test_an_answer_that_has_not_come_yet(ends: Ends) -> None:
    number = ends.sent()
    ends.worker.answer(ends.worker.next_request().sequence, b"done")
    assert ends.settled(number) == b"done"
    assert ends.line.numbers(1) == number + 1


def test_a_packet_that_could_not_be_sent(ends: Ends) -> None:
    number = ends.line.numbers(1)

    def work() -> None:
        assert ends.worker.next_request().sequence == number
        ends.worker.answer(number, b"done")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ends.settled(number, unsent=ends.numbered(number)) == b"done"
    finally:
        thread.join()


def test_a_packet_for_which_there_is_no_room_waits_for_it(ends: Ends) -> None:
    numbers = ends.line.numbers(10_000)
    filled = 0
    with socket.socket(fileno=os.dup(ends.line.descriptor)) as line, suppress(BlockingIOError):
        line.setblocking(False)
        while True:
            line.send(ends.numbered(numbers + filled))
            filled += 1
    last = numbers + filled

    def work() -> None:
        while ends.worker.next_request().sequence != last:
            pass
        ends.worker.answer(last, b"done")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ends.settled(last, unsent=ends.numbered(last)) == b"done"
    finally:
        thread.join()


@pytest.mark.parametrize(
    "packet",
    [
        b"\xc1",
        bytes(7),
        encode_answer(Answer(1, b"done")),
        encode_answer(Answer(3, b"done")),
        encode_answer(Answer(2 + 2**63, b"done")),
        encode_answer(Answer(OPENING, b"done")),
        encode_answer(Answer(2, bytes(MAX_CONTROL_BYTES + 1))),
        encode_answer(Answer(2, bytes(100_000)))[:PACKET_BYTES],
    ],
    ids=lambda packet: packet[:12].hex(),
)
@pytest.mark.parametrize("here", [True, False], ids=["that has come", "that is yet to come"])
def test_an_answer_to_something_else_ends_the_channel(ends: Ends, packet: bytes, here: bool) -> None:
    number = ends.sent()
    assert number == 2
    if not here:
        ends.worker.line.send(packet)
    with pytest.raises(ProtocolError):
        ends.settled(number, came=packet if here else b"")
    ends.assert_dead(ProtocolError)


def test_an_answer_to_a_call_that_is_not_sent_yet_ends_the_channel(ends: Ends) -> None:
    """It comes while there is no room for the call."""
    numbers = ends.line.numbers(10_000)
    filled = 0
    with socket.socket(fileno=os.dup(ends.line.descriptor)) as line, suppress(BlockingIOError):
        line.setblocking(False)
        while True:
            line.send(ends.numbered(numbers + filled))
            filled += 1
    ends.worker.answer(numbers + filled, b"done")
    with pytest.raises(ProtocolError, match="not under way"):
        ends.settled(numbers + filled, unsent=ends.numbered(numbers + filled))
    ends.assert_dead(ProtocolError)


def test_no_call_is_answered_twice(ends: Ends) -> None:
    number = ends.sent()
    for _ in range(2):
        ends.worker.answer(number, b"done")
    assert ends.settled(number) == b"done"
    with pytest.raises(ProtocolError, match="not under way"):
        ends.settled(ends.sent())
    ends.assert_dead(ProtocolError)


def test_a_deadline_ends_the_channel(ends: Ends) -> None:
    with pytest.raises(DeadlineExceeded):
        ends.settled(ends.sent(), deadline_s=0.01)
    ends.assert_dead(DeadlineExceeded)


@pytest.mark.parametrize("unsent", [False, True])
def test_a_worker_that_has_gone_ends_the_channel(ends: Ends, unsent: bool) -> None:
    number = ends.line.numbers(1) if unsent else ends.sent()
    ends.worker.line.close()
    with pytest.raises(WorkerLost):
        ends.settled(number, unsent=ends.numbered(number) if unsent else b"")
    ends.assert_dead(WorkerLost)


def test_what_it_said_before_it_left_is_heard(ends: Ends) -> None:
    number = ends.sent()
    ends.worker.answer(number, b"the last words")
    ends.worker.line.close()
    assert ends.settled(number) == b"the last words"


def test_a_channel_that_was_closed_settles_nothing(ends: Ends) -> None:
    number = ends.sent()
    with closing(ends.channel):
        pass
    with pytest.raises(ChannelClosed, match="it was closed"):
        ends.settled(number, came=encode_answer(Answer(number, b"done")))
