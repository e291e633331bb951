"""A copy of everything that is sent on a connection.

Covers: every control frame and every payload, as its bytes are at the moment they are sent (test_capture.py).
Does not cover: over shm, what lay in reserved memory before that and was overwritten. Assumes: nothing is sent past
the channel that was wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tsqp.trusted.tap import Seen
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.messages import Linear, Product
from tsqp.wire.transport import connect

KEEP_BYTES = 1 << 26  # of payloads; those of qkv are kept beyond it, as far as the longest prompt of an audit goes


@dataclass
class Capture:
    """All messages of one connection, in the order sent. ``bytes_seen``: control frames and payloads."""

    keep_bytes: int = KEEP_BYTES
    messages: list[Seen] = field(default_factory=list)
    bytes_seen: int = 0
    _kept: int = 0

    def connect(self, address: str, **options: Any) -> Channel:
        """A channel to ``address`` with this capture in front of it, as ``LLM`` takes it."""
        return self.wrap(connect(address, **options))

    def wrap(self, channel: Channel) -> Channel:
        """The same channel, with this capture in front of it."""
        return CapturedChannel(channel, self)

    def record(self, frames: Frames) -> None:
        """Copy one message that is about to be sent."""
        message = decode_to_worker(frames.control)
        size = sum(tensor.nbytes for tensor in frames.tensors)
        attacked = isinstance(message, Linear | Product) and message.group == "qkv"
        keep = attacked or self._kept + size <= self.keep_bytes
        payloads = tuple(bytes(tensor) for tensor in frames.tensors) if keep else None
        self.messages.append(Seen(message, payloads))
        self.bytes_seen += len(frames.control) + size
        self._kept += size if keep else 0


class Captured(NamedTuple):
    """One run: what its worker was sent, and its dealer where it had one."""

    worker: Capture
    dealer: Capture | None
    dealer_address: str | None = None

    def connect(self, address: str, **options: Any) -> Channel:
        """A channel with the right capture in front of it."""
        capture = self.dealer if self.dealer is not None and address == self.dealer_address else self.worker
        return capture.connect(address, **options)


class CapturedChannel(ForwardingChannel):
    """See Channel: everything is passed on, and what is sent is recorded first."""

    def __init__(self, channel: Channel, capture: Capture) -> None:
        super().__init__(channel)
        self._capture = capture

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self._capture.record(frames)
        super().send(frames, reply_bytes)
