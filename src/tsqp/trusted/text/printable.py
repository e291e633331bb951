"""Words of another program, made fit for an error of ours: one line, not too long."""

from __future__ import annotations


def printable(text: str, limit: int = 200) -> str:
    """The text in one line, without what cannot be printed, cut at ``limit`` characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else line[:limit] + "…"
