"""Calls that come again, answered without Python: the request, a look into a table, the product, the answer."""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel
from tsqp.untrusted.product_loops import multiply
from tsqp.wire.answering import OTHERS, await_request, call_id, say_done
from tsqp.wire.exchange import now

# Why the loop has come back: others may be here, or have waited long enough; nothing comes; a packet that is to be
# dealt with in Python, or the end of the connection, which is one of 0 bytes.
TURN, IDLE, CAME = range(3)


@kernel
def _find(packet, size, keys, sizes, follows, last):  # type: ignore[no-untyped-def]
    """The number of the call that a packet repeats, and its id; -1 and -1 for another packet.

    keys uint8 (n, any), sizes int64 (n, 2): see ``call_id``. follows int64 (n,): what came after each the last time.
    last int64 (1,): the one before.
    """
    guess = follows[last[0]]
    found = call_id(packet, size, keys[guess], sizes[guess, 0], sizes[guess, 1])
    if found >= 0:
        return guess, found
    for n in range(len(keys)):
        found = call_id(packet, size, keys[n], sizes[n, 0], sizes[n, 1])
        if found >= 0:
            follows[last[0]] = n
            return np.int64(n), found
    return np.int64(-1), found


@kernel
def serve(line, table, crew, room, messages, patience_ns):  # type: ignore[no-untyped-def]
    """Answer at most ``messages`` calls, for about ``patience_ns``: why it has come back, and the bytes of a packet.

    - line: as ``await_request`` has it
    - table: of n > 0 calls, keys uint8 (n, any), sizes int64 (n, 2), follows int64 (n,), last int64 (1,) as ``_find``
      has them, and products int64 (n, any)
    - room: uint8 (any,) for a packet, uint8 (any,) how a ``Done`` begins, uint8 (any,) for an answer, int64 (2,) clock
    """
    keys, sizes, follows, last, products = table
    packet, done, answer, clock = room
    began = now(clock)
    for _ in range(messages):
        size = await_request(line, packet, clock)
        if size < 0:
            return (TURN if size == OTHERS else IDLE), 0
        which, found = _find(packet, size, keys, sizes, follows, last)
        if which < 0:
            return CAME, size
        start = now(clock)
        if not multiply(products[which], crew, clock):
            return CAME, size  # which says why
        end = now(clock)
        if not say_done(line, packet, done, found, end - start, answer):
            return CAME, 0  # it is gone, or reads none of its replies
        last[0] = which
        if end - began > patience_ns:
            break
    return TURN, 0
