"""Null calls of a decode step: by the compiled code of both sides, without arithmetic. For ``bench rpc``."""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel
from tsqp.wire.exchange import ANSWERED, exchange, now

_BYTES, _BYTE_BITS, _BYTE = np.int64(8), np.int64(8), np.int64(0xFF)


@kernel
def null_steps(packet, number_at, first, begun, times, line):  # type: ignore[no-untyped-def]
    """Calls from number ``begun`` on, until one is not answered plainly: how many there are then, its verdict and size.

    packet uint8 (n,) has the number of a packet, ``first`` and more, lowest byte first, and that of a call, from 0 on,
    at ``number_at``, highest first. times int64 (calls + 1,): when each began, and the last was over. line: a tuple of
    the arguments of ``exchange`` that stay, as it has them.
    """
    numbers, done, answer, slow, clock = line
    for call in range(begun, len(times) - 1):
        for i in range(_BYTES):
            packet[i] = np.uint8(((first + call) >> (_BYTE_BITS * i)) & _BYTE)
            packet[number_at + _BYTES - 1 - i] = np.uint8((call >> (_BYTE_BITS * i)) & _BYTE)
        times[call] = now(clock)
        where, size = packet.ctypes.data, len(packet)
        verdict, came = exchange(numbers, where, size, first + call, done, call, answer, slow, clock)
        if verdict != ANSWERED:
            return call, verdict, came
    times[-1] = now(clock)
    return np.int64(len(times) - 1), ANSWERED, 0
