"""How a CUDA IPC connection opens; everything after that are the packets of ``shm``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tsqp.errors import ProtocolError
from tsqp.wire.codec import Decoder
from tsqp.wire.transport.cuda.driver import HANDLE_BYTES, UUID_BYTES
from tsqp.wire.transport.shm.packets import Region

CUDA_VERSION = 1
ALIGNMENT_BYTES = 64  # of places in the arena: any element of a tensor is aligned then
ALLOCATION_BYTES = 2 << 20  # the driver puts smaller allocations into one block, and a handle opens the whole of it
LEAST_ARENA_BYTES, MOST_ARENA_BYTES = ALLOCATION_BYTES, 1 << 40


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Trusted side, first on a connection: the handle of its arena, and the device that this lies on."""

    kind: Literal["cuda"]
    version: Annotated[int, Meta(ge=0, lt=2**62)]
    handle: Annotated[bytes, Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]
    size: Annotated[int, Meta(ge=LEAST_ARENA_BYTES, le=MOST_ARENA_BYTES)]
    uuid: Annotated[bytes, Meta(min_length=UUID_BYTES, max_length=UUID_BYTES)]


encode_opening = msgspec.msgpack.Encoder().encode
_decode: Decoder[Opening] = Decoder(Opening)


def decode_opening(packet: bytes) -> Opening:
    """Raises ProtocolError. Whether the driver opens the handle is for the caller to find out."""
    opening = _decode(packet)
    if opening.version != CUDA_VERSION:
        raise ProtocolError(f"CUDA IPC of version {opening.version}; this side speaks {CUDA_VERSION}")
    if opening.size % ALLOCATION_BYTES:
        raise ProtocolError(f"an arena of {opening.size} bytes, which is no multiple of {ALLOCATION_BYTES}")
    return opening


def whole_allocations(size: int) -> int:
    """The least whole multiple of what an allocation of its own takes that has ``size`` bytes."""
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


def aligned(region: Region) -> bool:
    """Whether a tensor may lie there."""
    return region.offset % ALIGNMENT_BYTES == 0
