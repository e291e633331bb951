"""Where results go, and where and with what they were measured."""

from __future__ import annotations

from pathlib import Path

from tsqp.bench.machine import machine

__all__ = ["RESULTS", "machine"]

RESULTS = Path(__file__).parent / "results"
