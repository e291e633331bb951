"""Workers and dealers that rosters name, put together: how each is dialled, and that no dealer is a worker too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from tsqp.api.config import RunConfig
from tsqp.api.dealer import Connect, Dealer, DealerRoster, Party, check_apart, dial_dealers, member_keys
from tsqp.api.places import Dialled, Place, Standing
from tsqp.api.roster_place import RosterPlace
from tsqp.api.until import Until
from tsqp.config.model import ModelConfig
from tsqp.wire.channel import Channel
from tsqp.wire.transport.front import find_roster, parse_roster_address
from tsqp.wire.transport.keys import ClientKeys, load_public, load_secret


class DialWorker(Protocol):
    """Opens a channel to a worker."""

    def __call__(self, address: str, *, security: ClientKeys | None, sharing: int) -> Channel:
        """``security``: None without keys for it. ``sharing``: see ``fitting_arena``. Raises ChannelError."""
        ...


def worker_roster(run: RunConfig, dial: DialWorker, config: Callable[[], ModelConfig]) -> RosterPlace:
    """The workers of a run whose address is that of a roster. Raises AddressError, PathRefused."""
    address, own = parse_roster_address(run.worker.addresses[0]), run.worker.key
    pair = None if own is None else load_secret(Path(own))
    return RosterPlace(
        address,
        lambda: find_roster(address),
        lambda member, sharing: dial(member.address, security=member_keys(pair, member), sharing=sharing),
        config,
        has_key=pair is not None,
    )


def dialling_dealers(
    dealer: Dealer | DealerRoster,
    run: RunConfig,
    connect: Connect,
    config: ModelConfig,
    places: Sequence[Place],
) -> tuple[Callable[[Until], Sequence[Dialled]], RosterPlace | None]:
    """How the dealers of a run are dialled, and where several are to be had; None for one.

    None is dialled that is known to be at one of ``places``: RosterError.
    """
    arena = run.worker.arena_bytes
    if isinstance(dealer, DealerRoster):
        place = dealer.place(connect, lambda: config, lambda: _parties(run, places), arena)
        return partial(dial_dealers, place), place

    def dial(until: Until) -> Sequence[Dialled]:
        check_apart(dealer.party, _parties(run, places))  # a roster may name it as a worker
        return [Dialled(dealer.dial(connect, arena))]

    return dial, None


def _parties(run: RunConfig, places: Sequence[Place]) -> Iterator[Party]:
    """Who the workers are, as far as is known now."""
    given = run.worker.server_key
    key = None if given is None else load_public(Path(given)).decode()
    for place in places:
        if isinstance(place, RosterPlace):
            members = () if place.roster is None else place.roster.workers
            yield from (Party(member.address, member.key) for member in members)
        elif isinstance(place, Standing):
            yield Party(place.name, key if place.name.startswith("tcp://") else None)
