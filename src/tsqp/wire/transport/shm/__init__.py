"""Shared memory: tensors lie in one arena per connection, laid out by the trusted side; small packets go by socket.

Covers: a worker that writes what it likes into the arena and answers with any bytes; the death of either side; memory
that a worker might shrink. Does not cover: secrecy of what is written to the arena, which the worker can read at any
time; a worker that keeps a processor busy. Assumes: that root and this user do not reach into either process by other
means (one user id for both sides is no isolation).
"""

from tsqp.wire.transport.shm.channel import connect_shm
from tsqp.wire.transport.shm.listener import listen_shm
from tsqp.wire.transport.shm.segment import ArenaKind

__all__ = ["ArenaKind", "connect_shm", "listen_shm"]
