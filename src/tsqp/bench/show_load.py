"""The result of ``bench load`` as tables and as curves of throughput against latency."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tsqp.bench.plot import Chart, Curve, Curves, Place
from tsqp.bench.tables import new_table

Result = dict[str, Any]
COLUMNS = ("tokens/s", "first token", "95 %", "token", "95 %", "answers", "refused")


def load_tables(result: Result) -> RenderableType:
    """What HTTP adds, the sweep, and arrivals by chance; times in milliseconds."""
    return Group(_beside_library(result), _under_load(result))


def load_chart(result: Result) -> Chart:
    """Throughput against latency; each curve goes from little load to much."""
    title = f"Under load: {result['model']}, {result['machine']['cpu']}"
    panels = [
        Curves("time of a token, median", "ms", list(_curves(result, "token", "p50_s"))),
        Curves("time to the first token, 95 of 100 wait no longer", "ms", list(_curves(result, "first", "p95_s"))),
    ]
    return Chart(title, panels)


def _beside_library(result: Result) -> Table:
    found = new_table(f"one answer at a time: {_what(result)}", ("library, ms a token", "HTTP", "HTTP / library"))
    for mode, row in result["http"].items():
        found.add_row(mode, f"{row['library_s'] * 1e3:.4g}", f"{row['http_s'] * 1e3:.4g}", f"{row['ratio']:.3f}")
    return found


def _under_load(result: Result) -> Table:
    """One row for each number of streams, then one for each rate of arrivals."""
    found = new_table(f"under load, prompts of {result['tokens']} tokens, answers of {result['steps'] + 1}", COLUMNS)
    for name, points in result["sweep"].items():
        for point in points:
            found.add_row(f"{name}, {point['streams']}", *_cells(point))
    for mode, points in result["arrivals"].items():
        for point in points:
            found.add_row(f"{mode}, {point['asked_per_s']:.3g}/s, {point['share']:g}", *_cells(point))
    found.caption = (
        "so many clients at once; requests by chance, so many a second, at that share of the best throughput, from the "
        "moment drawn for each; times in ms, medians and what 95 of 100 do not exceed"
    )
    for mode, made in result["made_pads"].items():
        found.caption += f"; {mode}: pads ready, those of {made['made_per_s']:.0f} tokens a second made in idle time"
    return found


def _cells(point: Result) -> Iterator[str]:
    yield f"{point['tokens_per_s']:.1f}"
    for kind in ("first", "token"):
        for share in ("p50_s", "p95_s"):
            yield "" if point[kind] is None else _ms(point[kind][share])
    yield from (str(point["answers"]), str(point["refused"]))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _curves(result: Result, kind: str, share: str) -> Iterator[Curve]:
    ours = set(result["http"])
    for name, points in result["sweep"].items():
        yield Curve(name, _places(points, kind, share, "streams"), name in ours)
    for mode, points in result["arrivals"].items():
        yield Curve(
            f"{mode}, requests by chance, at a share of the best",
            _places(points, kind, share, "share"),
            True,
            dashed=True,
        )


def _places(points: Iterable[Result], kind: str, share: str, label: str) -> list[Place]:
    served = (point for point in points if point[kind] is not None)
    return [Place(point["tokens_per_s"], point[kind][share] * 1e3, f"{point[label]:g}") for point in served]


def _what(result: Result) -> str:
    return f"{result['model']}, {result['machine']['cpu']}"
