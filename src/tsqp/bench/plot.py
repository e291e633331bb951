"""Results as pictures: horizontal bars with their values, one panel per unit; or curves over throughput."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsqp.api.trace_file import check_output
from tsqp.errors import OptionError

OURS, PEER, LIMIT = "#3366aa", "#999999", "#d9b44a"
OURS_CURVES, PEER_CURVES = ("#3366aa", "#b0413e"), ("#999999", "#555555", "#bbbbbb")
CURVES_INCHES = 3.2


class Bar(NamedTuple):
    """One value. ``samples``: the single runs, drawn as dots."""

    label: str
    value: float
    colour: str = OURS
    samples: Sequence[float] = ()


class Panel(NamedTuple):
    """Bars of one unit; ``title`` names the quantity, ``unit`` stands on the axis."""

    title: str
    unit: str
    bars: Sequence[Bar]


class Place(NamedTuple):
    """A point of a curve, and what stands beside it."""

    x: float
    y: float
    label: str


class Curve(NamedTuple):
    """Points in their order. ``ours``: in a colour of its own; peers are grey."""

    label: str
    places: Sequence[Place]
    ours: bool
    dashed: bool = False


class Curves(NamedTuple):
    """Curves over tokens a second; ``title`` names the quantity, ``unit`` stands on its axis, which is logarithmic."""

    title: str
    unit: str
    curves: Sequence[Curve]


class Chart(NamedTuple):
    """One picture."""

    title: str
    panels: Sequence[Panel | Curves]


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn later. Raises OptionError."""
    if path is None:
        return
    check_output("--plot", path, ".png")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'tsqp[bench]'")


def draw(chart: Chart, path: Path) -> None:
    """Write a PNG. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [0.8 + 0.42 * len(panel.bars) if isinstance(panel, Panel) else CURVES_INCHES for panel in chart.panels]
    figure = Figure(figsize=(8.0, 0.5 + sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(chart.title, fontsize=11)
    rows = figure.subplots(len(chart.panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(rows[:, 0], chart.panels, strict=True):
        if isinstance(panel, Panel):
            _bars(axes, panel)
        else:
            _curves(axes, panel)
    found = dict(zip(*reversed(rows[-1, 0].get_legend_handles_labels()), strict=True))
    if found:  # curves: those of the last panel are those of all
        figure.legend(found.values(), found, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path)


def _bars(axes: Any, panel: Panel) -> None:
    places = range(len(panel.bars))
    axes.barh(places, [bar.value for bar in panel.bars], color=[bar.colour for bar in panel.bars], height=0.6)
    widest = max((max([bar.value, *bar.samples]) for bar in panel.bars), default=0.0) or 1.0
    for place, bar in zip(places, panel.bars, strict=True):
        axes.plot(bar.samples, [place] * len(bar.samples), "o", color="black", markersize=2.5, alpha=0.6)
        end = max([bar.value, *bar.samples])
        axes.text(end + 0.012 * widest, place, _number(bar.value), va="center", fontsize=9)
    axes.set_yticks(places, [bar.label for bar in panel.bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.14)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.unit, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, panel: Curves) -> None:
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys((curve.ours, curve.label.partition(", ")[0]) for curve in panel.curves))
    looks = _looks(names)
    for curve in panel.curves:
        colour, marker = looks[curve.ours, curve.label.partition(", ")[0]]
        across, up = [place.x for place in curve.places], [place.y for place in curve.places]
        line, small = ("--", 3) if curve.dashed else ("-", 4)
        axes.plot(across, up, line, marker=marker, color=colour, linewidth=1.3, markersize=small, label=curve.label)
        for place in curve.places:
            axes.annotate(place.label, (place.x, place.y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("tokens a second, of all together", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _looks(names: Sequence[tuple[bool, str]]) -> dict[tuple[bool, str], tuple[str, str]]:
    """A colour and a marker for each, ours in colours of their own."""
    colours = {True: itertools.cycle(OURS_CURVES), False: itertools.cycle(PEER_CURVES)}
    markers = {True: itertools.cycle("os"), False: itertools.cycle("^vDx")}
    return {(ours, name): (next(colours[ours]), next(markers[ours])) for ours, name in names}


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
