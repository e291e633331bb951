"""A channel that notes what goes over it."""

from __future__ import annotations

from tsqp.wire.channel import Channel, Frames, SlotsByReserve

Sent = tuple[bytes, tuple[int, ...], int]  # control frame, sizes of payloads, size of the product asked for


class Recorder(SlotsByReserve):
    """A channel that notes what goes over it."""

    def __init__(self, channel: Channel) -> None:
        self.sent: list[Sent] = []
        self.payloads: list[bytes] = []
        self.received: list[tuple[bytes, tuple[int, ...]]] = []
        self.transport, self.address = channel.transport, channel.address
        self.close = channel.close
        self._channel = channel

    def reserve(self, size: int) -> memoryview:
        return self._channel.reserve(size)

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self.sent.append((frames.control, tuple(t.nbytes for t in frames.tensors), reply_bytes))
        self.payloads += [bytes(tensor) for tensor in frames.tensors]
        self._channel.send(frames, reply_bytes)

    def arrived(self, within_s: float) -> bool:
        return self._channel.arrived(within_s)

    def receive(self, deadline_s: float) -> Frames:
        frames = self._channel.receive(deadline_s)
        self.received.append((bytes(frames.control), tuple(t.nbytes for t in frames.tensors)))
        return frames
