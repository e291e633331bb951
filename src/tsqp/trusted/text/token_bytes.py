"""The bytes that each token adds to a text.

A text is the bytes of its tokens, one after the other, read as UTF-8: so it does not depend on where it is cut. This is
what the decoder of a ``tokenizer.json`` gives, but for bytes that are no UTF-8 in a vocabulary with byte tokens
(``<0xE2>``): there the library shows every byte of a run as U+FFFD, and this module only what is no character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tsqp.errors import UnsupportedModel

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str | bytes], str | bytes]


class TokenBytes:
    """Tokens of one vocabulary as bytes. Raises UnsupportedModel for a kind of decoder that is not implemented."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._known: dict[int, bytes] = {}
        self._steps: list[Step] = []
        self.first_without = ""  # this character is left out of the first token, all of them
        self.text_without = ("", 0)  # and of this one so many at the beginning of a text
        state = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self._read(state)

    def of(self, token: int) -> bytes:
        """What a token adds within a text: nothing for special tokens and for ids without a token."""
        known = self._known.get(token)
        if known is None:
            piece = None if token in self._special else self._tokenizer.id_to_token(token)
            known = self._known[token] = b"" if piece is None else self._bytes(piece)
        return known

    def written(self, token: int) -> str:
        """A token as it is shown by itself: special tokens by their names, parts of characters as U+FFFD."""
        if token in self._special:
            return self._tokenizer.id_to_token(token) or ""
        return self.of(token).decode(errors="replace")

    def is_counted(self, token: int) -> bool:
        """Whether a token is one of the text's, and may be its first one."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _bytes(self, piece: str | bytes) -> bytes:
        for step in self._steps:
            piece = step(piece)
        return piece.encode() if isinstance(piece, str) else piece

    def _read(self, decoder: Mapping[str, Any] | None) -> None:
        fused = False
        for step in _flat(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._steps.append(_byte_level)
                case {"type": "ByteFallback"}:
                    self._steps.append(_byte_token)
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                    self._steps.append(_replacement(old, new))
                case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if not fused:
                    self._steps.append(_replacement(mark, " "))
                    self.first_without = "" if scheme == "never" else " "
                case {"type": "Strip", "content": str(space), "start": int(count), "stop": 0} if fused:
                    self.text_without = (space, count)
                case _:
                    kind = step.get("type") if isinstance(step, Mapping) else "none"
                    raise UnsupportedModel(f"the tokenizer's decoder {kind} is not implemented in this place")


def _flat(decoder: Mapping[str, Any] | None) -> list[Any]:
    if decoder is not None and decoder.get("type") == "Sequence":
        return [one for part in decoder["decoders"] for one in _flat(part)]
    return [decoder]


def _replacement(old: str, new: str) -> Step:
    return lambda piece: piece.replace(old, new) if isinstance(piece, str) else piece


def _byte_token(piece: str | bytes) -> str | bytes:
    found = _BYTE_TOKEN.fullmatch(piece) if isinstance(piece, str) else None
    return piece if found is None else bytes([int(found[1], 16)])


def _byte_level(piece: str | bytes) -> str | bytes:
    """Each character stands for a byte; a token with another character in it is written as it is."""
    try:
        return bytes(_BYTE_OF[character] for character in piece) if isinstance(piece, str) else piece
    except KeyError:
        return piece


def _alphabet() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for: itself, or the next from 256 on."""
    known = set(ByteLevel.alphabet())
    unlike = iter(range(256, 512))
    return {chr(byte) if chr(byte) in known else chr(next(unlike)): byte for byte in range(256)}


_BYTE_OF = _alphabet()


class ByteStream:
    """The bytes of a text, token by token. ``after``: the tokens of a text that this one goes on with."""

    def __init__(self, table: TokenBytes, after: Sequence[int] = ()) -> None:
        self._table = table
        self._first = True
        self._strip, self._left = table.text_without
        for token in after:
            if not (self._first or self._left):  # within a text all tokens add the same, whatever is before them
                break
            self.push(token)

    def push(self, token: int) -> bytes:
        """What this token adds to the text."""
        added = self.peek(token)
        if self._left:
            within = self._table.of(token)
            self._left = 0 if added else self._left - len(within) // len(self._strip.encode())
        self._first = self._first and not self._table.is_counted(token)
        return added

    def peek(self, token: int) -> bytes:
        """What a token would add in this place."""
        added = self._table.of(token)
        if self._first and self._table.first_without:
            added = added.replace(self._table.first_without.encode(), b"")
        for _ in range(self._left):
            added = added.removeprefix(self._strip.encode())
        return added


def bytes_of(table: TokenBytes, tokens: Sequence[int]) -> list[bytes]:
    """What each token of a text adds to it."""
    stream = ByteStream(table)
    return [stream.push(token) for token in tokens]
