"""Caches that ended conversations leave: found in their own scope, given up for room, oldest use first."""

from __future__ import annotations

from typing import cast

from tests.trusted.engine.fakes import CONTEXT, SIZE, FakeCache
from tsqp.trusted.engine.kv_budget import KVBudget
from tsqp.trusted.engine.prefixes import LEAST_ROWS, Prefixes

ONE, OTHER = ("A", ""), ("A", "salt")
TEXT = list(range(40))


def cache_of(tokens: list[int]) -> FakeCache:
    cache = FakeCache()
    cache.write(tokens, CONTEXT)
    cache.advance(len(tokens))
    return cache


def prefixes_of(*texts: list[int]) -> tuple[Prefixes, KVBudget]:
    budget = KVBudget(10_000)
    prefixes = Prefixes(budget)
    for text in texts:
        prefixes.keep(ONE, text, cache_of(text))
    return prefixes, budget


def test_what_goes_on_takes_the_cache_over() -> None:
    prefixes, budget = prefixes_of(TEXT[:20])
    assert budget.used == prefixes.size == 20 * SIZE
    found = prefixes.find(ONE, TEXT)
    assert found is not None
    assert found.whole
    assert prefixes.take(found).length == 20
    assert budget.used == prefixes.size == len(prefixes) == 0
    assert prefixes.find(ONE, TEXT) is None


def test_what_shares_a_beginning_gets_a_copy() -> None:
    prefixes, _ = prefixes_of(TEXT)
    found = prefixes.find(ONE, [*TEXT[:18], 0, 0, 0])
    assert found is not None
    assert (found.length, found.whole) == (18, False)
    beginning = prefixes.beginning(found)
    assert beginning.length == 18
    copy = FakeCache()
    copy.copy_from(cast(FakeCache, beginning.source), beginning.length)
    assert copy.tokens == TEXT[:18]
    assert len(prefixes) == 1


def test_the_longest_is_found() -> None:
    prefixes, _ = prefixes_of([*TEXT[:16], 0], [*TEXT[:30], 0], [*TEXT[:20], 0])
    found = prefixes.find(ONE, TEXT)
    assert found is not None
    assert found.length == 30


def test_another_scope_finds_nothing() -> None:
    prefixes, _ = prefixes_of(TEXT)
    assert prefixes.find(OTHER, TEXT) is None
    assert prefixes.find(("", "A"), TEXT) is None


def test_a_few_tokens_are_not_worth_it() -> None:
    prefixes, _ = prefixes_of(TEXT[: LEAST_ROWS - 1])
    assert len(prefixes) == 0
    prefixes, _ = prefixes_of(TEXT)
    assert prefixes.find(ONE, [*TEXT[: LEAST_ROWS - 1], 0]) is None
    assert prefixes.find(ONE, []) is None


def test_what_another_holds_as_well_is_let_go() -> None:
    prefixes, budget = prefixes_of(TEXT[:20], TEXT[:30], TEXT[:20], TEXT[:30])
    assert len(prefixes) == 1
    assert budget.used == 32 * SIZE  # room for 30 positions, by fours


def test_the_one_used_longest_ago_goes_first() -> None:
    texts = [[index, *TEXT] for index in range(3)]
    prefixes, _ = prefixes_of(*texts)
    found = prefixes.find(ONE, texts[0][:20])
    assert found is not None
    prefixes.beginning(found)
    assert prefixes.drop_oldest()
    assert [prefixes.find(ONE, text) is not None for text in texts] == [True, False, True]
    prefixes.clear()
    assert not prefixes.drop_oldest()
    assert prefixes.size == 0
