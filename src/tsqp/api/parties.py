"""The other parties of a run, its workers and dealers: where they are to be had, and how each is dialled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tsqp.api.arena import arena_for
from tsqp.api.config import WorkerConfig, is_roster
from tsqp.api.dealer import Connect, Dealer, DealerRoster, Party, check_apart, client_keys, dial_dealers, member_keys
from tsqp.api.places import Dialled, Place, Standing, StartedHere
from tsqp.api.plan import Plan
from tsqp.api.roster_place import RosterPlace
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.config.model import ModelConfig
from tsqp.errors import OptionError
from tsqp.launch.local import LocalWorker
from tsqp.trusted.tap import Taps
from tsqp.wire.channel import Channel
from tsqp.wire.roster import Member
from tsqp.wire.transport.front import find_roster, parse_roster_address
from tsqp.wire.transport.keys import ClientKeys, load_public, load_secret
from tsqp.wire.transport.users import user_id


class Channels:
    """Opens the channels of a run: ``connect`` does it, and this knows with which keys, which arena and which tap.

    ``dealer``: who makes the pads' products; None where this process does, or there are none. ``taps``: None where no
    request may have one. Raises AddressError, OptionError and PathRefused; nothing is opened yet.
    """

    def __init__(self, plan: Plan, connect: Connect, *, taps: bool) -> None:
        self.worker, self.connect = plan.run.worker, connect
        self.dealer = Dealer.of(plan.run) or DealerRoster.of(plan.run)
        self.taps = _new_taps(plan) if taps else None
        self._keys = client_keys(self.worker.key, self.worker.server_key)  # for a worker that no roster names
        self._user = None if self.worker.user is None else user_id(self.worker.user, "worker.user")

    def to_worker(
        self, address: str, pid: int | None = None, *, security: ClientKeys | None = None, sharing: int = 1
    ) -> Channel:
        """A channel to a worker, which may still be loading over shm and cuda. Raises ChannelError.

        ``pid``: of one started here; ``security``: for one that a roster names; ``sharing``: see ``fitting_arena``.
        """
        tcp = address.startswith("tcp://")
        channel = self.connect(
            address,
            security=security or (self._keys if tcp else None),
            insecure_plain_tcp=self.worker.insecure_plain_tcp and tcp and security is None,
            arena_bytes=arena_for(address, self.worker.arena_bytes, pid, sharing),
            user=self._user if address.startswith(("shm://", "cuda://")) else None,
        )
        return channel if self.taps is None else self.taps.wrap(channel)


def _new_taps(plan: Plan) -> Taps:
    """Raises OptionError for a roster, and for any partition but ``linear``."""
    if any(map(is_roster, plan.run.worker.addresses)):
        raise OptionError(
            "a tap shows the rows of one worker, and a roster names several: give one worker.address",
            fields=("worker.address",),
        )
    if plan.partition is not None and plan.partition.name != "linear":
        raise OptionError(
            f"a tap shows rows of linear layers: it needs compute.partition linear, not {plan.partition.name}",
            fields=("compute.partition",),
        )
    return Taps()


def worker_places(plan: Plan, model: str, channels: Channels) -> list[Place]:
    """Where workers are to be had, in turn; ``model`` is where the checkpoint is. Raises AddressError, PathRefused."""
    worker, threads = plan.run.worker, plan.run.compute.threads
    if plan.partition is None:
        return []
    if worker.addresses and is_roster(worker.addresses[0]):
        return [_worker_roster(model, channels)]
    if worker.addresses:
        return [Standing(address, channels.to_worker) for address in worker.addresses]

    def start() -> LocalWorker:
        dtype = plan.linear_dtype
        return LocalWorker(model, device=worker.device, dtype=dtype, threads=threads, compiled=worker.compiled)

    return [StartedHere(start, channels.to_worker, spare=worker.spare)]


def _worker_roster(model: str, channels: Channels) -> RosterPlace:
    address, own = parse_roster_address(channels.worker.addresses[0]), channels.worker.key
    pair = None if own is None else load_secret(Path(own))

    def dial(member: Member, sharing: int) -> Channel:
        return channels.to_worker(member.address, security=member_keys(pair, member), sharing=sharing)

    return RosterPlace(
        address,
        lambda: find_roster(address),
        dial,
        lambda: open_checkpoint(model).config,
        has_key=pair is not None,
    )


def dialling_dealers(
    channels: Channels, config: ModelConfig, places: Sequence[Place]
) -> tuple[Callable[[Until], Sequence[Dialled]] | None, RosterPlace | None]:
    """How the dealers of a run are dialled, None without any; and where several are to be had, None for one.

    None is dialled that is known to be at one of ``places``: RosterError.
    """
    worker, dealer, connect = channels.worker, channels.dealer, channels.connect
    if dealer is None:
        return None, None
    if isinstance(dealer, DealerRoster):
        place = dealer.place(connect, lambda: config, lambda: _parties(worker, places), worker.arena_bytes)
        return partial(dial_dealers, place), place

    def dial(until: Until) -> Sequence[Dialled]:
        check_apart(dealer.party, _parties(worker, places))  # a roster may name it as a worker
        return [Dialled(dealer.dial(connect, worker.arena_bytes))]

    return dial, None


def _parties(worker: WorkerConfig, places: Sequence[Place]) -> Iterator[Party]:
    """Who the workers are, as far as is known now."""
    given = worker.server_key
    key = None if given is None else load_public(Path(given)).decode()
    for place in places:
        if isinstance(place, RosterPlace):
            members = () if place.roster is None else place.roster.workers
            yield from (Party(member.address, member.key) for member in members)
        elif isinstance(place, Standing):
            yield Party(place.name, key if place.name.startswith("tcp://") else None)
