"""How many tokens a request took."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """A prompt counts once, however many answers it has; an end token does not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, answer: int) -> Usage:
        return cls(prompt, answer, prompt + answer)
