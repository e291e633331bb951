"""Calls of the ``tokenizers`` library, which a stranger's vocabulary can make fail in any way.

Covers: its plain Exceptions, and its panics, which are no Exceptions, are errors of ours with nothing chained to them
(tests/trusted/text/test_panics.py).
Does not cover: a panic also writes to stderr by itself, the place in the library and what went wrong there, which may
be the number of a byte or a piece of the text. ``probe`` makes most panics happen before there is a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from tokenizers import Encoding, Tokenizer

from tsqp.errors import CorruptCheckpoint, PromptError, TsqpError

T = TypeVar("T")

_PROBE = "".join(map(chr, range(1, 0x180))) + " the Héllo ,中ไ🙂\u0301\u200d\ufffd\n\n  12"


def call(work: Callable[[], T], error_of: Callable[[str], TsqpError]) -> T:
    """What ``work`` returns. Whatever the library raises in it becomes the error that is made of its text."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        told = " ".join(str(error).split())[:200]
    raise error_of(told)  # not in the handler: the library's error may hold the text, and is not chained


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool) -> Encoding:
    """The tokens of a prompt. Raises PromptError, which says nothing of it."""
    return call(
        lambda: tokenizer.encode(text, add_special_tokens=special_tokens),
        lambda _: PromptError("the tokenizer of this checkpoint cannot encode the text"),
    )


def probe(tokenizer: Tokenizer) -> None:
    """Raises CorruptCheckpoint for a tokenizer that panics at a text. One that lacks a character is taken."""

    def try_it() -> None:
        with suppress(Exception):  # such as a character that the vocabulary has not, without a token for such
            tokenizer.encode(_PROBE)

    call(try_it, unusable)


def unusable(told: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the checkpoint's tokenizer cannot be used: {told}")
