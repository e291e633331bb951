"""What a worker saw of one answer, for the user whose answer it is: the audit's numbers, of a tap.

An onlooker has the public checkpoint and knows where in the prompt the user's tokens are, and not which they are. It
makes one attack of the audit's: the one whose table can be had block by block, so that memory is needed for a moment
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tsqp.audit.attack import VocabularyMatch, noise_rows
from tsqp.audit.capture import Capture
from tsqp.audit.public_model import PublicModel
from tsqp.audit.uniformity import Counts, Shares, high_bits, high_shares, uniformity_p
from tsqp.audit.view import View, Words
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey
from tsqp.trusted.tap import Tap
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.wire.messages import Hello

PICTURE: GroupKey = ("qkv", 0)
PICTURE_BYTES = 1 << 16
_NONE = np.zeros(256, np.int64)


@dataclass(frozen=True)
class Picture:
    """Words as bytes, the highest 8 bits below the modulus of each: row by row, of ``width`` words.

    ``counts``: of each value among all that was kept, not only here. ``expected``: shares of each in uniform noise.
    """

    pixels: bytes
    width: int
    counts: Counts
    expected: Shares


@dataclass(frozen=True)
class Look:
    """What there is to see in a tap. ``uniformity_p``: None where there are too few words for the test.

    ``recovered_text``: what the attack makes of the user's tokens, of which it gets that share right; ``of_noise``: the
    share of fresh noise that it would.
    """

    uniformity_p: float | None
    recovered_text: str
    recovered_fraction: float
    noise_fraction: float
    picture: Picture


class Onlooker:
    """Looks at taps; one thread at a time, since a look takes a processor and some memory."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer

    def look(self, tap: Tap, user: Sequence[int]) -> Look:
        """``user``: the tokens at the positions that the tap was to look for, to compare with."""
        messages, users_rows = tap.messages, tap.rows  # before somebody closes it
        if not messages:  # where there is no worker nothing is sent
            return Look(None, "", 0.0, 0.0, Picture(b"", 0, _NONE, high_shares(8, 256)))
        config = self._checkpoint.config
        view = View(Capture(messages=messages), config)
        greetings = [seen for seen in messages if isinstance(seen.message, Hello)]
        rows = View(Capture(messages=[*greetings, *users_rows]), config)
        text, fraction, of_noise = self._recovered(rows.rows(PICTURE), user)
        return Look(_p_value(view), text, fraction, of_noise, _picture(view, rows))

    def _recovered(self, rows: torch.Tensor, user: Sequence[int]) -> tuple[str, float, float]:
        if not user:
            return "", 0.0, 0.0
        attack = VocabularyMatch(PublicModel(self._checkpoint, depth=0))
        tokens = attack.recover(rows)
        noise = attack.recover(noise_rows(len(user), self._checkpoint.config.hidden_size))
        return self._tokenizer.decode(tokens), _share(tokens, user), _share(noise, user)


def _p_value(view: View) -> float | None:
    try:
        return uniformity_p(view.words())
    except ValueError:
        return None


def _picture(view: View, users_rows: View) -> Picture:
    """Of the first rows that were kept, or of the user's own where all others were too many."""
    every, first = view.words(), view.first_words(PICTURE, PICTURE_BYTES)
    first = first if first.groups else users_rows.first_words(PICTURE, PICTURE_BYTES)
    counts = sum((np.bincount(_bytes(group, every.modulus), minlength=256) for group in every.groups), _NONE)
    modulus = every.modulus or first.modulus or 256
    pixels = b"".join(_bytes(group, modulus).tobytes() for group in first.groups)
    width = first.groups[0].shape[1] if first.groups else 0
    return Picture(pixels, width, counts, high_shares(8, modulus))


def _bytes(words: Words, modulus: int) -> Words:
    """uint8 (n,). A word that is not below the modulus counts with the highest."""
    return np.minimum(high_bits(words.ravel(), 8, modulus), 255).astype(np.uint8)


def _share(tokens: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(tokens, wanted, strict=False)) / len(wanted)
