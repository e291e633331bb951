"""The roster follows what workers say: who is silent leaves it, who is new is in it once, and its epoch grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tsqp.cluster.book import SILENCE_S, Book, Said
from tsqp.wire.roster import Member, read_roster, roster_document

SHARDS = {0: "0..3/0..1of2", 1: "0..3/1..2of2"}


def said(number: int, incarnation: str = "a", port: int = 7000, shard: str | None = None) -> Said:
    member = Member(f"tcp://127.0.0.1:{port + number}", shard or SHARDS[number % 2])
    return Said(number, incarnation, member, "node", 1)


def book() -> Book:
    made = Book(100)
    made.expect(SHARDS)
    return made


def test_who_speaks_is_in_the_roster_until_silent() -> None:
    known = book()
    assert (known.members(0.0), known.epoch) == ((), 100)
    known.hear(said(1), 0.0)
    known.hear(said(0), 1.0)
    assert [member.address[-4:] for member in known.members(1.0)] == ["7000", "7001"]
    assert known.epoch == 101
    known.members(2.0)
    assert known.epoch == 101  # nothing has changed
    assert len(known.members(SILENCE_S + 0.5)) == 1
    assert known.epoch == 102
    assert [entry.state for entry in known.entries(SILENCE_S + 0.5)] == ["listening", "lost"]
    known.hear(said(1), 9.0)  # it was only slow
    assert [entry.restarts for entry in known.entries(9.0)] == [0, 0]


def test_another_process_under_a_number_replaces_the_one_before_it_at_once() -> None:
    known = book()
    known.hear(said(0), 0.0)
    known.members(0.0)
    known.hear(said(0, "b", port=8000), 0.1)
    (member,) = known.members(0.1)
    assert member.address == "tcp://127.0.0.1:8000"
    assert known.epoch == 102
    assert [(entry.restarts, entry.state) for entry in known.entries(0.1)] == [(1, "listening"), (0, "starting")]


def test_who_is_not_expected_is_not_heard() -> None:
    known = book()
    known.hear(said(2), 0.0)
    known.hear(said(0, shard="0..3"), 0.0)
    assert known.members(0.0) == ()
    known.hear(said(0), 0.0)
    known.hear(said(1), 0.0)
    known.expect({0: SHARDS[0]})
    known.hear(said(1), 0.1)  # one that is being ended still speaks
    assert len(known.members(0.1)) == 1
    assert [entry.number for entry in known.entries(0.1)] == [0]


def test_an_address_that_another_has_taken_is_there_once() -> None:
    known = book()
    known.hear(said(0, port=7000), 0.0)
    known.hear(said(1, port=6999), 1.0)  # the same address, and the first is not missed yet
    (member,) = known.members(1.0)
    assert member.shard == SHARDS[1]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers(0, 5)), max_size=30))
def test_each_roster_that_is_written_can_be_read_and_each_change_has_a_higher_epoch(
    heard: list[tuple[int, str, int]],
) -> None:
    known = Book(0)
    known.expect({number: SHARDS[number % 2] for number in range(4)})
    before = known.epoch, frozenset(known.members(0.0))
    for second, (number, incarnation, port) in enumerate(heard):
        known.hear(said(number, incarnation, 7000 + port), second)
        members = known.members(second)
        roster = read_roster(roster_document(known.epoch, list(members)))
        assert roster.workers == members
        after = known.epoch, frozenset(members)
        assert (after[0] > before[0]) == (after[1] != before[1])
        before = after
