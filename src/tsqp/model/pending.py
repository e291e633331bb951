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

    def release(self) -> None:
        """Say that nobody will look at the product, or at its input, again: another product may have their memory.

        May be left out, as after an error. Does nothing a second time.
        """


# A computation that hands out its products and is resumed with each result.
Steps = Generator[Pending, torch.Tensor, T]


class NotKept:
    """A product in memory that no other will have while anything refers to it."""

    def release(self) -> None:
        """See ``Pending``: there is nothing to say."""


class Deferred(NotKept):
    """A product computed here, when it is waited for."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute

    def wait(self) -> torch.Tensor:
        return self._compute()


class Private(NotKept):
    """A product in memory of its own, which its caller may change."""

    def __init__(self, product: Pending) -> None:
        self._product = product

    def wait(self) -> torch.Tensor:
        product = self._product.wait().clone()
        self._product.release()
        return product


class Joined(NotKept):
    """Several products under way at once, concatenated along the last dimension."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    def wait(self) -> torch.Tensor:
        return torch.cat([part.wait() for part in self._parts], dim=-1)


class CacheBarrier(NotKept):
    """Not a product: a place that computations under way together pass in their order; see ``interleaved``."""

    def wait(self) -> torch.Tensor:
        return _NOTHING


CACHE_BARRIER = CacheBarrier()
_NOTHING = torch.empty(0)


def interleaved(parts: Sequence[Steps[None]]) -> Steps[None]:
    """Several computations as one: each runs while the others wait for their products.

    They go round, one product each. None passes its n-th ``CACHE_BARRIER`` before the one in front of it has: what a
    part reads behind a barrier, the parts in front of it have written before theirs.
    """
    if len(parts) == 1:  # nothing to take turns with: its barriers are handed out, and wait for nothing
        yield from parts[0]
        return
    under_way = [_Part(steps) for steps in parts]
    while any(part.pending is not None for part in under_way):
        for index, part in enumerate(under_way):
            if part.pending is not None and part.pending is not CACHE_BARRIER:
                part.go_on((yield part.pending))
            front = under_way[index - 1] if index else None
            while part.pending is CACHE_BARRIER and (
                front is None or front.pending is None or front.barriers > part.barriers
            ):
                part.barriers += 1
                part.go_on(_NOTHING)


class _Part:
    """One of several computations: what it waits for, None at its end, and how many barriers it has passed."""

    def __init__(self, steps: Steps[None]) -> None:
        self._steps = steps
        self.barriers = 0
        self.pending: Pending | None = next(steps, None)

    def go_on(self, product: torch.Tensor) -> None:
        try:
            self.pending = self._steps.send(product)
        except StopIteration:
            self.pending = None


def run(steps: Steps[T]) -> T:
    """Run one computation to its end, waiting for each product in turn."""
    try:
        pending = next(steps)
        while True:
            pending = steps.send(pending.wait())
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
