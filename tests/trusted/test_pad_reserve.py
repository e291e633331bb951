"""Pads that are promised to requests: what is free, what comes back, and what can never be there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tsqp.errors import InputError, PadsExhausted
from tsqp.trusted.pad_reserve import PadReserve


def reserve_of(*, ready: int, full: int) -> PadReserve:
    """Of a pool with ``ready`` rows that would have ``full`` once it is filled."""
    filler: Any = SimpleNamespace(ready=lambda answer: ready if answer else 10 * ready, whole_answers=full)
    return PadReserve(filler)


def test_what_is_promised_is_not_free_until_it_is_released() -> None:
    pads = reserve_of(ready=30, full=48)
    pads.reserve(20)
    assert pads.free == 10
    with pytest.raises(PadsExhausted, match="free for 10 of the 11 tokens"):
        pads.reserve(11)
    pads.release(20)
    pads.reserve(30)


def test_what_a_full_pool_does_not_hold_is_refused_for_good() -> None:
    pads = reserve_of(ready=0, full=48)
    assert pads.most == 48
    with pytest.raises(PadsExhausted):
        pads.reserve(48)
    with pytest.raises(InputError, match="kept for 48 tokens") as refused:
        pads.reserve(49)
    assert set(refused.value.fields) == {"guard.pads_empty", "guard.pads_ahead", "guard.pad_memory"}
    assert all(field in str(refused.value) for field in refused.value.fields)
    assert pads.promised == 0


def test_what_is_there_is_given_even_where_a_full_pool_holds_less() -> None:
    """The rest of a block that was begun comes on top of the whole ones."""
    pads = reserve_of(ready=50, full=48)
    pads.reserve(50)
    with pytest.raises(InputError):
        pads.reserve(49)
