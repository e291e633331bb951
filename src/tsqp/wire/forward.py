"""A channel in front of another, for whoever changes a part of what it does."""

from __future__ import annotations

from tsqp.wire.channel import Channel, Frames, SlotsByReserve


class ForwardingChannel(SlotsByReserve):
    """See Channel: everything is passed on, calls from slots by ``send``: nothing passes a change of that."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def transport(self) -> str:
        return self._channel.transport

    @property
    def address(self) -> str:
        return self._channel.address

    def reserve(self, size: int) -> memoryview:
        return self._channel.reserve(size)

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        self._channel.send(frames, reply_bytes)

    def arrived(self, within_s: float) -> bool:
        return self._channel.arrived(within_s)

    def receive(self, deadline_s: float) -> Frames:
        return self._channel.receive(deadline_s)

    def close(self) -> None:
        self._channel.close()
