"""How large the memory is that both sides share over shm, where a run does not say so: what the limits found leave.

Both sides map the whole of it. A limit on addresses (``ulimit -v``) counts all that is mapped, touched or not; a limit
on memory (a cgroup's) counts what is touched, which a hostile worker can do to all of it. So the workers of a team have
one share together.
"""

from __future__ import annotations

from tsqp.api.memory_limits import limits_left
from tsqp.errors import AddressError
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.shm.segment import ARENA_BYTES

LEAST_BYTES = 16 << 20  # below it not even a small model answers
SHARE = 2  # of what is left, one part is for the arena; the rest of a run grows into the others


def arena_for(address: str, asked: int | None = None, worker: int | None = None, sharing: int = 1) -> int | None:
    """Bytes for a connection to ``address``, as ``asked`` or ``fitting_arena``; None where it is not over shm.

    Over cuda as ``asked``: what limits leave says nothing of a device's memory.
    """
    transport = parse_address(address).transport
    if transport != "shm":
        return asked if transport == "cuda" else None
    return fitting_arena(worker, sharing) if asked is None else asked


def fitting_arena(worker: int | None, sharing: int = 1) -> int:
    """Bytes, for a connection of this process to a worker whose process id is known if it was started here.

    ``sharing``: how many such connections there are to be, which have the part of the arena of what limits leave.
    Raises AddressError where the limits leave next to nothing.
    """
    size = min([ARENA_BYTES, *(left // SHARE // sharing for left in limits_left(worker))])
    if size < LEAST_BYTES:
        whom = "the worker" if sharing == 1 else f"each of {sharing} workers"
        raise AddressError(
            f"limits on memory leave {max(0, size)} bytes to share with {whom}: raise the limits (ulimit -v, "
            "or that of the control group), or "
            "choose how much by worker.arena_bytes",
            fields=("worker.arena_bytes",),
        )
    return size >> 20 << 20
