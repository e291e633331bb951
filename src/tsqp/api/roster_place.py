"""Workers that a roster names: ``docs/cluster.md`` §3 and §4.

Covers: a worker that was expelled is not dialled again, wherever a roster names it; a worker that cannot be had costs
nothing where another holds the same shard; a roster whose workers do not make one model is refused by what is missing
(tests/api/test_roster_place.py). Does not cover: one party with two keys. Assumes: nothing of a roster.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

from tsqp.api.dialling import Dialling, Team
from tsqp.api.places import Dialled, RunElsewhere
from tsqp.api.until import Until
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, check_within
from tsqp.config.tiling import Tiling
from tsqp.errors import AddressError, OptionError, RosterError
from tsqp.wire.channel import Channel
from tsqp.wire.roster import Member, Roster
from tsqp.wire.transport.descriptors import connections_left
from tsqp.wire.transport.front import RosterAddress

MOST_REPLICAS = 4  # of a shard, in one team
MOST_CONNECTIONS = 256  # of one team: each has memory, two threads and some descriptors
MOST_EXPELLED = 64  # of a roster; then nobody there is asked again
DIAL_S = 60.0  # for all connections of one attempt, however many do not answer

log = logging.getLogger("tsqp.workers")


class RosterPlace(RunElsewhere):
    """See Place: all workers of a roster are one place.

    ``find`` reads the roster of the moment and raises RosterError; ``dial`` connects to one member, several at a time,
    each in a thread of its own, and is told how many of the team share memory with this process; ``config`` gives the
    model's shape; ``shuffle`` brings those with the same shard into an order, so that not all clients have the same
    ones. ``has_key``: whether there is a key to reach keys with. ``check`` raises RosterError for a roster that is to
    be refused. ``room``: how many connections can be made.
    """

    def __init__(
        self,
        address: RosterAddress,
        find: Callable[[], Roster],
        dial: Callable[[Member, int], Channel],
        config: Callable[[], ModelConfig],
        *,
        check: Callable[[Roster], None] = lambda roster: None,
        has_key: bool = True,
        shuffle: Callable[[list[Member]], None] = random.shuffle,
        room: Callable[[], int] = connections_left,
    ) -> None:
        self.name = str(address)
        self.roster: Roster | None = None  # the last one that was read
        self._find, self._dial, self._config = find, dial, config
        self._check, self._has_key, self._shuffle, self._room = check, has_key, shuffle, room
        self._expelled: set[str] = set()
        self._cheats = 0  # since an operator has looked
        self._team: tuple[str, ...] = ()  # the names of those who were dialled last

    def shards(self) -> Sequence[Shard]:
        """How the workers there are now divide the model; nothing for one that holds all. Raises as ``dial``."""
        team = self._arranged(self._asked())
        return [] if sum(map(len, team.values())) == 1 else list(team)

    def dial(self, until: Until) -> Sequence[Dialled]:
        """See Place: a worker for each shard, and its replicas, within ``DIAL_S`` and ``until``.

        Raises RosterError, WorkerUnreachable, AddressError; ChannelClosed where it was to stop.
        """
        roster = self._asked()
        self._check(roster)  # also the last one: what it is held against may have changed
        team = self._arranged(roster)
        replicas = self._replicas(team)
        sharing = sum(min(replicas, sum(map(_shares_memory, members))) for members in team.values())
        dialled = Dialling(lambda member: self._dial(member, sharing), team, replicas, until.within(DIAL_S)).channels()
        self._team = tuple(one.name for one in dialled)
        return dialled

    def expel(self, worker: str | None) -> str:
        """See Place: one of those who were dialled last; all of them where it is not known which one it was.

        All of them too once many were: whoever writes rosters has as many names as it likes, and each is a guess.
        """
        if worker is None and len(self._team) == 1:
            worker = self._team[0]
        self._cheats += 1
        if worker is None or worker not in self._team:
            return self.name
        self._expelled.add(worker)  # the last one too: whoever admits the others again does not mean it
        return worker if self._cheats <= MOST_EXPELLED else self.name

    def readmit(self, name: str) -> None:
        """See Place; as many names as at first may follow, if it is one of ours."""
        if name == self.name or name in self._expelled:
            self._expelled.discard(name)
            self._cheats = 0

    def _asked(self) -> Roster:
        """The roster of the moment, or the last one where none can be had. Raises RosterError where there was none."""
        try:
            roster = self._find()
        except RosterError as error:
            if self.roster is None:
                raise
            text = "%s; the roster of epoch %d is used"
            log.warning(text, error, self.roster.epoch, extra={"event": "roster_missing"})
            return self.roster
        if self.roster is None or roster.epoch != self.roster.epoch:
            log.info(
                "%s: epoch %d, %d workers", self.name, roster.epoch, len(roster.workers), extra={"event": "roster_read"}
            )
        self.roster = roster
        return roster

    def _arranged(self, roster: Roster) -> Team:
        """Who may be asked for which shard. Raises RosterError, and AddressError where this side has no key."""
        members = [member for member in roster.workers if member.name not in self._expelled]
        if not self._has_key and any(member.key for member in members):
            raise AddressError(
                f"the workers of {self.name} have keys: give this side's secret key by worker.key",
                fields=("worker.key",),
            )
        shards = [Shard.parse(member.shard) for member in members]
        several = len(set(shards))
        if several > MOST_CONNECTIONS:
            raise RosterError(
                f"{self.name}: the model is divided among {several} workers, and a team has at most {MOST_CONNECTIONS}"
            )
        config = self._config()
        try:
            tiling = Tiling(shards, config)
            for shard in tiling.shards:
                check_within(shard, config)
        except OptionError as error:
            expelled = sorted(self._expelled.intersection(member.name for member in roster.workers))
            more = f"; expelled: {', '.join(expelled)}" if expelled else ""
            raise RosterError(f"{self.name}: {error}{more}") from None
        team: Team = {shard: [] for shard in tiling.shards}
        for shard, member in zip(shards, members, strict=True):
            team[shard].append(member)
        for members in team.values():
            self._shuffle(members)
        return team

    def _replicas(self, team: Team) -> int:
        """How many of each shard are to be dialled. Raises RosterError where there is no room for one of each."""
        room = self._room()
        most = min(MOST_CONNECTIONS, room)
        replicas = min(MOST_REPLICAS, most // len(team))
        if replicas == 0:
            raise RosterError(
                f"{self.name}: a team of {len(team)} workers, and the limit on open files leaves room for {room}: "
                "raise it (ulimit -n)"
            )
        if replicas < min(MOST_REPLICAS, max(map(len, team.values()))):
            text = "%s: no more than %d of each shard are dialled, since there is room for %d connections"
            log.warning(text, self.name, replicas, most, extra={"event": "few_replicas"})
        return replicas


def _shares_memory(member: Member) -> bool:
    return member.address.startswith("shm://")
