"""Plans of the clusters that docs/scaling.md has tables of, and what one of them gives over another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from tsqp.errors import OptionError
from tsqp.plan.cluster import Link, Setting, teams
from tsqp.plan.constants import Constants
from tsqp.plan.passes import numbers_of
from tsqp.plan.report import plan
from tsqp.plan.shapes import shape_of

MODELS, WORKERS, BATCHES, DEVICES = ("8b", "70b", "405b"), (1, 8, 64, 1024), (1, 16), ("cpu", "h200")
LINK = Link(100e9 / 8, 1e-4)
PLAIN = replace(LINK, plain=True)
CORES, FEW_CORES = 32, 4  # of the trusted side
SHARED = 8  # workers, where the trusted side's own cores are compared with
KINDS = {"decode": ("decode", 1), "16 at once": ("decode", 16), "prefill": ("prefill", 16)}

Rates = dict[str, float]  # by KINDS


@dataclass(frozen=True)
class Plans:
    """Each plan of the tables, made once."""

    constants: Constants
    _made: dict[tuple[object, ...], dict[str, Any] | None] = field(default_factory=dict)

    def of(
        self, model: str, workers: int, link: Link, batch: int, device: str, cores: int = CORES
    ) -> dict[str, Any] | None:
        """Workers of 64 cores or with a GPU, a dealer for one in eight; None where the model does not fit."""
        asked = (model, workers, link, batch, device, cores)
        if asked not in self._made:
            self._made[asked] = self._plan(*asked)
        return self._made[asked]

    def _plan(self, model: str, workers: int, link: Link, batch: int, device: str, cores: int) -> dict[str, Any] | None:
        config, worker_cores = shape_of(model), 64 if self.constants.devices[device].cores else None
        dealers = max(1, workers // 8)
        setting = Setting(
            config, "masked", link, cores, device, worker_cores, dealers=dealers, batch=batch, prompt=1024
        )
        try:
            return plan(self.constants, setting, teams(config, workers, None, None, None))
        except OptionError:
            return None

    def rates(
        self, model: str, workers: int, link: Link, device: str, cores: int = CORES, of: str = "tokens_per_s"
    ) -> Rates | None:
        """Tokens a second of all kinds; ``of``: which figure of a plan."""
        found: Rates = {}
        for kind, (part, batch) in KINDS.items():
            made = self.of(model, workers, link, batch, device, cores)
            if made is None:
                return None
            found[kind] = made[part][of]
        return found


def follows(plans: Plans) -> Iterator[str]:
    """What one choice gives over another: the least and the most of all models and numbers of workers."""
    trusted, row_bytes = plans.constants.trusted, 4 * sum(numbers_of(shape_of("70b")))
    call_s = trusted.call_s
    yield (
        f"A call takes {call_s['tcp'] * 1e3:.2g} ms in Python over tcp, and {call_s['step'] * 1e3:.2g} ms in the "
        f"compiled step. A connection copies and enciphers {1e-9 / trusted.byte_s:.2g} GB/s, without keys "
        f"{1e-9 / trusted.plain_byte_s:.2g} GB/s; a row of 70B is {row_bytes / 1e6:.0f} MB."
    )
    yield ""
    kinds = ", ".join(KINDS)
    yield "| times as many tokens a second | " + " | ".join(f"{device}: {kinds}" for device in DEVICES) + " |"
    yield "|---|" + "---|" * len(DEVICES)
    compared: dict[str, list[tuple[Choice, Choice]]] = {
        "without keys, to with keys": [((workers, PLAIN), (workers, LINK)) for workers in WORKERS]
    }
    for fewer, more in pairwise(WORKERS):
        compared[f"{more:,} workers, to {fewer:,}"] = [((more, LINK), (fewer, LINK))]
    for title, pairs in compared.items():
        cells = (_spreads(plans, device, pairs) for device in DEVICES)
        yield f"| {title} | " + " | ".join(cells) + " |"
    yield ""
    columns = [(device, link) for device in DEVICES for link in (LINK, PLAIN)]
    heads = (f"{device}, {'without' if link.plain else 'with'} keys" for device, link in columns)
    yield f"| {SHARED} workers, to all in the TEE: {kinds} | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * len(columns)
    for model in MODELS:
        for cores in (FEW_CORES, CORES):
            gains = (plans.rates(model, SHARED, link, device, cores, "gain") for device, link in columns)
            cells = ("does not fit" if one is None else ", ".join(map(_gain, one.values())) for one in gains)
            yield f"| {model.upper()}, {cores} trusted cores | " + " | ".join(cells) + " |"


Choice = tuple[int, Link]  # workers and their link


def _spreads(plans: Plans, device: str, pairs: list[tuple[Choice, Choice]]) -> str:
    """Of each kind: how many times as much the first of a pair gives as the second, over all models."""
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for model in MODELS:
        for better, worse in pairs:
            more, less = (plans.rates(model, *choice, device) for choice in (better, worse))
            if more is not None and less is not None:
                for kind, values in ratios.items():
                    values.append(more[kind] / less[kind])
    return ", ".join(_spread(values) for values in ratios.values())


def _spread(values: list[float]) -> str:
    if not values:
        return "none fits"
    least, most = short(min(values)), short(max(values))
    return least if least == most else f"{least}–{most}"


def _gain(value: float) -> str:
    return f"**{short(value)}**" if value > 1 else short(value)


def short(value: float) -> str:
    """Two digits, or all of a whole number that has more."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
