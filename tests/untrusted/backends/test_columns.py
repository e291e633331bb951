"""Columns of a product in locked memory: every byte of theirs once, none of others', and no copy across a border."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.many_devices import fake_devices
from tsqp.errors import ProtocolError
from tsqp.untrusted.backends.base import Place
from tsqp.untrusted.backends.columns import Strip, fragments


@given(st.data())
def test_fragments_are_the_strip(data: st.DataObject) -> None:
    pitch = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, pitch - 1))
    width = data.draw(st.integers(1, pitch - first))
    rows = data.draw(st.integers(1, 12))
    memory = bytearray(rows * pitch)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=6))})
    pieces = [whole[low:high] for low, high in itertools.pairwise(cuts)]
    device = torch.arange(rows * width).remainder(200).add(1).to(torch.uint8).view(rows, width)
    found = list(fragments(pieces, Strip(memoryview(memory), first, width, pitch)))
    for row, column, host in found:
        assert not host.count_nonzero(), "no byte is copied twice"
        host.copy_(device[row : row + host.shape[0], column : column + host.shape[1]])
    expected = torch.zeros(rows, pitch, dtype=torch.uint8)
    expected[:, first : first + width] = device
    assert torch.equal(whole.view(rows, pitch), expected)
    assert len(found) <= rows + len(pieces)
    if len(pieces) == 1:
        assert len(found) == 1


def test_a_window_costs_two_more_copies_at_most() -> None:
    memory = bytearray(1000 * 64)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    strip = Strip(memoryview(memory), 10, 30, 64)
    assert [len(one.host) for one in fragments([whole[:32_020], whole[32_020:]], strip)] == [500, 1, 1, 499]


def test_room_that_is_not_that_of_the_whole_product_is_refused() -> None:
    (backend,) = fake_devices(1).backends
    product = torch.zeros(3, 8)
    with backend.columns(4, 20):
        for size in (3 * 8 * 4, 3 * 20 * 4 + 1):
            room = memoryview(bytearray(size))
            with pytest.raises(ProtocolError, match=f"{size} bytes where 240"):
                backend.place(room, torch.float32, (3, 8))
            with pytest.raises(ProtocolError, match=f"{size} bytes where 240"):
                backend.stage_out(product, room)
            x = Place(memoryview(bytearray(96)), torch.float32, (3, 8))
            with pytest.raises(ProtocolError, match=f"{size} bytes where 240"):
                backend.prepare(("k",), x, Place(room, torch.float32, (3, 8)), lambda *_: lambda: None)
    assert not isinstance(backend._driver, FakeDriver) or backend._driver.idle


def test_outside_of_columns_a_product_is_whole() -> None:
    (backend,) = fake_devices(1).backends
    room = memoryview(bytearray(96))
    with backend.serving():
        staged = backend.stage_in(memoryview(bytearray(range(96))), torch.uint8, (3, 32))
        with backend.columns(0, 64):
            pass
        backend.stage_out(staged, room)
        backend.settle()
    assert bytes(room) == bytes(range(96))
