"""The packets of a shared-memory connection: where the tensors of a message lie, and its control frame.

The trusted side says where everything is. A worker's packet has no length, offset or shape: it names the request that
it answers, and nothing else. A packet is whole numbers at fixed places and then the control frame as it is, so that
each side decodes one MessagePack frame for a message.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from tsqp.errors import ProtocolError
from tsqp.wire.channel import MAX_TENSORS
from tsqp.wire.codec import MAX_CONTROL_BYTES, Decoder

SHM_VERSION = 2
OPENING = 0  # the sequence number of a connection's first packet
PACKET_BYTES = 2 * MAX_CONTROL_BYTES  # more than any packet has; a longer one is cut here, and is refused then

_REQUEST = Struct("<8Q")  # sequence number, tensors, offset and size of: first tensor, second tensor, product
_ANSWER = Struct("<Q")  # sequence number


class Region(NamedTuple):
    """Bytes of the arena."""

    offset: int
    size: int


NO_BYTES = Region(0, 0)


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Trusted side, first on a connection. The arena is the descriptor sent with it, or the file at ``path``."""

    version: Annotated[int, Meta(ge=0, lt=2**62)]
    path: Annotated[str, Meta(max_length=MAX_CONTROL_BYTES)] | None


class Request(NamedTuple):
    """Trusted side: one message, where its tensors lie, and where the product of its reply belongs."""

    sequence: int
    control: bytes
    tensors: tuple[Region, ...] = ()
    product: Region = NO_BYTES


class Answer(NamedTuple):
    """Worker: the product of request ``sequence`` is in its place. To an Opening: a reason if it is refused."""

    sequence: int
    control: bytes


encode_opening = msgspec.msgpack.Encoder().encode
decode_opening: Decoder[Opening] = Decoder(Opening)


def encode_request(request: Request) -> bytes:
    """The packet of a request with at most two tensors."""
    first, second = (*request.tensors, NO_BYTES, NO_BYTES)[:MAX_TENSORS]
    return _REQUEST.pack(request.sequence, len(request.tensors), *first, *second, *request.product) + request.control


def decode_request(packet: bytes) -> Request:
    """Raises ProtocolError. Whether the regions lie in the arena is for the caller to check."""
    control = _control_after(_REQUEST, packet)
    sequence, count, *numbers, offset, size = _REQUEST.unpack_from(packet)
    if count > MAX_TENSORS or any(numbers[2 * count :]):
        raise ProtocolError(f"a packet with places of more tensors than its {count}; the limit is {MAX_TENSORS}")
    tensors = tuple([Region(numbers[2 * n], numbers[2 * n + 1]) for n in range(count)])
    return Request(sequence, control, tensors, Region(offset, size))


def encode_answer(answer: Answer) -> bytes:
    """The packet of an answer."""
    return _ANSWER.pack(answer.sequence) + answer.control


def decode_answer(packet: bytes) -> Answer:
    """Raises ProtocolError."""
    control = _control_after(_ANSWER, packet)
    return Answer(*_ANSWER.unpack_from(packet), control)


def _control_after(header: Struct, packet: bytes) -> bytes:
    """The control frame. Raises ProtocolError for a packet of a size that none has."""
    if not header.size <= len(packet) <= header.size + MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"a packet of {len(packet)} bytes; it has {header.size} to {header.size + MAX_CONTROL_BYTES}"
        )
    return packet[header.size :]
