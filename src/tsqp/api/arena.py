"""How large the memory is that both sides share over shm, where a run does not say so: what the limits found leave.

Both sides map the whole of it. A limit on addresses (``ulimit -v``) counts all that is mapped, touched or not; a limit
on memory (a cgroup's) counts what is touched, which a hostile worker can do to all of it.
"""

from __future__ import annotations

from tsqp.api.memory_limits import limits_left
from tsqp.errors import AddressError
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.shm.segment import ARENA_BYTES

LEAST_BYTES = 16 << 20  # below it not even a small model answers
SHARE = 2  # of what is left, one part is for the arena; the rest of a run grows into the others


def arena_for(address: str, asked: int | None = None, worker: int | None = None) -> int | None:
    """Bytes for a connection to ``address``, as ``asked`` or ``fitting_arena``; None where it is not over shm."""
    if parse_address(address).transport != "shm":
        return None
    return fitting_arena(worker) if asked is None else asked


def fitting_arena(worker: int | None) -> int:
    """Bytes, for a connection of this process to a worker whose process id is known if it was started here.

    Raises AddressError where the limits leave next to nothing.
    """
    size = min([ARENA_BYTES, *(left // SHARE for left in limits_left(worker))])
    if size < LEAST_BYTES:
        raise AddressError(
            f"limits on memory leave {max(0, size)} bytes to share with the worker: raise the limits (ulimit -v), or "
            "choose how much by worker.arena_bytes",
            fields=("worker.arena_bytes",),
        )
    return size >> 20 << 20
