"""What every transport promises, asked of each of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.commands import wait_until
from tests.wire.links import WAIT_S, Link, arrived, contents, tensor
from tsqp.errors import (
    AddressInUse,
    ChannelClosed,
    ChannelError,
    DeadlineExceeded,
    InputError,
    ProtocolError,
    WorkerLost,
    WorkerUnreachable,
)
from tsqp.wire.channel import MAX_TENSORS, Arrival, Channel, Departure, Frames, Listener
from tsqp.wire.codec import MAX_CONTROL_BYTES, decode_reply, decode_to_worker
from tsqp.wire.transport import connect

LIMIT = 10_000
TOO_LARGE = tensor(bytes(2 * LIMIT))


def test_a_message_and_its_answer_arrive_unchanged(channel: Channel, listener: Listener) -> None:
    channel.send(Frames(b"call", (tensor(b"one"), tensor(b"two"))), len(b"three"))
    arrival = arrived(listener)
    assert contents(arrival.frames) == (b"call", [b"one", b"two"])
    listener.send(arrival, Frames(b"reply", (tensor(b"three"),)))
    assert contents(channel.receive(WAIT_S)) == (b"reply", [b"three"])


def test_the_order_of_each_direction_is_kept(channel: Channel, listener: Listener) -> None:
    sent = [(str(number).encode(), [bytes(number)]) for number in range(1, 201)]
    for control, (payload,) in sent:
        channel.send(Frames(control, (tensor(payload),)), len(payload))
    arrivals = [arrived(listener) for _ in sent]
    assert [contents(arrival.frames) for arrival in arrivals] == sent
    for arrival in arrivals:
        listener.send(arrival, arrival.frames)
    assert [contents(channel.receive(WAIT_S)) for _ in sent] == sent


def test_replies_may_overtake_each_other(channel: Channel, listener: Listener) -> None:
    for number in range(8):
        channel.send(Frames(str(number).encode(), (tensor(bytes([number]) * 100_000),)), 100_000)
    for arrival in reversed([arrived(listener) for _ in range(8)]):
        listener.send(arrival, arrival.frames)
    for number in reversed(range(8)):
        assert contents(channel.receive(WAIT_S)) == (str(number).encode(), [bytes([number]) * 100_000])


def test_each_client_gets_its_own_replies(link: Link, listener: Listener) -> None:
    with closing(link.connect(listener)) as first, closing(link.connect(listener)) as second:
        first.send(Frames(b"first"))
        second.send(Frames(b"second"))
        for arrival in (arrived(listener), arrived(listener)):
            listener.send(arrival, arrival.frames)
        assert first.receive(WAIT_S).control == b"first"
        assert second.receive(WAIT_S).control == b"second"


def test_empty_tensors_and_an_empty_control_frame(channel: Channel, listener: Listener) -> None:
    channel.send(Frames(b"", (tensor(b""), tensor(b""))))
    arrival = arrived(listener)
    assert contents(arrival.frames) == (b"", [b"", b""])
    with pytest.raises(ProtocolError):
        decode_to_worker(arrival.frames.control)


def test_tensors_of_any_item_size_arrive_as_bytes(channel: Channel, listener: Listener) -> None:
    floats: Any = memoryview(bytearray(4 * 6)).cast("f", (2, 3))
    channel.send(Frames(b"", (floats,)))
    assert [part.nbytes for part in arrived(listener).frames.tensors] == [24]


def test_received_tensors_are_private_and_writable(channel: Channel, listener: Listener) -> None:
    for size in (16, 200_000):
        source = bytearray(size)
        channel.send(Frames(b"", (tensor(source),)), size)
        arrival = arrived(listener)
        listener.send(arrival, arrival.frames)
        (reply,) = channel.receive(WAIT_S).tensors
        reply[0] = 1
        assert source == bytes(size)


def test_64_mib_arrive_intact(channel: Channel, listener: Listener) -> None:
    payload = os.urandom(1 << 20) * 64
    channel.send(Frames(b"large", (tensor(payload),)), len(payload))
    arrival = arrived(listener)
    assert arrival.frames.tensors[0] == payload
    listener.send(arrival, arrival.frames)
    assert channel.receive(WAIT_S).tensors[0] == payload


@pytest.mark.parametrize(
    "frames",
    [
        Frames(b"", (TOO_LARGE,)),
        Frames(bytes(MAX_CONTROL_BYTES + 1)),
        Frames(b"", (tensor(b""),) * (MAX_TENSORS + 1)),
        Frames(b"", (tensor(bytes(100))[::2],)),
    ],
    ids=["tensor too large", "control too large", "too many tensors", "not contiguous"],
)
def test_what_is_over_the_limits_is_not_sent(link: Link, listener: Listener, frames: Frames) -> None:
    with closing(link.connect(listener, max_frame_bytes=LIMIT)) as channel:
        with pytest.raises(ProtocolError):
            channel.send(frames)
        with pytest.raises(ChannelClosed):
            channel.send(Frames(b""))


def test_a_worker_does_not_send_what_is_over_the_limits(link: Link) -> None:
    with closing(link.listen(max_frame_bytes=LIMIT)) as listener, closing(link.connect(listener)) as channel:
        channel.send(Frames(b""))
        arrival = arrived(listener)
        with pytest.raises(ProtocolError):
            listener.send(arrival, Frames(b"", (TOO_LARGE,)))
        listener.send(arrival, Frames(b"still here"))
        assert channel.receive(WAIT_S).control == b"still here"


def test_the_largest_allowed_tensor_passes(link: Link) -> None:
    with (
        closing(link.listen(max_frame_bytes=LIMIT)) as listener,
        closing(link.connect(listener, max_frame_bytes=LIMIT)) as channel,
    ):
        channel.send(Frames(b"", (tensor(bytes(LIMIT)),)), LIMIT)
        arrival = arrived(listener)
        listener.send(arrival, arrival.frames)
        assert channel.receive(WAIT_S).tensors[0].nbytes == LIMIT


def test_an_oversize_call_costs_its_connection_and_no_other(link: Link) -> None:
    with (
        closing(link.listen(max_frame_bytes=LIMIT)) as listener,
        closing(link.connect(listener)) as bad,
        closing(link.connect(listener)) as good,
    ):
        bad.send(Frames(b"bad", (TOO_LARGE,)))
        good.send(Frames(b"good"))
        assert arrived(listener).frames.control == b"good"
        assert not isinstance(listener.receive(0.05), Arrival)
        with pytest.raises(WorkerLost):
            bad.receive(WAIT_S)


def test_an_oversize_reply_ends_the_channel(link: Link, listener: Listener) -> None:
    if link.name.startswith(("shm", "cuda")):
        pytest.skip("no reply has a size of its own: test_shm.py")
    with closing(link.connect(listener, max_frame_bytes=LIMIT)) as channel:
        channel.send(Frames(b""))
        listener.send(arrived(listener), Frames(b"", (TOO_LARGE,)))
        with pytest.raises((WorkerLost, ProtocolError)):
            channel.receive(WAIT_S)
        with pytest.raises(ChannelClosed):
            channel.receive(WAIT_S)


def test_truncated_messages_arrive_as_they_are_and_fail_to_decode(channel: Channel, listener: Listener) -> None:
    channel.send(Frames(b"call"))
    listener.send(arrived(listener), Frames(b"\x92\xa4done"))  # no id, and no tensor
    frames = channel.receive(WAIT_S)
    assert not frames.tensors
    with pytest.raises(ProtocolError):
        decode_reply(frames.control)


def test_the_deadline_is_kept_and_is_final(channel: Channel) -> None:
    with pytest.raises(DeadlineExceeded, match=channel.transport):
        channel.receive(0.02)
    with pytest.raises(ChannelClosed):
        channel.receive(WAIT_S)


def test_a_deadline_of_zero_returns_what_is_there(channel: Channel) -> None:
    with pytest.raises(DeadlineExceeded):
        channel.receive(0.0)


def test_whether_something_has_arrived_can_be_asked_and_no_is_not_final(channel: Channel, listener: Listener) -> None:
    assert not channel.arrived(0.0)
    started = time.monotonic()
    assert not channel.arrived(0.05)
    assert time.monotonic() - started >= 0.05
    for control in (b"one", b"two"):
        channel.send(Frames(control, (tensor(control),)), len(control))
    for arrival in (arrived(listener), arrived(listener)):
        listener.send(arrival, arrival.frames)
    for control in (b"one", b"two"):
        assert channel.arrived(WAIT_S)
        assert channel.arrived(0.0)  # asking takes nothing away
        assert contents(channel.receive(0.0)) == (control, [control])
    assert not channel.arrived(0.0)


def test_who_asks_whether_something_has_arrived_learns_that_the_worker_closed(link: Link) -> None:
    listener = link.listen()
    with closing(link.connect(listener)) as channel:
        channel.send(Frames(b"call"))
        listener.send(arrived(listener), Frames(b"reply"))
        listener.close()
        assert channel.arrived(WAIT_S)
        assert channel.receive(WAIT_S).control == b"reply"
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S if channel.arrived(WAIT_S) else 0.0)
        with pytest.raises(ChannelClosed):
            channel.arrived(0.0)


def test_waiting_costs_no_processor_time(channel: Channel, listener: Listener) -> None:
    before = time.thread_time()  # of this thread alone: those of other tests may be at work
    assert listener.receive(0.3) is None
    with pytest.raises(DeadlineExceeded):
        channel.receive(0.3)
    assert time.thread_time() - before < 0.3


def test_an_infinite_deadline_is_allowed(channel: Channel, listener: Listener) -> None:
    channel.send(Frames(b"call"))
    arrival = listener.receive(float("inf"))
    assert isinstance(arrival, Arrival)
    listener.send(arrival, Frames(b"reply"))
    assert channel.receive(float("inf")).control == b"reply"


def test_a_waiting_client_learns_at_once_that_the_worker_closed(link: Link) -> None:
    listener = link.listen()
    with closing(link.connect(listener)) as channel:
        closer = threading.Timer(0.05, listener.close)
        started = time.monotonic()
        closer.start()
        with pytest.raises(WorkerLost, match=channel.address):
            channel.receive(WAIT_S)
        closer.join()
        assert time.monotonic() - started < WAIT_S / 2
        for use in (lambda: channel.receive(WAIT_S), lambda: channel.send(Frames(b""))):
            with pytest.raises(ChannelClosed, match="WorkerLost"):
                use()


def test_a_client_that_leaves_is_no_error(link: Link, listener: Listener) -> None:
    with closing(link.connect(listener)) as channel:
        channel.send(Frames(b"and gone"))
        arrival = arrived(listener)
    for _ in range(20):
        listener.send(arrival, arrival.frames)
    listener.send(Arrival(b"nobody", arrival.frames), arrival.frames)
    with closing(link.connect(listener)) as channel:
        channel.send(Frames(b"next"))
        assert arrived(listener).frames.control == b"next"


def test_the_end_of_a_connection_is_reported_where_that_is_promised(link: Link, listener: Listener) -> None:
    with closing(link.connect(listener)) as channel:
        channel.send(Frames(b"call"))
        peer = arrived(listener).peer
    reported = link.name in ("mem", "shm", "shm-file", "cuda")
    assert listener.receive(WAIT_S if reported else 0.05) == (Departure(peer) if reported else None)


def test_reserved_memory_is_sent_like_any_other(channel: Channel, listener: Listener) -> None:
    place = channel.reserve(100_000)
    assert (place.nbytes, place.readonly, place.format) == (100_000, False, "B")
    place[:] = b"r" * 100_000
    channel.send(Frames(b"", (place[1:11], channel.reserve(0))))
    assert contents(arrived(listener).frames) == (b"", [b"r" * 10, b""])


def test_memory_over_the_limit_is_not_reserved(link: Link, listener: Listener) -> None:
    with closing(link.connect(listener, max_frame_bytes=LIMIT)) as channel, pytest.raises(InputError):
        channel.reserve(LIMIT + 1)
    with closing(link.connect(listener, max_frame_bytes=LIMIT)) as channel, pytest.raises(InputError):
        channel.send(Frames(b""), LIMIT + 1)


def test_closing_twice_and_use_after_close(channel: Channel, listener: Listener) -> None:
    for _ in range(2):
        channel.close()
        listener.close()
    with pytest.raises(ChannelClosed):
        channel.send(Frames(b""))
    with pytest.raises(ChannelClosed):
        channel.receive(0.0)
    with pytest.raises(ChannelClosed):
        listener.receive(0.0)
    with pytest.raises(ChannelClosed):
        listener.send(Arrival(b"", Frames(b"")), Frames(b""))
    listener.interrupt()


def test_an_address_is_taken_once_and_free_after_close(link: Link) -> None:
    first = link.listen()
    port_kept = Link(link.name, lambda: first.address, link.worker_options, link.client_options)
    with pytest.raises(AddressInUse, match=first.address.replace("[", ".")):
        port_kept.listen()
    first.close()
    port_kept.listen().close()


def test_nobody_there(link: Link) -> None:
    listener = link.listen()
    listener.close()
    started = time.monotonic()
    with pytest.raises(WorkerUnreachable, match=listener.address):
        link.connect(listener, connect_timeout_s=WAIT_S)
    assert time.monotonic() - started < WAIT_S / 2, "it is known at once, and not when the time is over"


def test_transport_and_address_are_stated(link: Link, channel: Channel, listener: Listener) -> None:
    assert channel.address == listener.address
    assert channel.transport == {"curve": "tcp", "shm-file": "shm"}.get(link.name, link.name)
    assert not channel.address.endswith(":0")


def test_interrupt_before_receive_is_not_lost(listener: Listener) -> None:
    assert not listener.interrupted
    listener.interrupt()
    assert listener.receive(None) is None
    assert listener.receive(None) is None
    assert listener.interrupted


def test_interrupt_from_another_thread(listener: Listener) -> None:
    interrupter = threading.Timer(0.02, listener.interrupt)
    interrupter.start()
    assert listener.receive(None) is None
    interrupter.join()


def test_interrupt_from_a_signal_handler(listener: Listener) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: listener.interrupt())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert listener.receive(None) is None
        assert listener.interrupted
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_exception_in_the_middle_of_a_wait_ends_the_channel(channel: Channel) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            channel.receive(WAIT_S)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ChannelClosed, match="KeyboardInterrupt"):
        channel.receive(WAIT_S)


def test_a_hundred_connections_leave_no_descriptor(link: Link, listener: Listener) -> None:
    def connect_once() -> None:
        with closing(link.connect(listener)) as channel:
            channel.send(Frames(b"call", (tensor(bytes(100_000)),)), 100_000)
            arrival = arrived(listener)
            listener.send(arrival, arrival.frames)
            channel.receive(WAIT_S)

    leaves_no_descriptor(connect_once, times=100)


def test_failed_connections_and_listeners_leave_no_descriptor(link: Link) -> None:
    def fail_once() -> None:
        listener = link.listen()
        with pytest.raises(AddressInUse):
            Link(link.name, lambda: listener.address, link.worker_options, {}).listen()
        listener.close()
        with pytest.raises(WorkerUnreachable):
            link.connect(listener)

    leaves_no_descriptor(fail_once, times=10)


def leaves_no_descriptor(action: Callable[[], None], times: int) -> None:
    """One that is left each time makes ``times`` of them; a few may be closing still, here and of other tests."""
    action()  # what is made once and kept, such as ZeroMQ's own threads
    before = descriptors()
    for _ in range(times):
        action()
    wait_until(lambda: descriptors() - before < times // 2)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_errors_are_one_line_and_hold_no_payload(link: Link, listener: Listener) -> None:
    secret = b"a secret that no log may hold"
    with closing(link.connect(listener, max_frame_bytes=10)) as channel:
        with pytest.raises(ChannelError) as caught:
            channel.send(Frames(b"", (tensor(secret),)))
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_scheme_opens_nothing() -> None:
    with pytest.raises(ChannelError, match="malformed address"):
        connect("http://127.0.0.1:80")


def test_the_memory_of_a_connection_is_where_its_tensors_lie_if_there_is_such(
    link: Link, listener: Listener, channel: Channel
) -> None:
    channel.send(Frames(b"x", (tensor(b"here"),)), 4)
    arrival = arrived(listener)
    memory = listener.memory(arrival.peer)
    assert (memory is not None) == link.name.startswith("shm")
    if memory is not None:
        at = bytes(memory[:4096]).find(b"here")
        memory[at] = ord("H")
        assert bytes(arrival.frames.tensors[0]) == b"Here"
    assert listener.memory(b"nobody") is None
