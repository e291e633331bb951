"""Where the user's own tokens are among those that the chat template makes of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tsqp.errors import PromptError
from tsqp.trusted.text.tokenizer import Tokenizer

MAX_TOKENS = 200
OTHER_TEXTS = ("0", "x")  # they differ in their first token and in their last


@dataclass(frozen=True)
class AuditPrompt:
    """The ids of a whole prompt, of which ``user`` are the user's; the rest is the template's, which is public."""

    ids: tuple[int, ...]
    user: slice

    @property
    def prefix(self) -> tuple[int, ...]:
        """The template's ids in front."""
        return self.ids[: self.user.start]

    @property
    def user_ids(self) -> tuple[int, ...]:
        return self.ids[self.user]


def audit_prompt(tokenizer: Tokenizer, text: str) -> AuditPrompt:
    """The prompt as it will be sent. Raises PromptError for an empty one and for more than ``MAX_TOKENS`` tokens."""
    if not text.strip():
        raise PromptError("the prompt is empty: give some text")
    ids = tokenizer.encode_prompt(text)
    user = users_part(ids, [tokenizer.encode_prompt(other) for other in OTHER_TEXTS])
    count = user.stop - user.start
    if count > MAX_TOKENS:
        raise PromptError(f"the prompt has {count} tokens; an audit takes at most {MAX_TOKENS}: shorten it")
    if count < 1:
        raise PromptError("the chat template leaves nothing of the prompt: give another")
    return AuditPrompt(tuple(ids), user)


def users_part(ids: Sequence[int], others: Iterable[Sequence[int]]) -> slice:
    """Where the tokens of a text are among ``ids``; ``others``: the same with each of ``OTHER_TEXTS`` in its place."""
    others = list(others)
    first = min(_common(ids, other) for other in others)
    last = min(_common(ids[first:][::-1], other[::-1]) for other in others)
    return slice(first, len(ids) - last)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids they begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
