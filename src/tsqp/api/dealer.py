"""The dealers of a run: with which keys each is dialled. Errors of their lines say that they are about a dealer.

Covers: an error of a dealer's line says so (tests/api/test_dealer.py); of a roster of dealers none is dialled that is
in the roster of the workers too, or whose line others may read (tests/api/test_dealer_roster.py). Does not cover: which
dealers are refused before there is a roster; see ``rules.py``. Assumes: whoever gives the roster of dealers, or the key
of their front, is the dealers' party.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tsqp.api.arena import arena_for
from tsqp.api.config import RunConfig, is_roster
from tsqp.api.places import Dialled
from tsqp.api.roster_place import RosterPlace
from tsqp.api.rules import same_place
from tsqp.api.until import Until
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, whole
from tsqp.errors import ChannelError, RosterError
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.forward import ForwardingChannel
from tsqp.wire.roster import Member, Roster
from tsqp.wire.transport.address import Address, parse_address
from tsqp.wire.transport.front import RosterAddress, find_roster, parse_roster_address
from tsqp.wire.transport.keys import ClientKeys, KeyPair, load_public, load_secret


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
        """``arena_bytes`` and ``user`` are given for shm and cuda alone. Raises ChannelError."""
        ...


@dataclass(frozen=True)
class Dealer:
    """One dealer. ``security`` is None where there is no separation: then whoever runs the worker may read the line."""

    address: Address
    security: ClientKeys | None

    @classmethod
    def of(cls, run: RunConfig) -> Dealer | None:
        """The dealer of a run that was checked, None for none, or for several. Raises AddressError."""
        if run.guard.dealer is None or is_roster(run.guard.dealer):
            return None
        return cls(parse_address(run.guard.dealer), client_keys(run.worker.key, run.guard.dealer_key))

    @property
    def party(self) -> Party:
        return Party(str(self.address), None if self.security is None else self.security.worker.decode())

    @property
    def separated(self) -> bool:
        """Whether the line to the dealer is closed to whoever runs the worker."""
        return self.security is not None

    def dial(self, connect: Connect, arena_bytes: int | None = None) -> Channel:
        """A channel to the dealer. ``arena_bytes`` is for shm. Raises AddressError, WorkerUnreachable."""
        address = str(self.address)
        with _named():
            return DealerChannel(connect(address, security=self.security, arena_bytes=arena_for(address, arena_bytes)))


class Party(NamedTuple):
    """Where somebody is, and the public key, as far as they are known."""

    address: str
    key: str | None


@dataclass(frozen=True)
class DealerRoster:
    """Several dealers. ``front``: the keys for whoever hands out their roster; ``own``: this side's pair.

    ``separated``: whether the line to each is closed to whoever runs the workers.
    """

    address: RosterAddress
    front: ClientKeys | None
    own: KeyPair | None
    separated: bool

    @classmethod
    def of(cls, run: RunConfig) -> DealerRoster | None:
        """The dealers of a run that was checked, None for one or none. Raises AddressError."""
        if run.guard.dealer is None or not is_roster(run.guard.dealer):
            return None
        key = run.worker.key
        return cls(
            parse_roster_address(run.guard.dealer),
            client_keys(key, run.guard.dealer_key),
            None if key is None else load_secret(Path(key)),
            not run.guard.dealer_no_separation,
        )

    def place(
        self,
        connect: Connect,
        config: Callable[[], ModelConfig],
        workers: Callable[[], Iterable[Party]],
        arena_bytes: int | None = None,
    ) -> RosterPlace:
        """Where they are to be had; ``workers`` gives who must not be among them, as far as that is known by then."""

        def dial(member: Member, sharing: int) -> Channel:
            with _named():
                return DealerChannel(
                    connect(
                        member.address,
                        security=member_keys(self.own, member),
                        arena_bytes=arena_for(member.address, arena_bytes, sharing=sharing),
                    )
                )

        return RosterPlace(
            self.address,
            lambda: find_roster(self.address, self.front),
            dial,
            config,
            check=lambda roster: self.check(roster, workers(), config()),
            has_key=self.own is not None,
        )

    def check(self, roster: Roster, workers: Iterable[Party], config: ModelConfig) -> None:
        """Raises RosterError for dealers that must not be asked for pads."""
        parties = list(workers)
        for member in roster.workers:
            if Shard.parse(member.shard) != whole(config):
                raise RosterError(f"the dealer {member.name} holds {member.shard}; a dealer holds all of a model")
            if self.separated and member.key is None:
                raise RosterError(
                    f"the roster has no key for the dealer {member.address}: whoever runs the worker may read the line "
                    "to it; guard.dealer_no_separation allows that for a test",
                    fields=("guard.dealer_no_separation",),
                )
            check_apart(Party(member.address, member.key), parties)


def check_apart(dealer: Party, workers: Iterable[Party]) -> None:
    """Raises RosterError for a dealer that is known to be one of the workers."""
    for worker in workers:
        same_key = worker.key is not None and worker.key == dealer.key
        if same_key or same_place(parse_address(worker.address), parse_address(dealer.address)):
            raise RosterError(
                f"the dealer {dealer.address} is a worker too: a dealer must be another party's", side="dealer"
            )


def dial_dealers(place: RosterPlace, until: Until) -> Sequence[Dialled]:
    """Channels to those that can be had. Raises ChannelError, which is about the dealers."""
    with _named():
        return place.dial(until)


def member_keys(own: KeyPair | None, member: Member) -> ClientKeys | None:
    """The keys for the line to somebody whom a roster names, None where it names no key."""
    return None if own is None or member.key is None else ClientKeys(own, member.key.encode())


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
