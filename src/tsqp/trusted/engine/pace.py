"""How many rows of prompts a step beside running answers may have, learnt from how long steps have taken.

A step with such rows may last ``slowdown`` times as long as one without. What a row costs depends on the device, the
mode, the company and the position, and it is no slope: past some number of rows another way of computing them may take
three times as long. So the number follows what was measured. It grows while steps keep within the bound, and shrinks
when they do not; a number that was too large is not tried again for a while. What a step takes without such rows is
measured by such steps, of companies of about the same size; where none was measured lately, the next step is one.
Without a clock: whoever steps says how long it took (test_pace.py).
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

LEAST_ROWS = 6  # a prompt goes on at this pace at least, however long its steps take
NOTCH = 6  # numbers are multiples of it: attention takes so many queries at once, and fewer cost as much
MEASURED = 5  # times of which the median counts: one that another process has held up is none of them
MEASURE_AGAIN = 64  # steps after which a time is old: answers have grown meanwhile
TRY_AGAIN = 16  # steps after which a number that was too large is tried again; twice as many after each time
GREATEST_FACTOR = 1.5  # by which the number grows after one step; it shrinks by half at most


@dataclass
class _Company:
    """Steps of one size of company: times in seconds of those without prompt rows, and when the last one was.

    ``bound``: a number that was too large, which counts until step ``until``; it has been so for ``patience`` steps.
    """

    alone: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    step: int = 0
    bound: int = 0
    until: int = 0
    patience: int = TRY_AGAIN


class PrefillPace:
    """The number for the next step. ``slowdown`` > 1; ``most``: rows that it never exceeds."""

    def __init__(self, slowdown: float, most: int) -> None:
        self._slowdown = slowdown
        self._most = most
        self._least = min(LEAST_ROWS, most)
        self._rows = self._least
        self._good = 0  # the greatest number up to this one that has kept within the allowed time; 0: none has
        self._slow = False  # a step of a good number has not
        self._companies: dict[int, _Company] = {}  # by the number of bits of the number of answers
        self._steps = 0

    def rows(self, answers: int) -> int:
        """Prompt rows beside so many running answers; 0 where a step without any is to be measured first."""
        company = self._companies.get(answers.bit_length())
        if company is None or self._steps - company.step >= MEASURE_AGAIN:
            return 0
        return self._rows

    def measured_apart(self, answers: int, rows: int, seconds: float) -> None:
        """A step of prompt rows by themselves has held up so many running answers for so long: as if beside them."""
        company = self._companies.get(answers.bit_length())
        if company is not None and company.alone:
            self.measured(answers, rows, seconds + statistics.median(company.alone))

    def measured(self, answers: int, rows: int, seconds: float) -> None:
        """A step of so many running answers, and of so many prompt rows beside them, has taken so long."""
        self._steps += 1
        if not answers:
            return
        company = self._companies.setdefault(answers.bit_length(), _Company())
        if not rows:
            company.alone.append(seconds)
            company.step = self._steps
        elif company.alone and rows <= self._rows:  # beside answers that nobody follows there may be more
            without = statistics.median(company.alone)
            allowed, taken = (self._slowdown - 1) * without, seconds - without
            if taken > allowed:
                self._too_slow(company, rows, allowed / taken)
            elif rows == self._rows:  # that the end of a prompt was quick says nothing of more rows
                self._grow(company, allowed / max(taken, allowed / GREATEST_FACTOR))

    def _too_slow(self, company: _Company, rows: int, factor: float) -> None:
        if rows <= self._good and not self._slow:
            self._slow = True  # once may be another process's fault
            return
        company.bound, company.until = rows, self._steps + company.patience
        company.patience = min(2 * company.patience, MEASURE_AGAIN)
        self._good = self._good if rows > self._good else 0
        self._rows = self._good or self._rounded(min(self._rows, rows * max(0.5, factor)))
        self._slow = False

    def _grow(self, company: _Company, factor: float) -> None:
        if self._rows > self._good > 0:
            company.patience = TRY_AGAIN
        self._good, self._slow = self._rows, False
        more = max(self._rows * factor, self._rows + NOTCH)
        if self._rows < company.bound:
            more = min(more, company.bound if self._steps >= company.until else (self._rows + company.bound) // 2)
        self._rows = max(self._rows, self._rounded(min(more, self._most)))

    def _rounded(self, rows: float) -> int:
        return max(self._least, int(rows) // NOTCH * NOTCH)
