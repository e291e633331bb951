"""The form of every table of figures."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table


def new_table(title: str, columns: Iterable[str]) -> Table:
    """A table of rows with a name and a figure for each of ``columns``."""
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("")
    for column in columns:
        found.add_column(column, justify="right")
    return found
