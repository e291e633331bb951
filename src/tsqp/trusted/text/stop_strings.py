"""Where a text ends because of what it says."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets a text through piece by piece, up to the first stop string that is complete.

    What may be the beginning of a stop string is held back until it is decided. Of stop strings that are complete with
    the same character, the longest counts. So the text that is let through does not depend on how it came in pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that no later piece can change, without what a stop string cuts off."""
        if self.found:
            return ""
        text = self.held + piece
        places = ((text.find(stop), len(stop)) for stop in self._stop)
        ends = [(at + size, at) for at, size in places if at >= 0]
        if ends:
            _, at = min(ends)
            self.found, self.held = True, ""
            return text[:at]
        undecided = min((beginning_of(text, stop) for stop in self._stop), default=len(text))
        self.held = text[undecided:]
        return text[:undecided]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self.held = self.held, ""
        return held


def beginning_of(text: str, stop: str) -> int:
    """Where the end of a text begins that may become ``stop``; the length of the text where nothing may."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) if at < 0 else at
