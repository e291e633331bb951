"""Who was given least is next; silence saves up nothing, and being away forgives nothing."""

from __future__ import annotations

from tsqp.trusted.engine.fair_share import FairShare


def test_a_newcomer_begins_at_the_least_of_those_that_are_there() -> None:
    fair = FairShare()
    fair.enter("A")
    fair.enter("B")
    fair.give("A", 50)
    fair.give("B", 30)
    fair.enter("C")
    assert fair.given("C") == 30


def test_a_short_absence_forgives_nothing() -> None:
    fair = FairShare()
    fair.enter("A")
    fair.enter("B")
    fair.give("A", 50)
    fair.leave("A")
    fair.enter("A")
    assert fair.given("A") == 50
    fair.leave("A")
    fair.give("B", 70)
    fair.enter("A")
    assert fair.given("A") == 70


def test_several_requests_of_a_tenant_are_one_presence() -> None:
    fair = FairShare()
    fair.enter("A")
    fair.give("A", 9)
    fair.enter("A")
    fair.leave("A")
    assert fair.given("A") == 9


def test_nothing_is_remembered_of_those_who_have_gone() -> None:
    fair = FairShare()
    fair.enter("stays")
    for index in range(100):
        fair.enter(str(index))
        fair.leave(str(index))
    assert set(fair._given) == {"stays"}
    fair.leave("stays")
    assert not fair._given
    assert not fair._requests
