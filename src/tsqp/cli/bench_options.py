"""The options that every benchmark has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class BenchOptions:
    """How often, and what is done with the result."""

    runs: Annotated[int, Parameter(help="How many times; the median counts.")] = 5
    json: Annotated[
        bool, Parameter(help="Print one JSON object as the last line of standard output, the table on standard error.")
    ] = False
    plot: Annotated[Path | None, Parameter(help="Draw the result into this .png file; needs the bench extra.")] = None
