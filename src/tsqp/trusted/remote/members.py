"""Who is in a team, and what a call of it is made of; see ``team.py``."""

from __future__ import annotations

from collections import defaultdict
from math import inf
from typing import Literal

import numpy as np

from tsqp.arith.field import Array
from tsqp.arith.large_memory import large_memory
from tsqp.config.shard import Shard
from tsqp.trusted.remote.session import PendingReply, WorkerSession
from tsqp.wire.slot import Slot

Kind = Literal["linear", "lm_head"]


class Member:
    """One worker of a team. ``name``: what it is expelled by; its address where it has no other."""

    def __init__(self, session: WorkerSession, shard: Shard, name: str = "") -> None:
        self.session = session
        self.shard = shard
        self.name = name or session.address
        self.late: list[Asked] = []  # calls that nobody waits for: their memory is this worker's until it answers
        self.slow_at_s = -inf  # by the team's clock: when another was last asked for what this one had been asked for


class Asked:
    """A call to one member, and the memory that it goes from and comes to. ``at_s``: when, by the team's clock."""

    def __init__(self, member: Member, reply: PendingReply[memoryview], slot: Slot, at_s: float) -> None:
        self.member = member
        self.reply = reply
        self.slot = slot
        self.at_s = at_s


class Part:
    """Rows ``first`` to ``end`` of a call, columns ``begin`` to ``stop`` of their product; and who is asked for it."""

    def __init__(self, shard: Shard, rows: tuple[int, int], columns: tuple[int, int], number: int) -> None:
        self.shard = shard
        self.first, self.end = rows
        self.begin, self.stop = columns
        self.number = number  # of the slice
        self.asked: list[Asked] = []

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.first, self.stop - self.begin


class TeamSlot(Slot):
    """Private memory of one call after another: ``tensor`` and ``product``, uint32; and slots of members for it."""

    def __init__(self, size: int, reply_bytes: int) -> None:
        super().__init__(large_memory().array((size,), np.uint8).data, reply_bytes)
        self.product: Array = large_memory().array((reply_bytes // 4,), np.uint32)
        self.idle: defaultdict[tuple[Member, int, int], list[Slot]] = defaultdict(list)
