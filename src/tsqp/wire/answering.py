"""The worker's end of ``exchange.py``: the next request of a shared-memory connection, and its answer, compiled.

What ``listener.py`` and ``connection.py`` of ``transport/shm`` do for a message, for the plain case alone: a packet
comes, it is one of some that are known but for their two numbers, and the answer says that it is done. Waiting is as
there, and whatever else happens is left as it is and reported.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel
from tsqp.wire.exchange import (
    AT_ONCE,
    DESCRIPTOR,
    DONE_BYTES,
    LINE_NUMBERS,
    PATIENCE,
    READABLE,
    SEQUENCE_BYTES,
    number,
    poll,
    receive,
    receive_soon,
    send,
)

NOTHING, OTHERS = -1, -2  # instead of a size: for long; but there may be something of others
# Of a line, after what ``exchange`` knows: a descriptor that can be read when anything is here, this connection's too.
BELL = LINE_NUMBERS
LISTENING_NUMBERS = LINE_NUMBERS + 1
ANSWER_BYTES = 8 + DONE_BYTES + 9 + 9

_ID_END = np.int64(2**62)  # see ``messages.CallId``
_WIDE = np.uint8(0xCF)  # a whole number of MessagePack that has 8 bytes, the highest first
_WIDE_BYTES = np.int64(9)
_LOW = np.int64(0xFF)


@kernel
def await_request(line, packet, clock):  # type: ignore[no-untyped-def]
    """The size of the packet that has come into ``packet``, uint8 (any,); 0: the client has gone; NOTHING; OTHERS."""
    came = receive_soon(line, packet, False, clock)
    if came >= 0:
        return came
    socket = np.int32(line[DESCRIPTOR])
    asked = np.empty(2, np.int64)  # two structs pollfd
    asked[0] = np.int64(socket) | (READABLE << np.int64(32))
    asked[1] = line[BELL] | (READABLE << np.int64(32))
    if poll(asked.ctypes.data, 2, PATIENCE) <= 0:
        return np.int64(NOTHING)
    if asked[0] >> np.int64(48):  # what has happened there
        return max(receive(socket, packet.ctypes.data, len(packet), AT_ONCE), np.int64(NOTHING))
    return np.int64(OTHERS)


@kernel
def call_id(packet, size, known, head, rest):  # type: ignore[no-untyped-def]
    """The id of the call in a packet of ``size`` bytes, if all around its two numbers is as in ``known``; otherwise -1.

    known uint8 (any,): ``head`` bytes between the packet's number and the call's, then ``rest`` bytes after that.
    """
    at = SEQUENCE_BYTES + head
    if size <= at + rest:
        return np.int64(-1)
    found = number(packet, at, size)
    if found < 0 or found >= _ID_END:
        return np.int64(-1)
    first = np.int64(packet[at])
    width = np.int64(1) if first < 0x80 else 1 + (np.int64(1) << (first - np.int64(0xCC)))
    if size != at + width + rest:
        return np.int64(-1)
    for i in range(rest):
        if packet[at + width + i] != known[head + i]:
            return np.int64(-1)
    for i in range(head):
        if packet[SEQUENCE_BYTES + i] != known[i]:
            return np.int64(-1)
    return found


@kernel
def _put_wide(value, out, at):  # type: ignore[no-untyped-def]
    out[at] = _WIDE
    for i in range(1, _WIDE_BYTES):
        out[at + i] = np.uint8((value >> (np.int64(8) * (_WIDE_BYTES - 1 - i))) & _LOW)


@kernel
def say_done(line, packet, done, found, busy_ns, answer):  # type: ignore[no-untyped-def]
    """Answer the packet: call ``found`` is done. Whether that could be said.

    done uint8 (DONE_BYTES,) is how such a message begins; answer uint8 (ANSWER_BYTES,) is room.
    """
    for i in range(SEQUENCE_BYTES):
        answer[i] = packet[i]
    for i in range(DONE_BYTES):
        answer[SEQUENCE_BYTES + i] = done[i]
    _put_wide(found, answer, SEQUENCE_BYTES + DONE_BYTES)
    _put_wide(busy_ns, answer, SEQUENCE_BYTES + DONE_BYTES + _WIDE_BYTES)
    return send(np.int32(line[DESCRIPTOR]), answer.ctypes.data, ANSWER_BYTES, AT_ONCE) == ANSWER_BYTES
