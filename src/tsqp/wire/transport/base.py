"""What every transport shares: limits on messages, waiting, and a death that is final."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod

from tsqp.errors import ChannelClosed, DeadlineExceeded, InputError, ProtocolError
from tsqp.wire.channel import MAX_TENSORS, DirectCalls, Frames, SlotsByReserve
from tsqp.wire.codec import MAX_CONTROL_BYTES
from tsqp.wire.transport.address import Address

CONNECT_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 60.0  # how long a full queue may stay full before the worker counts as stalled

_MAX_WAIT_S = 1_000_000.0  # in milliseconds it still fits the C int that poll takes


class Deadline:
    """A moment on the monotonic clock; None never comes."""

    def __init__(self, seconds: float | None) -> None:
        self._at = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self._at

    @property
    def remaining_s(self) -> float:
        """Seconds to wait now: never below 0, and bounded, so wait again until ``passed``."""
        return min(max(0.0, self._at - time.monotonic()), _MAX_WAIT_S)

    @property
    def remaining_ms(self) -> int:
        """The same in milliseconds, rounded up, so that a wait of under 1 ms blocks instead of spinning."""
        return math.ceil(self.remaining_s * 1000)


def check_limits(frames: Frames, max_frame_bytes: int) -> None:
    """Raise ProtocolError for a message that the line does not carry; called before sending and after receiving."""
    if len(frames.control) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a control frame of {len(frames.control)} bytes; the limit is {MAX_CONTROL_BYTES}")
    if len(frames.tensors) > MAX_TENSORS:
        raise ProtocolError(f"a message with {len(frames.tensors)} tensors; the limit is {MAX_TENSORS}")
    for tensor in frames.tensors:
        if tensor.nbytes > max_frame_bytes:
            raise ProtocolError(f"a tensor of {tensor.nbytes} bytes; the limit is {max_frame_bytes}")
        if not tensor.c_contiguous:
            raise ProtocolError("a tensor that is not contiguous in memory; make it contiguous first")


class BaseChannel(SlotsByReserve, ABC):
    """A Channel whose first failure is its last: afterwards every call raises ChannelClosed."""

    def __init__(self, address: Address, max_frame_bytes: int) -> None:
        self._address = address
        self._max_frame_bytes = max_frame_bytes
        self._end: str | None = None

    @property
    def transport(self) -> str:
        """``mem``, ``ipc``, ``tcp``, ``shm`` or ``cuda``."""
        return self._address.transport

    @property
    def address(self) -> str:
        """The address in its normal form."""
        return str(self._address)

    def reserve(self, size: int) -> memoryview:
        """See Channel.reserve."""
        self._check_alive()
        try:
            self._check_size(size)
            return self._reserve(size)
        except BaseException as error:
            self._die_of(error)
            raise

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        """See Channel.send."""
        self._check_alive()
        try:
            check_limits(frames, self._max_frame_bytes)
            self._check_size(reply_bytes)
            self._send(frames, reply_bytes)
        except BaseException as error:
            self._die_of(error)
            raise

    def arrived(self, within_s: float) -> bool:
        """See Channel.arrived."""
        self._check_alive()
        try:
            return self._arrived_within(Deadline(within_s))
        except BaseException as error:
            self._die_of(error)
            raise

    def receive(self, deadline_s: float) -> Frames:
        """See Channel.receive."""
        self._check_alive()
        try:
            return self._receive(deadline_s)
        except BaseException as error:
            self._die_of(error)
            raise

    def close(self) -> None:
        """See Channel.close."""
        self._die("it was closed")

    def _reserve(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    @abstractmethod
    def _send(self, frames: Frames, reply_bytes: int) -> None: ...

    @abstractmethod
    def _receive(self, deadline_s: float) -> Frames:
        """The next message, its limits checked."""

    @abstractmethod
    def _arrived_within(self, deadline: Deadline) -> bool:
        """Whether something is here by then: a message, or the end."""

    @abstractmethod
    def _release(self) -> None: ...

    def _nothing_came(self) -> DeadlineExceeded:
        return DeadlineExceeded("sent nothing before the deadline; it may still be busy", address=self.address)

    def _die(self, why: str) -> None:
        if self._end is None:
            self._end = why
            self._release()

    def _die_of(self, error: BaseException) -> None:
        """Also of a KeyboardInterrupt: half a message may have been moved, and the next one must not join it."""
        self._die(f"{type(error).__name__} ended it")

    def _check_alive(self) -> None:
        if self._end is not None:
            raise ChannelClosed(f"the channel to {self.address} is closed: {self._end}")

    def _check_size(self, size: int) -> None:
        """Of what this side asks for: nobody else has done anything wrong."""
        if not 0 <= size <= self._max_frame_bytes:
            raise InputError(f"a tensor of {size} bytes for {self._address}; the limit is {self._max_frame_bytes}")


class BaseListener:
    """What every Listener knows of itself: where it listens, and whether it was told to stop or was closed."""

    def __init__(self, address: Address, max_frame_bytes: int) -> None:
        self._address = address
        self._max_frame_bytes = max_frame_bytes
        self._interrupted = False
        self._closed = False

    @property
    def address(self) -> str:
        """See Listener.address."""
        return str(self._address)

    @property
    def interrupted(self) -> bool:
        """See Listener.interrupted."""
        return self._interrupted

    def memory(self, peer: bytes) -> memoryview | None:
        """See Listener.memory."""
        return None

    def direct(self, peer: bytes) -> DirectCalls | None:
        """See Listener.direct."""
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the listener on {self.address} is closed")
