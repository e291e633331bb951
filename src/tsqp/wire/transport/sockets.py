"""ZeroMQ sockets: the options that every one of ours has, and messages in and out of them."""

from __future__ import annotations

import zmq

from tsqp.errors import ProtocolError
from tsqp.wire.channel import MAX_TENSORS, Frames
from tsqp.wire.codec import MAX_CONTROL_BYTES
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import check_limits
from tsqp.wire.transport.keys import KeyPair

MAX_QUEUED_MESSAGES = 1024  # each way and connection, inside ZeroMQ
MOST_PARTS = 1 + MAX_TENSORS  # of one message, the envelope aside

_CURVE_OVERHEAD_BYTES = 64  # an encrypted frame carries a name, a nonce, a tag and flags: 33 bytes
_COPY_BELOW_BYTES = 64 * 1024  # copying less than this is cheaper than sharing it
_HEARTBEAT_INTERVAL_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 30_000


def configure(socket: zmq.Socket[bytes], endpoint: Address, max_frame_bytes: int) -> None:
    """Options for either end, before bind or connect."""
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = MAX_QUEUED_MESSAGES
    # ZeroMQ reads a frame's length, compares, and drops the connection before it allocates anything.
    socket.maxmsgsize = max(max_frame_bytes, MAX_CONTROL_BYTES) + _CURVE_OVERHEAD_BYTES
    socket.copy_threshold = _COPY_BELOW_BYTES
    if endpoint.transport == "tcp":
        socket.ipv6 = ":" in endpoint.host
        if not endpoint.is_loopback:
            _expect_a_pulse(socket)


def use_keys(socket: zmq.Socket[bytes], own: KeyPair) -> None:
    """This end's identity for CURVE."""
    socket.curve_publickey = own.public
    socket.curve_secretkey = own.secret


def send_parts(socket: zmq.Socket[bytes], envelope: tuple[bytes, ...], frames: Frames) -> None:
    """Queue one message, large tensors without a copy. Raises zmq.Again where that would wait."""
    parts: list[bytes | memoryview] = [*envelope, frames.control, *frames.tensors]
    socket.send_multipart(parts, flags=zmq.DONTWAIT, copy=False, track=False)


def receive_parts(socket: zmq.Socket[bytes], most: int) -> list[zmq.Frame]:
    """All parts of the next message. Raises zmq.Again where there is none, ProtocolError for more than ``most``.

    Messages arrive whole or not at all, so this never waits, and always leaves the socket between two messages.
    """
    parts: list[zmq.Frame] = []
    surplus = 0
    while True:
        part = socket.recv(zmq.DONTWAIT, copy=False)
        if len(parts) < most:
            parts.append(part)
        else:
            surplus += 1
        if not part.more:
            break
    if surplus:
        raise ProtocolError(f"a message of {most + surplus} parts; the limit is {most}")
    return parts


def to_frames(parts: list[zmq.Frame], max_frame_bytes: int) -> Frames:
    """Parts without an envelope as a message, after its limits are checked. Raises ProtocolError."""
    if not parts:
        raise ProtocolError("a message without a control frame")
    control, *tensors = parts
    if len(control) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a control frame of {len(control)} bytes; the limit is {MAX_CONTROL_BYTES}")
    frames = Frames(control.bytes, tuple(_private(tensor) for tensor in tensors))
    check_limits(frames, max_frame_bytes)
    return frames


def _private(tensor: zmq.Frame) -> memoryview:
    """Memory that only the receiver has.

    ZeroMQ gives a large frame an allocation of its own. Small ones lie side by side in its read buffer at any
    alignment, so they move: the copy is aligned, and does not keep its neighbours' memory alive.
    """
    return tensor.buffer if len(tensor) >= _COPY_BELOW_BYTES else memoryview(bytearray(tensor.buffer))


def _expect_a_pulse(socket: zmq.Socket[bytes]) -> None:
    """Notice a host that vanished without closing its connections; a busy worker's pulse is kept by ZeroMQ's thread."""
    socket.heartbeat_ivl = _HEARTBEAT_INTERVAL_MS
    socket.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
