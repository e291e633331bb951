"""Spinning is short, and leaves the core to others as soon as they want it. No test waits: the clock is the test's."""

from __future__ import annotations

from tsqp.wire.transport.shm.spin import CROWDED_S, REST_S, Spin

ROUND_S = 1e-6


class World:
    """Time passes in rounds; ``dear`` are rounds in which somebody else had the core for that long."""

    def __init__(self, comes_at: float, dear: dict[int, float] | None = None) -> None:
        self.now, self.rounds, self.looks = 100.0, 0, 0
        self._comes_at, self._dear = 100.0 + comes_at, dear or {}
        self.spin = Spin(50e-6, clock=lambda: self.now, give_way=self._give_way)

    def _give_way(self) -> None:
        self.rounds += 1
        self.now += self._dear.get(self.rounds, ROUND_S)

    def look(self) -> str | None:
        self.looks += 1
        return "reply" if self.now >= self._comes_at else None


def test_what_comes_soon_is_found_without_sleeping() -> None:
    world = World(comes_at=20e-6)
    assert world.spin.ask(world.look) == "reply"
    assert 19 <= world.rounds <= 21


def test_a_spin_ends() -> None:
    world = World(comes_at=1.0)
    assert world.spin.ask(world.look) is None
    assert 50 <= world.rounds <= 52


def test_one_look_gives_way_to_nobody() -> None:
    world = World(comes_at=1.0)
    assert world.spin.ask(world.look, once=True) is None
    assert (world.rounds, world.looks) == (0, 1)


def test_a_core_that_others_want_is_left_to_them_for_a_while() -> None:
    world = World(comes_at=1.0, dear={3: 2 * CROWDED_S})
    assert world.spin.ask(world.look) is None
    assert world.rounds == 3
    assert world.spin.ask(world.look) is None
    assert world.rounds == 3, "it does not give way again so soon"
    world.now += REST_S
    assert world.spin.ask(world.look) is None
    assert world.rounds > 40, "and later it does"


def test_a_dear_round_counts_also_where_it_found_something() -> None:
    world = World(comes_at=CROWDED_S, dear={1: 2 * CROWDED_S})
    assert world.spin.ask(world.look) == "reply"
    assert world.spin.ask(world.look) == "reply"
    assert world.rounds == 1
