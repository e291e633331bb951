"""What a benchmark of a model runs, and the times that it finds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsqp.errors import OptionError


@dataclass(frozen=True)
class Workload:
    """A prompt of ``tokens``, then ``steps`` decode steps; ``runs`` times for each side."""

    tokens: int
    steps: int
    runs: int

    def check(self) -> None:
        """Raises OptionError."""
        for name, value, least in (("tokens", self.tokens, 1), ("steps", self.steps, 0), ("runs", self.runs, 1)):
            if value < least:
                raise OptionError(f"--{name} must be at least {least}, not {value}")

    def prompt(self) -> list[int]:
        """Token ids below 256, which every vocabulary has; the same ones each time."""
        return torch.randint(0, 256, (self.tokens,), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass
class Measured:
    """Seconds of every run: of prefill, and of one decode step."""

    prefill: list[float]
    decode: list[float]

    @classmethod
    def empty(cls) -> Measured:
        return cls([], [])

    def add(self, prefill_s: float, decode_s: float, steps: int) -> None:
        self.prefill.append(prefill_s)
        if steps:
            self.decode.append(decode_s / steps)
