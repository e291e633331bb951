"""The dealer of a masked run: where it is, how it is reached, and that it is not the worker.

Covers: a dealer with the worker's address or key is refused before anything is sent; a line that the worker's host can
read is refused unless it was asked for; an error of its line names the dealer (tests/api/test_dealer.py). Does not
cover: two addresses and two keys of one party. Assumes: the dealer's public key came from the party that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tsqp.api.guard_config import GuardConfig
from tsqp.errors import ChannelError, OptionError
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.transport import connect
from tsqp.wire.transport.address import Address, parse_address
from tsqp.wire.transport.keys import ClientKeys, load_public, load_secret


@dataclass(frozen=True)
class Dealer:
    """One dealer. ``security`` is None where there is no separation: then whoever runs the worker may read the line."""

    address: Address
    security: ClientKeys | None

    @classmethod
    def check(cls, options: GuardConfig, worker: str | None, security: ClientKeys | None) -> Dealer | None:
        """The dealer that ``options`` name, None for none; ``worker`` and ``security``: how the worker is reached.

        Raises OptionError, AddressError.
        """
        if options.dealer is None:
            return None
        address = parse_address(options.dealer)
        if worker is not None and _same_place(address, parse_address(worker)):
            raise OptionError(f"the dealer {address} is the worker itself: a dealer must be another party's")
        keys = _keys(options, address, security)
        if keys is not None and security is not None and keys.worker == security.worker:
            raise OptionError(f"the dealer {address} has the worker's key: a dealer must be another party's")
        return cls(address, keys)

    @property
    def separated(self) -> bool:
        """Whether the line to the dealer is closed to whoever runs the worker."""
        return self.security is not None

    def dial(self, wrap: Callable[[Channel], Channel] | None = None) -> Channel:
        """A channel to the dealer, with what ``wrap`` puts in front. Raises AddressError, WorkerUnreachable."""
        with _named():
            channel = DealerChannel(connect(str(self.address), security=self.security))
        return channel if wrap is None else wrap(channel)


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


def _keys(options: GuardConfig, address: Address, security: ClientKeys | None) -> ClientKeys | None:
    """What the dealer is reached with, None without separation. Raises OptionError, AddressError."""
    if options.dealer_key is not None:
        if address.transport != "tcp":
            raise OptionError(f"the dealer {address} is not tcp: leave out --dealer-key")
        if options.dealer_no_separation:
            raise OptionError("the dealer is reached by tcp with keys: leave out --dealer-no-separation")
        own = security.own if options.own_key is None and security is not None else None
        if own is None and options.own_key is None:
            raise OptionError("a dealer with a key needs this side's secret key too: --key FILE, own_key in Python")
        return ClientKeys(own or load_secret(Path(str(options.own_key))), load_public(Path(options.dealer_key)))
    if address.transport == "tcp" and not address.is_loopback:
        raise OptionError(f"the dealer {address} is not on this host: give its public key by --dealer-key FILE")
    if not options.dealer_no_separation:
        raise OptionError(
            f"whoever runs the worker may read the line to the dealer {address}, and then everything: use tcp with "
            "--dealer-key, or --dealer-no-separation for a test"
        )
    return None


def _same_place(one: Address, other: Address) -> bool:
    """Whether two addresses lead to the same socket, as far as they tell."""
    if "mem" in (one.transport, other.transport):
        return one == other
    if one.transport == other.transport == "tcp":
        same_host = one.host == other.host or (one.is_loopback and other.is_loopback)
        return same_host and one.port == other.port
    if "tcp" in (one.transport, other.transport):
        return False
    return one.path.resolve() == other.path.resolve()
