"""One call and its answer over a shared-memory connection, as compiled code: for steps that call without Python.

What ``transport/shm/channel.py`` does for a message, for the plain case alone: the packet is sent at once, one answer
comes soon, it names that call and says that it is done. Everything else (no room, a long wait, an error, another
answer) is left as it is and reported, for the channel to deal with. Waiting is as ``transport/shm/spin.py`` says.

The functions of the system are those of Linux with 64 bits; a failed one reports and sets nothing here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from tsqp.arith.jit import kernel

ANSWERED, UNSENT, UNANSWERED, UNUSUAL = range(4)
# Of a line, int64 (5,): its socket; how long to spin; a round of how long ends that, for how long; until when it has.
DESCRIPTOR, SPIN_NS, CROWDED_NS, REST_NS, REST_UNTIL = range(5)
LINE_NUMBERS = 5
PATIENCE_MS = 50  # a longer wait is left to Python, which looks after signals
DONE_BYTES = 6  # how a ``Done`` begins: the array's length, and the tag
SHORT_ANSWER = 64  # bytes of a packet that says that a call is done; there is more in no such packet

send: Any = types.ExternalFunction("send", types.int64(types.int32, types.intp, types.int64, types.int32))
receive: Any = types.ExternalFunction("recv", types.int64(types.int32, types.intp, types.int64, types.int32))
poll: Any = types.ExternalFunction("poll", types.int32(types.intp, types.int64, types.int32))
give_way: Any = types.ExternalFunction("sched_yield", types.int32())
_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))

_MONOTONIC = np.int32(1)
AT_ONCE = np.int32(0x40 | 0x4000)  # MSG_DONTWAIT, MSG_NOSIGNAL
READABLE = np.int64(1)  # POLLIN
PATIENCE = np.int32(PATIENCE_MS)
_SECOND_NS = np.int64(10**9)
SEQUENCE_BYTES = np.int64(8)


@kernel
def now(clock):  # type: ignore[no-untyped-def]
    """Nanoseconds of the clock of ``time.perf_counter``; clock int64 (2,) is room for its two parts."""
    _clock(_MONOTONIC, clock.ctypes.data)
    return clock[0] * _SECOND_NS + clock[1]


@kernel
def number(answer, at, end):  # type: ignore[no-untyped-def]
    """The whole number of MessagePack that begins at ``at``, before ``end``; -1 where there is none."""
    first = np.int64(answer[at]) if at < end else np.int64(0xFF)
    if first < 0x80:
        return first
    count = np.int64(1) << (first - np.int64(0xCC))  # bytes, highest first
    if first < 0xCC or first > 0xCF or at + count >= end:
        return np.int64(-1)
    number = np.int64(0)
    for i in range(count):
        number = (number << np.int64(8)) | np.int64(answer[at + 1 + i])
    return number


@kernel
def exchange(line, packet, size, sequence, done, call_id, answer, slow, clock):  # type: ignore[no-untyped-def]
    """Send ``size`` bytes at the address ``packet``, and await what comes: a verdict, and the bytes in ``answer``.

    ANSWERED: ``answer`` is short, names ``sequence``, and goes on with ``done``, uint8 (n,), and ``call_id``. UNSENT:
    nothing has happened. UNANSWERED: nothing has come yet, or never will. UNUSUAL: something else came. ``answer``
    uint8 (m,) has room for any packet. slow uint8 (1,): whether the last such call took so long that spinning for this
    one is a waste.
    """
    if send(np.int32(line[DESCRIPTOR]), packet, size, AT_ONCE) != size:
        return UNSENT, 0
    came = _await(line, answer, slow, clock)
    if came <= 0:
        return UNANSWERED, 0
    if came > SHORT_ANSWER or came < SEQUENCE_BYTES + len(done):
        return UNUSUAL, came
    named = np.int64(0)
    for i in range(SEQUENCE_BYTES):
        named |= np.int64(answer[i]) << np.int64(8 * i)
    if named != sequence:
        return UNUSUAL, came
    for i in range(len(done)):
        if answer[SEQUENCE_BYTES + i] != done[i]:
            return UNUSUAL, came
    if number(answer, SEQUENCE_BYTES + len(done), came) != call_id:
        return UNUSUAL, came
    return ANSWERED, came


@kernel
def receive_soon(line, packet, once, clock):  # type: ignore[no-untyped-def]
    """The size of what comes into ``packet``, uint8 (any,), before it is time to sleep; 0: the line has ended; -1.

    ``once``: after one look.
    """
    socket, moment = np.int32(line[DESCRIPTOR]), now(clock)
    if once or moment < line[REST_UNTIL]:
        return receive(socket, packet.ctypes.data, len(packet), AT_ONCE)
    came, until = np.int64(-1), moment + line[SPIN_NS]
    while came < 0 and moment < until:
        give_way()
        came = receive(socket, packet.ctypes.data, len(packet), AT_ONCE)
        before, moment = moment, now(clock)
        if moment - before > line[CROWDED_NS]:
            line[REST_UNTIL] = moment + line[REST_NS]
            break
    return came


@kernel
def _await(line, answer, slow, clock):  # type: ignore[no-untyped-def]
    """The size of the packet that has come into ``answer``; 0 or less where none came soon."""
    came = receive_soon(line, answer, slow[0] != 0, clock)
    if came >= 0:
        slow[0] = 0
        return came
    socket = np.int32(line[DESCRIPTOR])
    asked = np.empty(1, np.int64)  # a struct pollfd: the descriptor, what is waited for, and what has happened
    asked[0] = np.int64(socket) | (READABLE << np.int64(32))
    began = now(clock)
    if poll(asked.ctypes.data, 1, PATIENCE) <= 0:
        slow[0] = 1
        return np.int64(-1)
    slow[0] = now(clock) - began > 2 * line[SPIN_NS]
    return receive(socket, answer.ctypes.data, len(answer), AT_ONCE)
