"""The options that every benchmark has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tsqp.config.dtype import AskedDtype, PlainDtype

TransportName = Literal["mem", "ipc", "tcp", "shm"]
# ours: linear in bfloat16, for what claims to be faster than that
PeerName = Literal["transformers", "ours", "none"]


def benchmarked(dtype: AskedDtype) -> PlainDtype:
    """What a benchmark computes in: bfloat16, which the field compares, unless it is told otherwise."""
    return "bfloat16" if dtype == "auto" else dtype


@Parameter(name="*")
@dataclass(frozen=True)
class BenchOptions:
    """How often, and what is done with the result."""

    runs: Annotated[int, Parameter(help="How many times; the median counts.")] = 5
    json: Annotated[
        bool, Parameter(help="Print one JSON object as the last line of standard output, the table on standard error.")
    ] = False
    plot: Annotated[Path | None, Parameter(help="Draw the result into this .png file; needs the bench extra.")] = None
