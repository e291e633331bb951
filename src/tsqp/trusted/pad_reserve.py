"""Pads that are promised to requests, in a run that never makes missing ones.

Policy only: it knows counts, and never sees a pad.
"""

from __future__ import annotations

from collections.abc import Callable

from tsqp.errors import MORE_PADS, InputError, PadsExhausted
from tsqp.trusted.filler import PadFiller


class PadReserve:
    """Counts the rows that were promised and not yet used. Its caller sees to it that one thread asks at a time."""

    def __init__(self, filler: PadFiller) -> None:
        self._filler = filler
        self.promised = 0

    @property
    def free(self) -> int:
        """Rows whose pads are ready in every group and promised to nobody."""
        return max(0, self._filler.ready(answer=True) - self.promised)

    @property
    def most(self) -> int:
        """Rows that can be promised at once: those of a full pool."""
        return self._filler.whole_answers

    def reserve(self, rows: int) -> None:
        """Promise pads for ``rows`` rows.

        Raises PadsExhausted where fewer are free; InputError where a full pool has fewer, so that waiting helps nobody.
        """
        free, most = self.free, self.most
        if rows > max(free, most):
            raise InputError(
                f"guard.pads_empty is refuse, and pads are kept for {most} tokens, prompt and answer together, of the "
                f"{rows} that are asked for: ask for fewer, raise guard.pads_ahead or guard.pad_memory, or choose wait",
                fields=("guard.pads_empty", "guard.pads_ahead", "guard.pad_memory"),
            )
        if rows > free:
            raise PadsExhausted(
                f"guard.pads_empty is refuse, and pads are free for {free} of the {rows} tokens that prompt and answer "
                f"may have: ask for fewer, use {', '.join(MORE_PADS)}, or choose wait",
                fields=("guard.pads_empty", *MORE_PADS),
            )
        self.promised += rows

    def release(self, rows: int) -> None:
        """Rows whose pads were used, or that will not be needed."""
        self.promised -= rows

    def renew(self, filler: PadFiller, stopped: Callable[[], bool]) -> None:
        """The pads are gone with their session: from now on those of ``filler`` are promised, and made up to that.

        What was promised fitted into the pool, so it fits again. Ends early where ``stopped``. Raises as the filler.
        """
        self._filler = filler
        while filler.ready(answer=True) < self.promised and not stopped():
            if not filler.make_some():
                return
