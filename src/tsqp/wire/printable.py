"""What the other side wrote for a person to read."""

from __future__ import annotations


def printable(text: str) -> str:
    """A stranger's words, safe for a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)
