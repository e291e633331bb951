"""Messages to bytes and back, strictly: bad bytes give ProtocolError and nothing else."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from tsqp.errors import ProtocolError
from tsqp.wire.messages import Handshake, Message, Reply, ToWorker

MAX_CONTROL_BYTES = 4096

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


class Decoder(Generic[M]):
    """Decodes control frames of the types that may arrive here, and refuses all others."""

    def __init__(self, expected: Any, max_bytes: int = MAX_CONTROL_BYTES) -> None:
        self._decoder = msgspec.msgpack.Decoder(expected, strict=True)
        self._max_bytes = max_bytes

    def __call__(self, frame: bytes | memoryview) -> M:
        """Decode one control frame. Raises ProtocolError; size is checked before anything is decoded."""
        size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if size > self._max_bytes:
            raise ProtocolError(f"a control frame of {size} bytes; the limit is {self._max_bytes}")
        try:
            return self._decoder.decode(frame)  # type: ignore[no-any-return]
        # Invalid UTF-8 is a UnicodeDecodeError (a ValueError), deep nesting a RecursionError.
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            # Shortened and escaped: it may quote the frame, and the frame may hold terminal sequences.
            raise ProtocolError(f"a control frame that is not a valid message: {str(error)[:200]!a}") from None


def encode(message: Message) -> bytes:
    """Encode one message as a control frame."""
    return _encoder.encode(message)


decode_to_worker: Decoder[ToWorker] = Decoder(ToWorker)
decode_handshake: Decoder[Handshake] = Decoder(Handshake)
decode_reply: Decoder[Reply] = Decoder(Reply)
