"""The headings of ``--help``, in the order in which they are printed."""

from __future__ import annotations

from cyclopts import Group

TEXT, MODEL, PRIVACY, PADS, CONNECTION, SAMPLING, OUTPUT = (
    Group(title, sort_key=place)
    for place, title in enumerate(
        ("Prompt", "Model and split", "Privacy", "Pads", "Worker connection", "Sampling", "Output")
    )
)
