"""Products as ``tsqp plan`` counts them: what a weight takes to be read, and what it takes for each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tsqp.plan.constants import FEW_ROWS, ProductTimes


def least_seconds(works: Sequence[Callable[[], object]], runs: int) -> float:
    """The shortest time of one of ``works``, each done ``runs`` times, in turn, after one time that does not count.

    The shortest: others may use the cores, and a short piece of work is sometimes left alone.
    """
    times = []
    for turn in range(runs + 1):
        for work in works:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start if turn else float("inf"))
    return min(times)


@dataclass(frozen=True)
class Products:
    """All products of passes through one model: of a row, of 16 rows, and of a prompt of ``prompt`` rows.

    ``one_s``, ``few_s``, ``many_s``: seconds of each. ``calls``: products of a pass. ``layers``, ``head``: weights.
    ``numbers``: of a row of all layers, in and out.
    """

    calls: int
    layers: int
    head: int
    numbers: int
    prompt: int
    one_s: float
    few_s: float
    many_s: float


def fitted(narrow: Products, wide: Products) -> ProductTimes:
    """Constants by which two models take what they were measured to. No time is below 0.

    Calls and numbers weigh more in a narrow model, weights in a wide one. What a weight takes for each of few rows is
    the wide one's.
    """
    each = (narrow, wide)
    call_s, row_s = solved(*((one.calls, one.layers + one.head, one.one_s) for one in each))
    few_s = (wide.few_s - wide.calls * call_s) / (wide.layers + wide.head) - row_s
    few_s = min(row_s, max(0.0, few_s / (FEW_ROWS - 1)))
    weight_s = row_s - few_s
    rests = [one.many_s - one.calls * call_s - one.head * row_s - one.layers * weight_s for one in each]
    number_s, many_s = solved(
        *((one.prompt * one.numbers, one.prompt * one.layers, rest) for one, rest in zip(each, rests, strict=True))
    )
    return ProductTimes(call_s, weight_s, few_s, many_s, number_s)


def solved(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float]:
    """x and y of a·x + b·y = t, twice, neither below 0: where one would be, it is 0 and the other fits both times.

    Each is (a, b, t) with a and b above 0; a share of a time counts the same in both.
    """
    scaled = [(a / t, b / t) for a, b, t in (one, other) if t > 0]
    if len(scaled) < 2:
        return 0.0, 0.0
    (a, b), (c, d) = scaled
    determinant = a * d - b * c
    if determinant:
        x, y = (d - b) / determinant, (a - c) / determinant
        if min(x, y) >= 0:
            return x, y
        if y < 0:
            return (a + c) / (a * a + c * c), 0.0
    return 0.0, (b + d) / (b * b + d * d)
