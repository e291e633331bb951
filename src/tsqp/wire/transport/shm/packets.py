"""The packets of a shared-memory connection: where the tensors of a message lie, and its control frame.

The trusted side says where everything is. A worker's packet has no length, offset or shape: it names the request that
it answers, and nothing else. A packet is whole numbers at fixed places and then the control frame as it is, so that
each side decodes one MessagePack frame for a message.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated

import msgspec
from msgspec import Meta

from tsqp.errors import ProtocolError
from tsqp.wire.channel import MAX_TENSORS
from tsqp.wire.codec import MAX_CONTROL_BYTES, Decoder

SHM_VERSION = 2
OPENING = 0  # the sequence number of a connection's first packet
PACKET_BYTES = 2 * MAX_CONTROL_BYTES  # more than any packet has; a longer one is cut here, and is refused then

_REQUEST = Struct("<8Q")  # sequence number, tensors, offset and size of: first tensor, second tensor, product
_PLACES = Struct("<7Q")  # the same without the sequence number
_ANSWER = Struct("<Q")  # sequence number
_NO_PLACES = bytes(_PLACES.size)


class Region(msgspec.Struct, frozen=True, gc=False):
    """Bytes of the arena."""

    offset: int
    size: int


NO_BYTES = Region(0, 0)
_LONGEST_REQUEST = _REQUEST.size + MAX_CONTROL_BYTES
_LONGEST_ANSWER = _ANSWER.size + MAX_CONTROL_BYTES


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Trusted side, first on a connection. The arena is the descriptor sent with it, or the file at ``path``."""

    version: Annotated[int, Meta(ge=0, lt=2**62)]
    path: Annotated[str, Meta(max_length=MAX_CONTROL_BYTES)] | None


class Request(msgspec.Struct, frozen=True):
    """Trusted side: one message, where its tensors lie, and where the product of its reply belongs."""

    sequence: int
    control: bytes
    tensors: tuple[Region, ...] = ()
    product: Region = NO_BYTES


class Answer(msgspec.Struct, frozen=True, gc=False):
    """Worker: the product of request ``sequence`` is in its place. To an Opening: a reason if it is refused."""

    sequence: int
    control: bytes


encode_opening = msgspec.msgpack.Encoder().encode
decode_opening: Decoder[Opening] = Decoder(Opening)


def encode_request(request: Request) -> bytes:
    """The packet of a request with at most two tensors."""
    return encode_sequence(request.sequence) + request_places(request.tensors, request.product) + request.control


def encode_sequence(sequence: int) -> bytes:
    """How every packet begins."""
    return _ANSWER.pack(sequence)


def request_places(tensors: tuple[Region, ...], product: Region) -> bytes:
    """What follows in a request: where at most two tensors and the product lie."""
    if not tensors and product is NO_BYTES:
        return _NO_PLACES
    one, two = (*tensors, NO_BYTES, NO_BYTES)[:MAX_TENSORS]
    return _PLACES.pack(len(tensors), one.offset, one.size, two.offset, two.size, product.offset, product.size)


def split_request(packet: bytes) -> tuple[int, bytes, bytes]:
    """The number of a request, its places as they are, and its control frame. Raises ProtocolError."""
    if not _REQUEST.size <= len(packet) <= _LONGEST_REQUEST:
        raise ProtocolError(f"a request of {len(packet)} bytes; it has {_REQUEST.size} to {_LONGEST_REQUEST}")
    return (
        int.from_bytes(packet[: _ANSWER.size], "little"),
        packet[_ANSWER.size : _REQUEST.size],
        packet[_REQUEST.size :],
    )


def decode_places(places: bytes) -> tuple[tuple[Region, ...], Region]:
    """Where the tensors and the product of a request lie, in the arena or not. Raises ProtocolError."""
    count, first, first_size, second, second_size, offset, size = _PLACES.unpack(places)
    product = Region(offset, size) if offset or size else NO_BYTES
    if count == MAX_TENSORS:
        return (Region(first, first_size), Region(second, second_size)), product
    if count == 1 and not second and not second_size:
        return (Region(first, first_size),), product
    if not (count or first or first_size or second or second_size):
        return (), product
    raise ProtocolError(f"places of other tensors than a request's {count}; the limit is {MAX_TENSORS}")


def encode_answer(answer: Answer) -> bytes:
    """The packet of an answer."""
    return encode_sequence(answer.sequence) + answer.control


def decode_answer(packet: bytes) -> Answer:
    """Raises ProtocolError."""
    if not _ANSWER.size <= len(packet) <= _LONGEST_ANSWER:
        raise ProtocolError(f"an answer of {len(packet)} bytes; it has {_ANSWER.size} to {_LONGEST_ANSWER}")
    return Answer(int.from_bytes(packet[: _ANSWER.size], "little"), packet[_ANSWER.size :])
