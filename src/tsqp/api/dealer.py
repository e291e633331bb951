"""The lines of a run: how its worker is dialled, and its dealer, whose errors say that they are about the dealer.

Covers: an error of the dealer's line names the dealer (tests/api/test_dealer.py). Does not cover: which dealers are
refused; see ``rules.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tsqp.api.arena import arena_for
from tsqp.api.config import RunConfig
from tsqp.errors import ChannelError
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.transport.address import Address, parse_address
from tsqp.wire.transport.keys import ClientKeys, load_public, load_secret


class Connect(Protocol):
    """Opens a channel to a worker or a dealer; ``tsqp.wire.transport.connect`` is one."""

    def __call__(
        self,
        address: str,
        *,
        security: ClientKeys | None = None,
        insecure_plain_tcp: bool = False,
        arena_bytes: int | None = None,
        user: int | None = None,
    ) -> Channel:
        """``arena_bytes`` and ``user`` are given for shm alone. Raises ChannelError."""
        ...


@dataclass(frozen=True)
class Dealer:
    """One dealer. ``security`` is None where there is no separation: then whoever runs the worker may read the line."""

    address: Address
    security: ClientKeys | None

    @classmethod
    def of(cls, run: RunConfig) -> Dealer | None:
        """The dealer of a run that was checked, None for none. Raises AddressError."""
        if run.guard.dealer is None:
            return None
        return cls(parse_address(run.guard.dealer), client_keys(run.worker.key, run.guard.dealer_key))

    @property
    def separated(self) -> bool:
        """Whether the line to the dealer is closed to whoever runs the worker."""
        return self.security is not None

    def dial(self, connect: Connect, arena_bytes: int | None = None) -> Channel:
        """A channel to the dealer. ``arena_bytes`` is for shm. Raises AddressError, WorkerUnreachable."""
        address = str(self.address)
        with _named():
            return DealerChannel(connect(address, security=self.security, arena_bytes=arena_for(address, arena_bytes)))


def client_keys(own: Path | None, other: Path | None) -> ClientKeys | None:
    """The keys for one side by tcp, from their files; None without them. Raises AddressError."""
    return None if own is None or other is None else ClientKeys(load_secret(Path(own)), load_public(Path(other)))


class DealerChannel(ForwardingChannel):
    """See Channel. Transports speak of a worker; here their errors say that it is the dealer."""

    def reserve(self, size: int) -> memoryview:
        with _named():
            return super().reserve(size)

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        with _named():
            super().send(frames, reply_bytes)

    def receive(self, deadline_s: float) -> Frames:
        with _named():
            return super().receive(deadline_s)


@contextmanager
def _named() -> Iterator[None]:
    """Errors of the line, about the dealer."""
    try:
        yield
    except ChannelError as error:
        error.side = "dealer"
        raise
