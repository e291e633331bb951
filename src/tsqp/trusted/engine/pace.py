"""How many rows of prompts a step beside running answers may have, learnt from how long steps have taken.

A step with such rows may last ``slowdown`` times as long as one without. What a row costs depends on the device, the
mode, the company and the position, so the number follows what was measured: after each step with prompt rows it
changes by the factor between the time that was allowed for them and the time that they took, within bounds. What a
step takes without them is measured by such steps, of companies of about the same size; where none was measured
lately, the next step is one. Without a clock: whoever steps says how long it took (test_pace.py).
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

LEAST_ROWS = 8  # a prompt goes on at this pace at least, however long its steps take
MEASURED = 5  # times of which the median counts: one that another process has held up is none of them
MEASURE_AGAIN = 64  # steps after which a time is old: answers have grown meanwhile
GREATEST_FACTOR = 1.5  # by which the number grows after one step; it shrinks by half at most


@dataclass
class _Alone:
    """Steps without prompt rows, of one size of company: their times in seconds, and when the last one was."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    step: int = 0


class PrefillPace:
    """The number for the next step. ``slowdown`` > 1; ``most``: rows that it never exceeds."""

    def __init__(self, slowdown: float, most: int) -> None:
        self._slowdown = slowdown
        self._most = most
        self._least = min(LEAST_ROWS, most)
        self._rows = float(self._least)
        self._alone: dict[int, _Alone] = {}  # by the number of bits of the number of answers
        self._steps = 0

    def rows(self, answers: int) -> int:
        """Prompt rows beside so many running answers; 0 where a step without any is to be measured first."""
        alone = self._alone.get(answers.bit_length())
        if alone is None or self._steps - alone.step >= MEASURE_AGAIN:
            return 0
        return int(self._rows)

    def measured_apart(self, answers: int, rows: int, seconds: float) -> None:
        """A step of prompt rows by themselves has held up so many running answers for so long: as if beside them."""
        alone = self._alone.get(answers.bit_length())
        if alone is not None and alone.seconds:
            self.measured(answers, rows, seconds + statistics.median(alone.seconds))

    def measured(self, answers: int, rows: int, seconds: float) -> None:
        """A step of so many running answers, and of so many prompt rows beside them, has taken so long."""
        self._steps += 1
        if not answers:
            return
        alone = self._alone.setdefault(answers.bit_length(), _Alone())
        if not rows:
            alone.seconds.append(seconds)
            alone.step = self._steps
        elif alone.seconds:
            without = statistics.median(alone.seconds)
            allowed, taken = (self._slowdown - 1) * without, seconds - without
            factor = GREATEST_FACTOR if taken * GREATEST_FACTOR <= allowed else max(0.5, allowed / taken)
            guess = factor * (self._rows if rows == int(self._rows) else rows)
            if factor < 1:
                self._rows = max(min(guess, self._rows), self._rows / 2, self._least)
            else:  # that the end of a prompt was quick says nothing of more rows
                self._rows = min(max(guess, self._rows), self._most)
