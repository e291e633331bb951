"""What the loops of ``exchange.py`` and ``answering.py`` are given of a socket: a line, and how a ``Done`` begins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tsqp.wire.channel import DirectCalls, DirectLine
from tsqp.wire.codec import encode
from tsqp.wire.exchange import CROWDED_NS, DESCRIPTOR, DONE_BYTES, REST_NS, SPIN_NS
from tsqp.wire.messages import Done


def put_line(numbers: NDArray[np.int64], line: DirectLine | DirectCalls) -> None:
    """``numbers``: int64 (LINE_NUMBERS or more,). What the loops have put there stays."""
    numbers[DESCRIPTOR] = line.descriptor
    for at, seconds in ((SPIN_NS, line.spin_s), (CROWDED_NS, line.crowded_s), (REST_NS, line.rest_s)):
        numbers[at] = int(seconds * 1e9)


def done_start() -> NDArray[np.uint8]:
    """uint8 (DONE_BYTES,)."""
    return np.frombuffer(encode(Done(0))[:DONE_BYTES], np.uint8)
