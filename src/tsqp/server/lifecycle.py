"""Whether the server takes requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lifecycle:
    """One for each server. Once ``draining``, what is under way goes on and nothing new begins."""

    draining: bool = False
