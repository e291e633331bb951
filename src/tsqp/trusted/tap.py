"""A copy of what is sent to the worker for one request, taken as it goes out: for whoever's request it is.

Covers: the rows of that request and of no other; every call of its passes, or that there was one
(tests/trusted/test_tap.py, tests/api/test_taps.py). Does not cover: over shm, what a worker writes into its own memory
between the masking of a row and its copy, which is the worker's to write. Assumes: the engine puts no row of another
request into a pass that a tap listens to, and has its calls go through the channel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from tsqp.config.dtype import SCALE_BYTES, WireDtype
from tsqp.wire.channel import Channel, DirectLine, Frames
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.messages import Hello, Linear, Product, ToWorker
from tsqp.wire.slot import Slot

KEEP_BYTES = 16 << 20  # of payloads; beside them the rows of at most some hundred tokens


@dataclass(frozen=True)
class Seen:
    """One message that was sent. ``payloads`` are copies; None where they were counted only."""

    message: ToWorker
    payloads: tuple[bytes, ...] | None


class Taps:
    """The taps of one run. At most one listens at a time, and its channels are all that a tap can see.

    ``checks``: how many products this side has checked so far.
    """

    def __init__(self, checks: Callable[[], int] = lambda: 0) -> None:
        self.checks = checks
        self.current: Tap | None = None  # the one that listens

    def wrap(self, channel: Channel) -> Channel:
        """The same channel, with what the tap needs in front of it. A direct line is passed on, and is not seen."""
        return TappedChannel(channel, self)

    def new(self, wanted: range = range(0), keep_bytes: int = KEEP_BYTES) -> Tap:
        """A tap for one request. ``wanted``: positions of the tokens that are to be looked for."""
        return Tap(self, wanted, keep_bytes)


class Tap:
    """What was sent for one request so far, in the order sent: also what had to be sent again, to another worker.

    ``messages``: those whose payloads were kept, ``kept_bytes`` in all, each after the Hello of its connection.
    ``rows``: cut from the inputs of layer 0, those at the positions ``wanted``, each once and in order, whatever else
    was kept. ``bytes_seen``: control frames and payloads of all ``calls``, kept or not. ``checks``: of their products,
    by this side.
    """

    def __init__(self, taps: Taps, wanted: range, keep_bytes: int) -> None:
        self.messages: list[Seen] = []
        self.rows: list[Seen] = []
        self.bytes_seen = self.kept_bytes = self.calls = self.checks = 0
        self._taps = taps
        self._keep_bytes = keep_bytes
        self._wanted = wanted  # those that have not come yet
        self._position = 0  # of the next row at the input of layer 0
        self._hello: bytes | None = None  # of the connection of the last message
        self._wire: WireDtype = "float32"
        self._closed = False
        self._lock = threading.Lock()  # of what is kept: ``close`` may come from another thread

    @contextmanager
    def listening(self, position: int) -> Iterator[None]:
        """Take a copy of what is sent meanwhile: a pass whose first row is at this position, and nothing else."""
        self._position, before = position, self._taps.checks()
        self._taps.current = self
        try:
            yield
        finally:
            self._taps.current = None
            self.checks += self._taps.checks() - before

    def record(self, frames: Frames, hello: bytes) -> None:
        """Copy one message that is about to be sent, on the connection that began with ``hello``."""
        message = decode_to_worker(frames.control)
        size = sum(tensor.nbytes for tensor in frames.tensors)
        with self._lock:
            self.calls += 1
            self.bytes_seen += len(frames.control) + size
            if self._closed:
                return
            self._note(hello)
            if isinstance(message, Linear | Product) and (message.group, message.layer) == ("qkv", 0):
                self._cut(message, frames.tensors[0])
            if self.kept_bytes + size <= self._keep_bytes:
                self.messages.append(Seen(message, tuple(bytes(tensor) for tensor in frames.tensors)))
                self.kept_bytes += size

    def close(self) -> None:
        """Let go of all copies, and take none from now on. Any thread may call it; closing twice is allowed."""
        with self._lock:
            self._closed = True
            self.messages, self.rows, self.kept_bytes = [], [], 0

    def _note(self, hello: bytes) -> None:
        """Whoever reads the messages has to know in which format floats are sent. No user's text is in a Hello."""
        if hello != self._hello:
            greeting = decode_to_worker(hello)
            if isinstance(greeting, Hello):
                self._wire = greeting.wire_dtype
            self._hello = hello
            self.messages.append(Seen(greeting, ()))

    def _cut(self, message: Linear | Product, payload: memoryview) -> None:
        """Keep those of the rows that are wanted next. Rows that are sent a second time are passed over."""
        first, end = self._position, self._position + message.rows
        self._position = end
        low, high = max(first, self._wanted.start), min(end, self._wanted.stop)
        if low != self._wanted.start or low >= high:  # those before them have not come: never with passes in order
            return
        self._wanted = range(high, self._wanted.stop)
        cut = msgspec.structs.replace(message, rows=high - low)
        self.rows.append(Seen(cut, (self._rows_of(message, payload, low - first, high - first),)))

    def _rows_of(self, message: Linear | Product, payload: memoryview, low: int, high: int) -> bytes:
        """Rows of a payload as a payload of its own. Of int8 all scales come before all values."""
        if isinstance(message, Product) or self._wire != "int8":
            each = payload.nbytes // message.rows
            return bytes(payload[low * each : high * each])
        values = payload[SCALE_BYTES * message.rows :]
        each = values.nbytes // message.rows
        return bytes(payload[SCALE_BYTES * low : SCALE_BYTES * high]) + bytes(values[low * each : high * each])


class TappedChannel(ForwardingChannel):
    """See Channel: all is passed on as it is. What is sent while a tap listens is copied first."""

    def __init__(self, channel: Channel, taps: Taps) -> None:
        super().__init__(channel)
        self._taps = taps
        self._hello: bytes | None = None  # the first message of any connection

    def slot(self, size: int, reply_bytes: int) -> Slot:
        return self._channel.slot(size, reply_bytes)

    def send_from(self, slot: Slot, control: bytes) -> None:
        self._look(control, (slot.tensor,))
        self._channel.send_from(slot, control)

    def direct(self) -> DirectLine | None:
        return self._channel.direct()

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self._look(*frames)
        self._channel.send(frames, reply_bytes)

    def _look(self, control: bytes, tensors: Sequence[memoryview]) -> None:
        if self._hello is None:
            self._hello = control
        tap = self._taps.current
        if tap is not None:
            tap.record(Frames(control, tensors), self._hello)
