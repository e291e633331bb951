"""How many rows of prompts a step beside running answers may have, learnt from how long steps have taken.

Two questions. **How a long prompt goes on**: by a number of rows for every step, ``rows``. **Whether prompts are done
with in one step**, ``at_once``: a single gap that is longer, where all would wait longer for many short ones.

A step with such rows may last ``slowdown`` times as long as one without. What a row costs depends on the device, the
mode, the company and the position, and it is no slope: past some number of rows another way of computing them may take
three times as long. So the number follows what was measured. It grows while steps keep within the bound, and shrinks
when they do not; a number that was too large is not tried again for a while. What a step takes without such rows is
measured by such steps, of companies of about the same size; where none was measured lately, the next step is one.
Without a clock: whoever steps says how long it took (test_pace.py).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

LEAST_ROWS = 6  # a prompt goes on at this pace at least, however long its steps take
NOTCH = 6  # numbers are multiples of it: attention takes so many queries at once, and fewer cost as much
MEASURED = 5  # times of which the median counts: one that another process has held up is none of them
MEASURE_AGAIN = 64  # steps after which a time is old: answers have grown meanwhile
TRY_AGAIN = 16  # steps after which a number that was too large is tried again; twice as many after each time
HELD_UP_S = 0.5  # prompts that are done with in one step hold answers up for so long at most
GREATEST_FACTOR = 1.5  # by which the number grows after one step; it shrinks by half at most


class _Costs:
    """What so many rows of prompts have added to a step, in seconds: a median for each number of bits of the number."""

    def __init__(self) -> None:
        self._found: dict[int, deque[tuple[int, float]]] = {}

    def add(self, rows: int, seconds: float) -> None:
        self._found.setdefault(rows.bit_length(), deque(maxlen=MEASURED)).append((rows, seconds))

    def has(self, rows: int) -> bool:
        """Whether about so many were measured."""
        return rows.bit_length() in self._found

    def of(self, rows: int) -> float:
        """Of so many rows: on the line between two sizes that were measured; of fewer than all of them as of the least
        one, of more by the price of one row of the greatest. Infinite where nothing was measured.
        """
        if not self._found:
            return math.inf
        known = [self._found[bits] for bits in sorted(self._found)]
        sizes = [statistics.median(rows for rows, _ in found) for found in known]
        seconds = [statistics.median(seconds for _, seconds in found) for found in known]
        return float(np.interp(rows, sizes, seconds)) * max(1.0, rows / sizes[-1])


@dataclass
class _Company:
    """Steps of one size of company: times in seconds of those without prompt rows, and when the last one was.

    ``costs``: of prompt rows beside it. ``bound``: a number that was too large, which counts until step ``until``; it
    has been so for ``patience`` steps.
    """

    alone: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    costs: _Costs = field(default_factory=_Costs)
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
        self._apart = _Costs()  # of prompt rows with nobody beside them
        self._steps = 0

    def rows(self, answers: int) -> int:
        """Prompt rows beside so many running answers; 0 where a step without any is to be measured first."""
        company = self._companies.get(answers.bit_length())
        if company is None or self._steps - company.step >= MEASURE_AGAIN:
            return 0
        return self._rows

    def at_once(self, answers: int, rows: int, prompts: int) -> int:
        """Of ``rows`` that are all that is left of so many prompts, those that the next step may have; 0 for none.

        What is compared is how long answers and prompts wait, all together: for one step that is longer, or for as
        many as ``rows`` gives, through which answers go on.
        """
        company = self._companies.get(answers.bit_length())
        if company is None or not company.alone or not company.costs.has(self._rows):
            return 0
        rows = min(rows, self._most)
        cost = self._cost(company, rows)
        while cost > HELD_UP_S:
            rows = int(rows * HELD_UP_S / cost)  # 0 at the end, where even few take longer
            cost = self._cost(company, rows) if rows else 0.0
        alone = statistics.median(company.alone)
        steps = math.ceil(rows / self._rows)
        each = company.costs.of(self._rows)
        at_once = answers * cost + prompts * (alone + cost)
        in_turns = steps * (answers * each + prompts * (alone + each))
        return rows if steps > 1 and at_once < in_turns else 0

    def _cost(self, company: _Company, rows: int) -> float:
        """No less than what so many rows will add."""
        return min(company.costs.of(rows), self._apart.of(rows))

    def measured_apart(self, answers: int, rows: int, seconds: float) -> None:
        """A step of prompt rows by themselves has held up so many running answers for so long: as if beside them."""
        company = self._companies.get(answers.bit_length())
        if company is not None and company.alone:
            self.measured(answers, rows, seconds + statistics.median(company.alone))

    def measured(self, answers: int, rows: int, seconds: float) -> None:
        """A step of so many running answers, and of so many prompt rows beside them, has taken so long."""
        self._steps += 1
        if not answers:
            self._apart.add(rows, seconds)
            return
        company = self._companies.setdefault(answers.bit_length(), _Company())
        if not rows:
            company.alone.append(seconds)
            company.step = self._steps
        elif company.alone:
            without = statistics.median(company.alone)
            allowed, taken = (self._slowdown - 1) * without, max(0.0, seconds - without)
            company.costs.add(rows, taken)
            if rows > self._rows:  # prompts at once, or beside answers that nobody follows
                return
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
