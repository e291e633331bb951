"""The headings of ``--help``, in the order in which they are printed."""

from __future__ import annotations

from cyclopts import Group

TEXT, SERVER, LIMITS, MODEL, PRIVACY, PADS, CONNECTION, SAMPLING, OUTPUT = (
    Group(title, sort_key=place)
    for place, title in enumerate(
        (
            "Prompt",
            "Server",
            "Limits of the server",
            "Model and split",
            "Privacy",
            "Pads",
            "Worker connection",
            "Sampling",
            "Output",
        )
    )
)
