"""A tap has what is sent while it listens, as it was when it was sent, and within its bound."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.arith.quantise import quantise_rows
from tsqp.trusted.tap import Tap, Taps
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Linear, Product
from tsqp.wire.payload import wire_format
from tsqp.wire.slot import Slot

COLUMNS = 6
HELLO = Hello(PROTOCOL_VERSION, "0" * 64, "float32", "field")
DOWN = encode(Product(1, "down", 0, 1, 4))


class Line:
    """A channel that keeps what it is given, and what it was when it was given."""

    transport, address = "mem", "mem:line"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, list[bytes], int]] = []
        self.slots: list[Slot] = []
        self.line = object()
        self.fails = False

    def reserve(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        if self.fails:
            raise ValueError
        self.sent.append((frames.control, [bytes(tensor) for tensor in frames.tensors], reply_bytes))

    def slot(self, size: int, reply_bytes: int) -> Slot:
        self.slots.append(Slot(self.reserve(size), reply_bytes))
        return self.slots[-1]

    def send_from(self, slot: Slot, control: bytes) -> None:
        assert slot in self.slots, "memory of its own"
        self.send(Frames(control, (slot.tensor,)), slot.reply_bytes)

    def direct(self) -> Any:
        return self.line

    def arrived(self, within_s: float) -> bool:
        return within_s == 7.0

    def receive(self, deadline_s: float) -> Frames:
        return Frames(b"%d" % deadline_s)

    def close(self) -> None: ...


def greeted(taps: Taps, hello: Hello = HELLO) -> tuple[Any, Line]:
    """A channel that may be tapped, after its handshake, and what lies behind it."""
    line = Line()
    channel = taps.wrap(line)
    channel.send(Frames(encode(hello)))
    return channel, line


def payloads(tap: Tap) -> list[bytes]:
    return [payload for seen in tap.messages for payload in seen.payloads or ()]


def test_all_is_passed_on_with_and_without_a_tap() -> None:
    taps = Taps()
    channel, line = greeted(taps)
    assert channel.direct() is line.line
    assert channel.receive(7.0).control == b"7"
    assert channel.arrived(7.0)
    slot = channel.slot(4, 16)
    for _ in range(2):
        slot.tensor[:] = b"slot"
        channel.send_from(slot, DOWN)
        channel.send(Frames(DOWN, [memoryview(b"send")]), 8)
        assert line.sent[-2:] == [(DOWN, [b"slot"], 16), (DOWN, [b"send"], 8)]
        taps.current = taps.new()


def test_only_what_is_sent_while_it_listens_is_in_it() -> None:
    taps = Taps()
    channel, _ = greeted(taps)
    tap, other = taps.new(), taps.new()
    channel.send(Frames(DOWN, [memoryview(b"before")]))
    slot = channel.slot(6, 8)
    with tap.listening(0):
        slot.tensor[:] = b"during"
        channel.send_from(slot, DOWN)
        slot.tensor[:] = b"later "
        channel.send(Frames(DOWN, [memoryview(b"too")]))
    channel.send(Frames(DOWN, [memoryview(b"after")]))
    with pytest.raises(ZeroDivisionError), other.listening(0):
        raise ZeroDivisionError
    channel.send_from(slot, DOWN)
    assert payloads(tap) == [b"during", b"too"]
    assert (tap.calls, tap.bytes_seen, tap.kept_bytes) == (2, 2 * len(DOWN) + 9, 9)
    assert not other.messages
    assert tap.messages[0].message == HELLO


def test_each_connection_has_its_hello_in_front_of_what_was_sent_on_it() -> None:
    taps = Taps()
    first, _ = greeted(taps)
    again = Hello(PROTOCOL_VERSION, "1" * 64, "float32", "field")
    second, _ = greeted(taps, again)
    tap = taps.new()
    for channel in (first, first, second):
        with tap.listening(0):
            channel.send(Frames(DOWN, [memoryview(b"x")]))
    assert [seen.message for seen in tap.messages if isinstance(seen.message, Hello)] == [HELLO, again]
    assert isinstance(tap.messages[3].message, Hello)


def test_beyond_its_bound_a_payload_is_counted_and_no_trace_of_it_kept() -> None:
    taps = Taps()
    channel, _ = greeted(taps)
    tap = taps.new(keep_bytes=10)
    with tap.listening(0):
        for size in (6, 6, 4, 1):
            channel.send(Frames(DOWN, [memoryview(bytes(size))]))
    assert [len(payload) for payload in payloads(tap)] == [6, 4]
    assert len(tap.messages) == 3
    assert (tap.kept_bytes, tap.calls, tap.bytes_seen) == (10, 4, 4 * len(DOWN) + 17)


def test_closed_it_keeps_nothing_whatever_still_comes() -> None:
    taps = Taps()
    channel, _ = greeted(taps)
    tap = taps.new(range(2))
    qkv = encode(Product(1, "qkv", 0, 1, 4))
    with tap.listening(0):
        channel.send(Frames(qkv, [memoryview(bytes(8))]))
        tap.close()
        tap.close()
        channel.send(Frames(qkv, [memoryview(bytes(8))]))
    assert (tap.messages, tap.rows, tap.kept_bytes, tap.calls) == ([], [], 0, 2)


def test_checks_are_those_of_its_own_passes_also_of_one_that_fails() -> None:
    done = 0
    taps = Taps(lambda: done)
    tap = taps.new()
    done = 5
    with tap.listening(0):
        done += 3
    done += 100
    with suppress(ValueError), tap.listening(3):
        done += 1
        raise ValueError
    assert tap.checks == 4
    assert taps.current is None


PASSES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), max_size=8)  # calls of each pass: their rows


@given(passes=PASSES, wanted=st.tuples(st.integers(0, 30), st.integers(0, 12)), data=st.data())
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8", "field"])
def test_the_rows_that_are_wanted_are_cut_out_once_however_they_come(
    wire: Any, passes: list[list[int]], wanted: tuple[int, int], data: st.DataObject
) -> None:
    """Passes come in order; any may be lost half way, and then its rows come again, in other parts."""
    rows = torch.arange(1, 1 + 200 * COLUMNS, dtype=torch.float32).view(200, COLUMNS) / 8
    first, count = wanted
    taps = Taps()
    hello = Hello(PROTOCOL_VERSION, "0" * 64, "float32" if wire == "field" else wire, "float")
    channel, _ = greeted(taps, hello)
    tap = taps.new(range(first, first + count), keep_bytes=0)
    position = reached = 0
    for calls in passes:
        lost = data.draw(st.booleans())
        with tap.listening(position):
            at = position
            for size in calls:
                part = rows[at : at + size]
                channel.send(Frames(*message_of(part, wire, layer=0)))
                channel.send(Frames(*message_of(-part, wire, layer=1)))
                at += size
        reached = max(reached, at)
        position = position if lost else at
    assert not payloads(tap)
    expected = rows[first : min(first + count, max(first, reached))]
    assert torch.equal(torch.cat([read(seen, wire) for seen in tap.rows] or [expected[:0]]), through(expected, wire))


def message_of(rows: torch.Tensor, wire: Any, layer: int) -> tuple[bytes, list[memoryview]]:
    if wire == "field":
        payload = memoryview(rows.to(torch.int32).numpy().astype("<u4").tobytes())
        return encode(Product(1, "qkv", layer, len(rows), 4)), [payload]
    form = wire_format(wire)
    place = memoryview(bytearray(form.size(tuple(rows.shape))))
    form.write(rows, place)
    return encode(Linear(1, "qkv", layer, None, len(rows))), [place]


def read(seen: Any, wire: Any) -> torch.Tensor:
    (payload,) = seen.payloads
    if wire == "field":
        return torch.from_numpy(np.frombuffer(payload, "<u4").reshape(seen.message.rows, -1).astype(np.float32))
    return wire_format(wire).read(memoryview(bytearray(payload)), (seen.message.rows, COLUMNS), torch.float32)


def through(rows: torch.Tensor, wire: Any) -> torch.Tensor:
    """What arrives of rows that are sent."""
    if wire == "field":
        return rows.to(torch.int32).float()
    if wire == "int8":
        quantised = quantise_rows(rows)
        return quantised.values * quantised.scales[:, None]
    return rows.to(getattr(torch, wire)).float()
