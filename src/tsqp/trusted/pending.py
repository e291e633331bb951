"""Products under way. The decoder yields them, so that other work can run while one waits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Pending(Protocol):
    """A product that was asked for."""

    def wait(self) -> torch.Tensor:
        """The product. Blocks until it is there; may raise any ChannelError. Called once."""


# A computation that hands out its products and is resumed with each result.
Steps = Generator[Pending, torch.Tensor, T]


class Deferred:
    """A product computed here, when it is waited for."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute

    def wait(self) -> torch.Tensor:
        return self._compute()


class Joined:
    """Several products under way at once, concatenated along the last dimension."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    def wait(self) -> torch.Tensor:
        return torch.cat([part.wait() for part in self._parts], dim=-1)


def run(steps: Steps[T]) -> T:
    """Run one computation to its end, waiting for each product in turn."""
    try:
        pending = next(steps)
        while True:
            pending = steps.send(pending.wait())
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
