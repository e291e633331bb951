"""Results as pictures: horizontal bars with their values, one panel per unit."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsqp.api.trace_file import check_output
from tsqp.errors import OptionError

OURS, PEER, LIMIT = "#3366aa", "#999999", "#d9b44a"


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


class Chart(NamedTuple):
    """One picture."""

    title: str
    panels: Sequence[Panel]


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

    heights = [0.8 + 0.42 * len(panel.bars) for panel in chart.panels]
    figure = Figure(figsize=(8.0, 0.5 + sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(chart.title, fontsize=11)
    rows = figure.subplots(len(chart.panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(rows[:, 0], chart.panels, strict=True):
        _bars(axes, panel)
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


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
