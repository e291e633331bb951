"""What is known of the workers of a cluster, from what each of them says once a second. Pure: the clock is an argument.

A worker that is silent leaves the roster. One that says something new replaces what was said under its number, so that
a number is in the roster once.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tsqp.wire.roster import Member

SILENCE_S = 5.0  # after which a worker counts as lost; it speaks once a second
State = Literal["starting", "listening", "lost"]


class Said(msgspec.Struct, frozen=True):
    """What a worker says of itself. ``incarnation``: another for each process that was started under its number."""

    number: int
    incarnation: str
    member: Member
    node: str
    pid: int


class Entry(msgspec.Struct, frozen=True):
    """A line of ``tsqp cluster status``."""

    number: int
    shard: str
    state: State
    restarts: int
    node: str | None = None
    pid: int | None = None
    address: str | None = None
    key: str | None = None


class Book:
    """The workers that are expected, what was heard of them, and the epoch of the roster."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._expected: dict[int, str] = {}  # number to shard
        self._said: dict[int, Said] = {}
        self._heard_s: dict[int, float] = {}
        self._restarts: dict[int, int] = {}
        self._listed: frozenset[Member] = frozenset()

    def expect(self, shards: dict[int, str]) -> None:
        """These workers, by number, and no others: what the others said is forgotten, and what they will say."""
        self._expected = dict(shards)
        for known in (self._said, self._heard_s, self._restarts):
            for number in known.keys() - shards.keys():
                del known[number]

    def hear(self, said: Said, now_s: float) -> None:
        """A worker speaks. One that is not expected, or with another shard, is not heard."""
        if self._expected.get(said.number) != said.member.shard:
            return
        before = self._said.get(said.number)
        if before is not None and before.incarnation != said.incarnation:
            self._restarts[said.number] = self._restarts.get(said.number, 0) + 1
        self._said[said.number] = said
        self._heard_s[said.number] = now_s

    def members(self, now_s: float) -> tuple[Member, ...]:
        """The workers that listen, by number. Each change has a higher ``epoch``."""
        listening = sorted(number for number in self._said if self._listens(number, now_s))
        # A worker may have the address of one that is gone and not yet missed. Who was heard last is there.
        latest = {self._said[number].member.name: number for number in sorted(listening, key=self._heard_s.__getitem__)}
        found = tuple(self._said[number].member for number in listening if number in latest.values())
        if frozenset(found) != self._listed:
            self._listed = frozenset(found)
            self.epoch += 1
        return found

    def entries(self, now_s: float) -> list[Entry]:
        """All that are expected, by number."""
        return [self._entry(number, now_s) for number in sorted(self._expected)]

    def _listens(self, number: int, now_s: float) -> bool:
        return number in self._said and now_s - self._heard_s[number] < SILENCE_S

    def _entry(self, number: int, now_s: float) -> Entry:
        said, restarts = self._said.get(number), self._restarts.get(number, 0)
        if said is None:
            return Entry(number, self._expected[number], "starting", restarts)
        state: State = "listening" if self._listens(number, now_s) else "lost"
        member = said.member
        return Entry(number, member.shard, state, restarts, said.node, said.pid, member.address, member.key)
