"""The packets of a shared-memory connection: where the tensors of a message lie, and its control frame.

The trusted side says where everything is. A worker's packet has no length, offset or shape: it names the request that
it answers, and nothing else.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tsqp.wire.channel import MAX_TENSORS
from tsqp.wire.codec import MAX_CONTROL_BYTES, Decoder

SHM_VERSION = 1
OPENING = 0  # the sequence number of a connection's first packet
PACKET_BYTES = 2 * MAX_CONTROL_BYTES  # more than any packet has; a longer one is cut here, and is not valid then

Sequence = Annotated[int, Meta(ge=0, lt=2**62)]
Extent = Annotated[int, Meta(ge=0, lt=2**62)]
Control = Annotated[bytes, Meta(max_length=MAX_CONTROL_BYTES)]


class Region(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Bytes of the arena."""

    offset: Extent
    size: Extent


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Trusted side, first on a connection. The arena is the descriptor sent with it, or the file at ``path``."""

    version: Extent
    path: Annotated[str, Meta(max_length=MAX_CONTROL_BYTES)] | None


class Request(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Trusted side: one message, where its tensors lie, and where the product of its reply belongs."""

    sequence: Sequence
    control: Control
    tensors: Annotated[tuple[Region, ...], Meta(max_length=MAX_TENSORS)]
    reply: Region | None


class Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Worker: the product of request ``sequence`` is in its place. To an Opening: a reason if it is refused."""

    sequence: Sequence
    control: Control


encode_packet = msgspec.msgpack.Encoder().encode
decode_opening: Decoder[Opening] = Decoder(Opening)
decode_request: Decoder[Request] = Decoder(Request, PACKET_BYTES)
decode_answer: Decoder[Answer] = Decoder(Answer, PACKET_BYTES)
