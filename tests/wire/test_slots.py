"""Memory that is laid out once carries one call after another, and never two at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.links import WAIT_S, arrived
from tests.wire.shm_peers import taken_bytes
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelClosed, InputError, ProtocolError
from tsqp.wire.channel import Channel, Frames, Listener
from tsqp.wire.slot import KEPT_ROWS, Shelf
from tsqp.wire.transport import connect, listen, new_shm_address
from tsqp.wire.transport.shm.connection import MAX_KNOWN_PLACES


def answer(listener: Listener, product: bytes) -> bytes:
    """Answer one call with ``product``; its payload."""
    arrival = arrived(listener)
    payload = bytes(arrival.frames.tensors[0])
    listener.send(arrival, Frames(arrival.frames.control, (memoryview(bytearray(product)),)))
    return payload


def test_one_call_after_another_on_every_transport(channel: Channel, listener: Listener) -> None:
    slot = channel.slot(4, 6)
    for number in range(5):
        slot.tensor[:] = b"in %d" % number
        channel.send_from(slot, b"call %d" % number)
        assert answer(listener, b"out %2d" % number) == b"in %d" % number
        control, (product,) = channel.receive(WAIT_S)
        assert (control, bytes(product)) == (b"call %d" % number, b"out %2d" % number)


@pytest.fixture
def shm() -> Iterator[tuple[Any, Listener]]:
    with closing(listen(new_shm_address())) as listener, closing(connect(listener.address)) as channel:
        yield channel, listener


def test_the_memory_is_the_same_each_time(shm: tuple[Any, Listener]) -> None:
    channel, listener = shm
    slot = channel.slot(100, 200)
    places, products = set(), set()
    for _ in range(3):
        channel.send_from(slot, b"")
        arrival = arrived(listener)
        assert arrival.place
        places.add(arrival.place)
        assert arrival.reply is not None
        listener.send(arrival, Frames(b"", (arrival.reply,)))
        products.add(id(channel.receive(WAIT_S).tensors[0]))
    assert len(places) == len(products) == 1
    taken = taken_bytes(channel)
    assert taken >= 300
    del slot
    assert taken_bytes(channel) == 0


def test_two_slots_share_no_memory(shm: tuple[Any, Listener]) -> None:
    channel, listener = shm
    for text in (b"one call", b"another."):
        slot = channel.slot(8, 8)
        slot.tensor[:] = text
        channel.send_from(slot, b"")
    first, second = arrived(listener), arrived(listener)
    assert first.place != second.place
    assert [bytes(one.frames.tensors[0]) for one in (first, second)] == [b"one call", b"another."]


def test_a_second_call_from_a_slot_under_way_ends_the_channel(shm: tuple[Any, Listener]) -> None:
    channel, _ = shm
    slot = channel.slot(8, 8)
    channel.send_from(slot, b"first")
    with pytest.raises(ProtocolError, match="under way"):
        channel.send_from(slot, b"second")
    with pytest.raises(ChannelClosed):
        channel.send_from(slot, b"third")


def test_a_slot_of_another_channel_is_copied_and_not_believed(shm: tuple[Any, Listener]) -> None:
    """Its places are of another arena: here they would name memory of something else."""
    channel, listener = shm
    with closing(connect(listener.address)) as other:
        foreign = other.slot(5, 3)
        foreign.tensor[:] = b"there"
        secret = channel.reserve(64)
        secret[:5] = b"other"
        channel.send_from(foreign, b"")
        assert answer(listener, b"fit") == b"there"
        assert bytes(channel.receive(WAIT_S).tensors[0]) == b"fit"


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_sizes_are_checked(shm: tuple[Any, Listener], size: int) -> None:
    with pytest.raises(InputError, match="the limit is"):
        shm[0].slot(size, 8)


def test_a_control_frame_over_the_limit_is_not_sent(shm: tuple[Any, Listener]) -> None:
    channel, _ = shm
    with pytest.raises(ProtocolError, match="control frame"):
        channel.send_from(channel.slot(8, 8), bytes(5000))


def test_what_a_worker_remembers_of_places_is_bounded(shm: tuple[Any, Listener]) -> None:
    channel, listener = shm
    slots = [channel.slot(8, 8) for _ in range(MAX_KNOWN_PLACES + 10)]
    for _ in range(2):
        for number, slot in enumerate(slots):
            slot.tensor[:] = b"%8d" % number
            channel.send_from(slot, b"")
            assert answer(listener, b"%8d" % -number) == b"%8d" % number
            assert bytes(channel.receive(WAIT_S).tensors[0]) == b"%8d" % -number
    (connection,) = listener._connections.values()  # type: ignore[attr-defined]
    assert len(connection._known) <= MAX_KNOWN_PLACES


# Shelves


class Desk:
    def __init__(self, key: GroupKey, rows: int) -> None:
        self.key, self.rows, self.x = key, rows, object()


STEPS = st.lists(
    st.tuples(st.sampled_from(["hand out", "claim", "put back"]), st.sampled_from(["qkv", "o"]), st.integers(1, 3)),
    max_size=40,
)


@given(STEPS)
def test_a_desk_is_one_call_s_at_a_time(steps: list[tuple[str, str, int]]) -> None:
    shelf = Shelf(Desk)
    given_out: list[Desk] = []
    at_work: list[Desk] = []
    for step, name, rows in steps:
        key: GroupKey = (name, 0)  # type: ignore[assignment]
        if step == "hand out":
            desk = shelf.hand_out(key, rows)
            assert (desk.key[0], desk.rows) == (name, rows)
            assert not any(desk is other for other in [*given_out, *at_work])
            given_out.append(desk)
        elif step == "claim" and given_out:
            desk = given_out.pop()
            assert shelf.claim(desk.key, desk.x) is desk
            assert shelf.claim(desk.key, desk.x) is None, "a second time"
            at_work.append(desk)
        elif step == "put back" and at_work:
            shelf.put_back(at_work.pop(0))


def test_only_memory_that_was_handed_out_is_claimed() -> None:
    shelf = Shelf(Desk)
    desk = shelf.hand_out(("qkv", 0), 1)
    assert shelf.claim(("qkv", 0), object()) is None
    assert shelf.claim(("o", 0), desk.x) is None, "it has the shape of another group"
    fresh = shelf.fresh(("qkv", 3), 1)
    assert shelf.claim(("qkv", 3), fresh.x) is None, "nobody filled it"


def test_what_is_kept_is_of_few_rows_and_of_the_last_number_of_them() -> None:
    shelf = Shelf(Desk)
    large, small = shelf.fresh(("qkv", 0), KEPT_ROWS + 1), shelf.fresh(("qkv", 0), KEPT_ROWS)
    for desk in (large, small):
        shelf.put_back(desk)
    assert shelf.fresh(("qkv", 0), KEPT_ROWS + 1) is not large
    shelf.put_back(small)
    assert shelf.fresh(("qkv", 1), KEPT_ROWS) is small, "layers share it"
    shelf.put_back(small)
    shelf.clear()
    assert shelf.fresh(("qkv", 1), KEPT_ROWS) is not small
