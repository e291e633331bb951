"""What endpoints tell whoever counts. ``ended`` is called once for each ``began``, whatever happens."""

from __future__ import annotations

from typing import Literal, Protocol

Reason = Literal["stop", "length", "abort", "error"]


class Meters(Protocol):
    """Numbers and times alone: no text, no tokens, no names of clients. Times are in seconds."""

    def began(self, endpoint: str) -> None:
        """An answer is in the queue. A request may have several answers: its prompts times its choices."""

    def first_token(self, seconds: float) -> None:
        """From ``began`` to the first token of an answer."""

    def token(self, seconds: float) -> None:
        """From one token of an answer to its next."""

    def ended(self, reason: Reason, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """An answer has ended, so long after it began."""


class NoMeters:
    """Counts nothing."""

    def began(self, endpoint: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def token(self, seconds: float) -> None: ...

    def ended(self, reason: Reason, prompt_tokens: int, completion_tokens: int, seconds: float) -> None: ...
