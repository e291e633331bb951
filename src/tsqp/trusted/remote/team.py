"""Several workers that hold a model together, and are asked as if they were one: ``docs/cluster.md`` §2.

A call is masked once, into private memory. Each worker of its layer is sent the same rows, and its slice of the product
is put in its place beside the others, in private memory: what the guard checks is what it unmasks.

Covers: a row goes to each worker as it was masked, whoever is asked again (tests/trusted/remote/test_team.py); memory
of a connection is written once and never read back, a reply is read once (same file). Does not cover: who delays a
reply on purpose, who chooses with it which replica answers. Assumes: the guard checks each slice by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from typing import Final

import numpy as np
from msgspec.structs import asdict, replace

from tsqp.config.shard import Shard
from tsqp.config.tiling import Tiling
from tsqp.errors import (
    ArenaFull,
    ChannelClosed,
    ChannelError,
    CheckFailed,
    DeadlineExceeded,
    WorkerFailed,
    WorkerLost,
    forget_frames,
)
from tsqp.trusted.remote.members import Asked, Kind, Member, Part, TeamSlot
from tsqp.trusted.remote.session import call_name
from tsqp.trusted.remote.usual_time import UsualTime
from tsqp.trusted.stats import Stats
from tsqp.wire.messages import Call, Product
from tsqp.wire.slot import Slot

LOST = (WorkerLost, WorkerFailed, DeadlineExceeded)  # what a replica makes good
# Rows of a call for each replica, from which on a second one is asked for its share. By docs/scaling.md §1 a second one
# costs e and saves K·N·m·R/2: it pays from R = 2e/(K·N·m) on, 6 rows of `o` of the 1B shape and 76 of the 135M shape,
# on the cores of the packaged constants. So with 64 each it pays for both; a GPU multiplies more rows in the time e.
SHARE_ROWS: Final = 64
RACE_S = 0.001  # how long one of several replicas is waited for before the next is looked at
SLOW_S: Final = 10.0  # for so long who was too slow is asked last
NAMED = 4  # addresses in a text

log = logging.getLogger("tsqp.workers")


class TeamReply:
    """A call under way at some members."""

    def __init__(
        self, team: Team, kind: Kind, call: Product, slot: TeamSlot, parts: Sequence[Part], began: float
    ) -> None:
        self.kind: Kind = kind
        self.call = call
        self.slot = slot
        self.parts = parts
        self.began = began
        self._team = team

    def wait(self) -> memoryview:
        """The product, in private memory until the next call from its slot. Raises any ChannelError. Called once."""
        return self._team.finish(self)


class Team:
    """See Connection. ``members`` have the shards of ``tiling``, each at least once; those of one shard are replicas.

    Any error ends the team, except that of a member with a replica, which ends the member. Errors name their member.
    ``stats`` count a call once, however many members it goes to, and the bytes of all of them. One thread uses it.
    ``clock`` in seconds.
    """

    def __init__(
        self,
        members: Sequence[Member],
        tiling: Tiling,
        stats: Stats,
        deadline_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        first = members[0].session
        self.config = first.config
        devices = dict.fromkeys(device for one in members for device in one.session.welcome.device.split(","))
        self.welcome = replace(first.welcome, device=",".join(devices))
        self.stats = stats
        self.deadline_s = deadline_s
        self._tiling = tiling
        self._members = {shard: [one for one in members if one.shard == shard] for shard in tiling.shards}
        self._usual = UsualTime()
        self._clock = clock
        self._last: TeamReply | None = None  # whose product was handed out last
        self._dead: ChannelError | None = None
        self._next_id = 0

    @property
    def members(self) -> list[Member]:
        """Those that are left, shard by shard."""
        return [member for replicas in self._members.values() for member in replicas]

    @property
    def address(self) -> str:
        """See Connection."""
        addresses = [member.session.address for member in self.members]
        more = len(addresses) - NAMED
        return ", ".join(addresses[:NAMED]) + (f" and {more} more" if more > 0 else "")

    @property
    def transport(self) -> str:
        """See Connection."""
        return ",".join(dict.fromkeys(member.session.transport for member in self.members))

    @property
    def ended(self) -> ChannelError | None:
        """See Connection."""
        return self._dead

    def next_id(self) -> int:
        """See Connection: no member sees it, each has numbers of its own."""
        self._next_id += 1
        return self._next_id

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """See Connection: private memory."""
        self._raise_if_dead()
        return TeamSlot(size, reply_bytes)

    def ask(self, kind: Kind, call: Call, slot: Slot) -> TeamReply:
        """See Connection. Raises what has ended the team; WorkerLost and the like where nobody else has a shard."""
        if not isinstance(slot, TeamSlot) or not isinstance(call, Product):
            raise TypeError("a team is asked for products, from slots of its own")
        self._raise_if_dead()
        began = self._clock()
        answer = TeamReply(self, kind, call, slot, self._parts(call, slot), began)
        for part in answer.parts:
            self._ask(answer, part)
        row, end = self.stats.calls[kind], self._clock()
        row.count += 1
        row.held_s += end - began
        self.stats.traced("line", "send", began, end, id=call.id)
        return answer

    def finish(self, answer: TeamReply) -> memoryview:
        """See ``TeamReply.wait``."""
        self._raise_if_dead()
        waits = self._clock()
        product = answer.slot.product.reshape(answer.call.rows, -1)
        busy_ns = received = 0
        for part in answer.parts:
            asked, payload = self._first_of(answer, part)
            # The one time that a reply is read: its worker can still change it.
            product[part.first : part.end, part.begin : part.stop] = np.frombuffer(payload, np.uint32).reshape(
                part.shape
            )
            busy_ns, received = max(busy_ns, asked.reply.busy_ns), received + payload.nbytes
            answer.slot.idle[asked.member, *part.shape].append(asked.slot)
        self._last = answer
        self._count(answer, waits, busy_ns, received)
        return answer.slot.product.data.cast("B")

    def ping(self) -> None:
        """See Connection: of each shard one has to answer, and its replicas are waited for as long as is usual."""
        self._raise_if_dead()
        pings = list[Asked]()
        for member in self.members:
            with self._about(member):
                if self._settled(member):  # who owes a reply says with that, when it comes, that it is there
                    pings.append(Asked(member, *member.session.send_ping(), self._clock()))
                    member.late.append(pings[-1])
        for shard in self._tiling.shards:
            self._hear_from(shard, [ping for ping in pings if ping.member.shard == shard])
        self.stats.heard_s = self._clock()

    def fail(self, error: ChannelError) -> None:
        """See Connection. A failed check is about who has sent that part of the product that was handed out last."""
        if isinstance(error, CheckFailed) and error.row is not None and self._last is not None:
            for part in self._last.parts:
                if part.number == error.part and part.first <= error.row < part.end:
                    member = part.asked[0].member
                    error.of_worker(member.name, member.session.address)
        self._die(error)

    def close(self) -> None:
        """See Connection."""
        self._die(ChannelClosed("the session with the workers was closed"))

    def _parts(self, call: Product, slot: TeamSlot) -> list[Part]:
        """Slices, of all rows or of a share for each replica that is worth asking."""
        key = call.group, call.layer
        bounds = self._tiling.bounds(key, slot.reply_bytes // (4 * call.rows))
        parts, now = [], self._clock()
        for number, shard in enumerate(self._tiling.of(key)):
            prompt = sum(not member.late and now - member.slow_at_s > SLOW_S for member in self._members[shard])
            shares = max(1, min(prompt, call.rows // SHARE_ROWS))
            ends = [call.rows * share // shares for share in range(shares + 1)]
            columns = bounds[number], bounds[number + 1]
            parts += [Part(shard, rows, columns, number) for rows in pairwise(ends)]
        return parts

    def _ask(self, answer: TeamReply, part: Part, *, idle: bool = False) -> None:
        """Ask one more member for a part, if one is left that was not asked. Raises any ChannelError.

        ``idle``: only one that owes no reply.
        """
        call, (rows, width) = answer.call, part.shape
        row_bytes = answer.slot.tensor.nbytes // call.rows
        while (member := self._next(answer, part, idle)) is not None:
            session, slots = member.session, answer.slot.idle[member, rows, width]
            with self._about(member):
                slot = slots.pop() if slots else session.slot(rows * row_bytes, rows * width * 4)
                slot.tensor[:] = answer.slot.tensor[part.first * row_bytes : part.end * row_bytes]
                own = Product(session.next_id(), call.group, call.layer, rows, call.digits)
                before = session.stats.calls[answer.kind].bytes_sent
                part.asked.append(Asked(member, session.ask(answer.kind, own, slot), slot, self._clock()))
                self.stats.calls[answer.kind].bytes_sent += session.stats.calls[answer.kind].bytes_sent - before
                return

    def _next(self, answer: TeamReply, part: Part, idle: bool) -> Member | None:
        """Of the replicas that were not asked for a part the one to ask; see ``_ask``.

        Last come those that were slow lately, then those that owe replies, and first the quickest: otherwise one that
        answers just after another was asked in its place would be asked first each time.
        """
        for member in list(self._members[part.shard]):
            with self._about(member):
                self._settled(member)
        asked, now, kind = [one.member for one in part.asked], self._clock(), _kind(answer.call, part.shape[0])
        able = [one for one in self._members[part.shard] if one not in asked and not (idle and one.late)]
        return min(
            able,
            key=lambda one: (
                now - one.slow_at_s <= SLOW_S,
                len(one.late),
                one.session.under_way,
                self._usual.median_s((one, kind)) or 0.0,
            ),
            default=None,
        )

    def _first_of(self, answer: TeamReply, part: Part) -> tuple[Asked, memoryview]:
        """The first answer. Another member is asked where one is lost, and each time that is usual has passed."""
        kind, waits = _kind(answer.call, part.shape[0]), self._clock()
        while True:
            replicas = self._members[part.shard]
            part.asked = [one for one in part.asked if one.member in replicas]
            if not part.asked:
                self._ask(answer, part)
            hedge_at = inf
            if len(replicas) > len(part.asked):
                hedge_at = part.asked[-1].at_s + self._usual.patience_s((one, kind) for one in replicas)
            alone = len(part.asked) == 1
            for asked in part.asked:
                now, end = self._clock(), max(asked.at_s, waits) + self.deadline_s
                within_s = min(hedge_at, end) - now if alone and now < hedge_at else RACE_S
                with self._about(asked.member):
                    if asked.member.session.arrived(asked.reply, max(0.0, within_s)):
                        payload = asked.reply.wait()
                        if len(replicas) > 1:
                            self._usual.add((asked.member, kind), self._clock() - asked.at_s)
                        self._leave_to(asked, part)
                        return asked, payload
                    if self._clock() >= end:
                        raise _too_late(asked.member)
            if self._clock() >= hedge_at:
                self._hedge(answer, part)

    def _hedge(self, answer: TeamReply, part: Part) -> None:
        """Ask one more member, if there is one that owes nothing: those that were asked are slow."""
        slow = list(part.asked)
        self._ask(answer, part, idle=True)
        if len(part.asked) > len(slow):
            self.stats.hedged += 1
            for one in slow:
                one.member.slow_at_s = self._clock()

    def _hear_from(self, shard: Shard, pings: Sequence[Asked]) -> None:
        """Wait until a member of a shard owes nothing, and for the pings of the others as long as is usual."""
        while True:
            for member in list(self._members[shard]):
                with self._about(member):
                    self._settled(member, RACE_S)
            awaited, replicas = [ping for ping in pings if ping in ping.member.late], self._members[shard]
            if all(member.late for member in replicas):
                continue
            if not awaited:
                return
            kind = _kind(awaited[0].reply.call, 1)
            patience_s = self._usual.patience_s((member, kind) for member in replicas)
            if self._clock() - awaited[0].at_s >= patience_s:
                return

    def _leave_to(self, first: Asked, part: Part) -> None:
        """One member has answered: what the others of a part were asked for is theirs until they have answered too."""
        for other in part.asked:
            if other is not first:
                other.member.late.append(other)
        part.asked = [first]

    def _settled(self, member: Member, within_s: float = 0.0) -> bool:
        """Drop what has come that nobody waits for, all but its size unread; whether that was all there is to come.

        Each reply is waited for at most ``within_s``. Raises any ChannelError.
        """
        while member.late and member.session.arrived(member.late[0].reply, within_s):
            member.late.pop(0).reply.wait()
        if member.late and self._clock() - member.late[0].at_s > self.deadline_s:
            raise _too_late(member)
        return not member.late

    @contextmanager
    def _about(self, member: Member) -> Iterator[None]:
        """Errors of a member: a loss that a replica makes good is the end of the member, all else that of the team."""
        try:
            yield
        except ChannelError as error:
            if self._dead is not None:
                raise
            error.of_worker(member.name, member.session.address)
            replicas = self._members[member.shard]
            full = isinstance(error, ArenaFull) and member.late  # of what it owes, which it may never answer
            if not (isinstance(error, LOST) or full) or replicas == [member]:
                self._die(error)
                raise
            replicas.remove(member)
            member.session.fail(error)
            member.late.clear()
            forget_frames(error)
            text = "%s; the other workers with shard %s go on"
            log.warning(text, error, member.shard, extra={"event": "replica_lost"})

    def _count(self, answer: TeamReply, waits: float, busy_ns: int, received: int) -> None:
        arrived = self.stats.heard_s = self._clock()
        row, under_way_s = self.stats.calls[answer.kind], arrived - answer.began
        busy_s = min(busy_ns * 1e-9, under_way_s)  # of the slowest; nobody can have computed for longer
        row.rpc_s += under_way_s
        row.held_s += arrived - waits
        row.bytes_received += received
        row.worker_s += busy_s
        if self.stats.trace is not None:
            self.stats.traced("line", "wait", waits, arrived)
            details = asdict(answer.call)
            self.stats.traced("call", call_name(answer.call), answer.began, arrived, busy_s=busy_s, **details)

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _die(self, error: ChannelError) -> None:
        self._dead = self._dead or error
        self._last = None  # it has this team
        for member in self.members:
            member.session.fail(self._dead)
            member.late.clear()


def _kind(call: Call, rows: int) -> tuple[str, int]:
    """Calls of a member that take equally long: by one group, with about as many rows."""
    return call_name(call), rows.bit_length()


def _too_late(member: Member) -> DeadlineExceeded:
    return DeadlineExceeded("sent nothing before the deadline; it may still be busy", address=member.session.address)
