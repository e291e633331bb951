"""Log-probabilities of the tokens whose text was handed out, no others."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from tsqp.trusted.text.token_bytes import ByteStream

if TYPE_CHECKING:
    from tsqp.api.answer import Delta
    from tsqp.trusted.engine.logprobs import TokenLogprobs
    from tsqp.trusted.text.tokenizer import Tokenizer

_CHARACTERS = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class ShownToken:
    """A token, what it adds to the text in its place, and its log-probability; None for the first of a prompt."""

    token: int
    text: str
    bytes: bytes
    logprob: float | None


@dataclass(frozen=True)
class Shown(ShownToken):
    """One of an answer: ``top`` are the likeliest in its place, ``offset`` the characters of the text before it."""

    top: tuple[ShownToken, ...]
    offset: int


class ShownTokens:
    """The tokens of one text, one after the other. ``offset``: the complete characters so far.

    ``after``: the tokens of a text that this one goes on with.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0, *, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._bytes = ByteStream(tokenizer.bytes, after)
        self._characters = _CHARACTERS(errors="replace")
        self.offset = offset

    def push(self, token: int, entry: TokenLogprobs | None) -> Shown:
        """The next token, with its log-probabilities where it has some."""
        top = () if entry is None else tuple(self._shown(*one, self._bytes.peek(one[0])) for one in entry.top)
        before, added = self.offset, self._bytes.push(token)
        self.offset += len(self._characters.decode(added))
        shown = self._shown(token, None if entry is None else entry.logprob, added)
        return Shown(shown.token, shown.text, shown.bytes, shown.logprob, top, before)

    def _shown(self, token: int, logprob: float | None, added: bytes) -> ShownToken:
        in_text = self._tokenizer.bytes.is_counted(token)  # though it may add nothing in its place
        text = added.decode(errors="replace") if in_text else self._tokenizer.token_text(token)
        return ShownToken(token, text, added, logprob)


class TextLogprobs:
    """Those of one answer as it comes: an entry is held back until the text of its token is there.

    Tokens of which a stop string has left nothing have no entry. So all together are the text. ``offset``: characters
    of text before the answer. ``with_end``: the end token has an entry too. ``after``: see ``ShownTokens``.
    """

    def __init__(
        self, tokenizer: Tokenizer, offset: int = 0, *, with_end: bool = False, after: Sequence[int] = ()
    ) -> None:
        self._shown = ShownTokens(tokenizer, offset, after=after)
        self._held = deque[Shown]()
        self._given = offset  # characters of text
        self._with_end = with_end

    def push(self, delta: Delta) -> list[Shown]:
        """What is shown with a piece of the answer."""
        entry = delta.end_logprobs if delta.logprobs is None and self._with_end else delta.logprobs
        if entry is not None:
            self._held.append(self._shown.push(entry.token, entry))
        self._given += len(delta.text)
        if delta.completion is not None and self._given >= self._shown.offset:  # nothing was cut off
            return self._take(len(self._held))
        return self._take(sum(1 for shown in self._held if shown.offset < self._given))

    def _take(self, count: int) -> list[Shown]:
        return [self._held.popleft() for _ in range(count)]


def prompt_tokens(tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> list[Shown]:
    """Each token of a prompt with its log-probabilities."""
    shown = ShownTokens(tokenizer)
    return [shown.push(token, entry) for token, entry in zip(tokens, entries, strict=True)]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token in the shape of the chat API."""

    token: str
    logprob: float
    bytes: list[int] | None


class TopLogprobs(TokenLogprob, frozen=True):
    """The same, with the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


def chat_logprobs(tokens: Iterable[Shown]) -> list[TopLogprobs]:
    """Entries for chat: each with the bytes that it adds, which together are the text."""
    return [
        TopLogprobs(one.text, one.logprob or 0.0, list(one.bytes), [_entry(top) for top in one.top]) for one in tokens
    ]


def _entry(shown: ShownToken) -> TokenLogprob:
    return TokenLogprob(shown.text, shown.logprob or 0.0, list(shown.bytes))


class CompletionLogprobs(msgspec.Struct):
    """The four lists of the completions API, each with an entry for a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def completion_logprobs(tokens: Iterable[Shown]) -> CompletionLogprobs:
    """Entries for completions.

    A token with a part of a character is written ``bytes:\\xe2\\x82``, as OpenAI does: there is no other list of bytes.
    The token itself comes after the likeliest where it is not one of them.
    """
    lists = CompletionLogprobs([], [], [], [])
    for one in tokens:
        top: dict[str, float] = {}
        for each in (*one.top, one):
            top.setdefault(_named(each), each.logprob or 0.0)  # of tokens with one name the likeliest
        lists.tokens.append(_named(one))
        lists.token_logprobs.append(one.logprob)
        lists.top_logprobs.append(None if one.logprob is None else top)
        lists.text_offset.append(one.offset)
    return lists


def _named(shown: ShownToken) -> str:
    try:
        shown.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in shown.bytes)
    return shown.text
