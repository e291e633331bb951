"""What no black box sees: each store into memory of the line, each random draw, each secret's end, each lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.trusted.guard.honest import (
    KEY,
    HonestConnection,
    activations,
    guarded,
    masked,
    send,
    small_weights,
    verified,
)
from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream
from tsqp.arith.field import Digits
from tsqp.arith.modulus import P
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelError, NumericError, PadReused, ProductMismatch, ReplyRangeError, TsqpError, WorkerLost
from tsqp.trusted.guard import kernels, pads, pool
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.trusted.guard.pads import PadBlock, Ratchet
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import DealerPadSource, LocalPadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.wire.messages import Call, MultiplyPads, Product
from tsqp.wire.slot import Slot

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = small_weights()
ERASED = {kernels.ERASED}


def uncompiled(loop: Any) -> Any:
    return getattr(loop, "py_func", loop)


# Memory of the line


class Stores:
    """Write-only memory: every store, in order."""

    def __init__(self) -> None:
        self.stores: list[tuple[tuple[int, int], int]] = []

    def __setitem__(self, place: tuple[int, int], value: Any) -> None:
        assert all(isinstance(index, int) for index in place), "a store of more than one number"
        self.stores.append((place, int(value)))

    def __getitem__(self, place: object) -> Any:
        raise AssertionError("what was written for the worker was read back")


@pytest.mark.parametrize("with_pads", [True, False], ids=["masked", "verified"])
def test_each_number_is_stored_once_and_is_the_final_one(with_pads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, projections = activations(3, 7).numpy(), np.full((2, 7), 3, np.uint32)
    x[1, 6] = np.nan
    r = np.random.default_rng(2).integers(0, P, x.shape, dtype=np.uint32)
    expected = send(x, 999, projections, r.copy() if with_pads else None)[0]
    out: Any = Stores()
    monkeypatch.setattr(kernels, "quantise_and_mask", uncompiled(kernels.quantise_and_mask))
    with np.errstate(over="ignore"):
        send(x, 999, projections, r.copy() if with_pads else None, out)
    places = [(row, column) for row in (0, 2) for column in range(7)]
    assert out.stores == [(place, expected[place]) for place in places]


# The check


@pytest.mark.parametrize("bit", range(31))
def test_every_bit_of_a_check_is_compared(bit: int) -> None:
    reply, check_vectors = np.full((1, 3), 5, np.uint32), np.arange(1, 4, dtype=np.uint32)[None]
    expected = np.array([[30 ^ 1 << bit]], np.uint32)
    out, verdicts = np.zeros((1, 3), np.float32), np.full(1, kernels.UNSEEN, np.uint8)
    scaling = (np.ones(1, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32))
    check = check_vectors, expected, np.array([0, 3]), False, np.empty((1, 0), np.uint32)
    kernels.verify_and_unmask(reply, *check, scaling, out, verdicts, 0, 1)
    assert verdicts.tolist() == [kernels.MISMATCH]
    assert not out.any()


@pytest.mark.parametrize("bit", range(31))
def test_every_bit_of_the_check_of_pads_is_compared(bit: int) -> None:
    one = np.ones((1, 1), np.uint32)
    group = GuardedGroup(KEY, 127, one[0], one[0], one.copy(), np.array([0, 1]), one.copy(), None)
    group.check_products(one, one)
    with pytest.raises(ProductMismatch):
        group.check_products(one, one ^ np.uint32(1 << bit) if bit else one + np.uint32(1))


# Entropy


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All that this thread has drawn from the operating system's entropy: those of other tests may draw too."""
    real, own, found = os.urandom, threading.get_ident(), []

    def urandom(size: int) -> bytes:
        drawn = real(size)
        if threading.get_ident() == own:
            found.append(drawn)
        return drawn

    monkeypatch.setattr(os, "urandom", urandom)
    return found


def elements(key: bytes, size: int) -> list[int]:
    """docs/masking.md §5, without redraw: for keys of a test p never comes."""
    stream = Cipher(algorithms.AES(bytes(key)), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    words: list[int] = (np.frombuffer(stream, "<u4") & np.uint32(P)).tolist()
    return words


def test_check_vectors_are_expanded_from_32_bytes_each(drawn: list[bytes]) -> None:
    groups = list(guarded(WEIGHTS).values())
    assert [len(key) for key in drawn] == [KEY_BYTES] * len(groups)
    for key, group in zip(drawn, groups, strict=True):
        assert group.check_vectors.reshape(-1).tolist() == elements(key, group.check_vectors.size)


def test_forgotten_vectors_are_expanded_from_32_other_bytes(drawn: list[bytes]) -> None:
    group = guarded(WEIGHTS)[KEY]
    drawn.clear()
    group.forget()
    assert [len(key) for key in drawn] == [KEY_BYTES]
    assert group.check_vectors.reshape(-1).tolist() == elements(drawn[0], group.check_vectors.size)


def test_the_root_of_pads_is_32_bytes_of_its_own(drawn: list[bytes]) -> None:
    groups = guarded(WEIGHTS)
    drawn.clear()
    roots = [bytes(PadPool(groups, LocalPadSource(), wait=True)._ratchet._state) for _ in range(2)]
    assert roots == drawn
    assert len(set(roots)) == 2
    assert {len(root) for root in roots} == {KEY_BYTES}


def test_each_block_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both those made ahead and those a call opens, of several groups."""
    linears, _ = masked(WEIGHTS)
    made: list[bytes] = []
    real = PadBlock

    def block(key: bytearray) -> PadBlock:
        made.append(bytes(key))
        return real(key)

    monkeypatch.setattr(pool, "PadBlock", block)
    for key in WEIGHTS:
        linears.pads.make(key, 3)
        linears.pads.take(key, 5 * BLOCK_ROWS)
    assert len(set(made)) == len(made) == 2 * 5


# Lives


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[bytearray]:
    """Every copy of a block's key that was given away."""
    real, found = PadBlock.key, []

    def key(self: PadBlock) -> bytearray:
        found.append(real(self))
        return found[-1]

    monkeypatch.setattr(PadBlock, "key", key)
    return found


def broken(*_: object) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("fails", [False, True], ids=["expanded", "broken"])
def test_a_copy_of_a_key_ends_with_its_expansion(
    fails: bool, copies: list[bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails:
        monkeypatch.setattr(pads, "expand", broken)
    with suppress(RuntimeError):
        PadBlock(bytearray(range(1, 33))).pads(0, 1, 8)
    assert copies == [bytes(KEY_BYTES)]


class Source(LocalPadSource):
    """Keeps what it was given and what it gave; ``fault``: changes its products or raises."""

    def __init__(self, fault: Callable[[Array], None] = lambda products: None) -> None:
        self.asked = 0
        self.secrets: list[Array] = []
        self.keys: list[bytearray] = []
        self._fault = fault

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        self.asked += 1
        self.keys += keys
        self.secrets.append(pads)
        assert (pads < P).all()
        assert all(any(key) for key in keys)
        products = super().products(group, keys, pads)
        self.secrets.append(products)
        self._fault(products)
        return products


def wrong(products: Array) -> None:
    products[-1, -1] = 0 if products[-1, -1] else 1


FAULTS: dict[str, Callable[[Array], None]] = {"right": lambda products: None, "wrong": wrong, "broken": broken}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_batch_leaves_no_key_pad_or_product(fault: str, copies: list[bytearray]) -> None:
    source = Source(FAULTS[fault])
    pads_of = PadPool(guarded(WEIGHTS), source, wait=True)
    with suppress(RuntimeError, TsqpError):
        pads_of.make(KEY, 3)
    assert source.keys == copies == [bytes(KEY_BYTES)] * 3
    pads_given, products = source.secrets
    assert set(pads_given.flat) == ERASED
    if fault != "broken":  # otherwise the products never left the source
        assert set(products.flat) == ERASED
    assert pads_of.ready(KEY) == (3 * BLOCK_ROWS if fault == "right" else 0)


def test_keys_of_a_batch_end_also_when_one_block_is_gone(copies: list[bytearray]) -> None:
    """As when another thread closes the pool."""
    pads_of = PadPool(guarded(WEIGHTS), LocalPadSource(), wait=True)
    slices = pads_of.take(KEY, 3 * BLOCK_ROWS)
    last = slices[-1].block
    assert last is not None
    last.destroy()
    with pytest.raises(PadReused):
        pads_of.supply(KEY, slices)
    assert copies == [bytes(KEY_BYTES)] * 2
    assert not any(any(one.block._key) for one in slices if one.block is not None)


@pytest.mark.parametrize("fault", ["wrong", "broken"])
@pytest.mark.parametrize("how", ["make", "supply"])
def test_a_source_that_failed_is_not_asked_again(fault: str, how: str) -> None:
    source = Source(FAULTS[fault])
    pads_of = PadPool(guarded(WEIGHTS), source, wait=True)
    slices = pads_of.take(KEY, 1)
    with pytest.raises((RuntimeError, ProductMismatch)):
        pads_of.supply(KEY, slices)
    for key in WEIGHTS:
        with pytest.raises(TsqpError):
            pads_of.make(key, 1) if how == "make" else pads_of.supply(key, slices)
    assert source.asked == 1


def test_the_stream_of_a_ratchet_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []
    real = AesKeyStream

    class Stream(real):  # type: ignore[valid-type,misc]
        def fill(self, place: memoryview) -> None:
            places.append(place.obj)
            super().fill(place)

    monkeypatch.setattr(pads, "AesKeyStream", Stream)
    ratchet = Ratchet(bytes(range(32)))
    assert any(ratchet.next_key())
    assert places
    assert not any(any(place) for place in places)


def test_pads_of_a_call_refused_at_its_start_are_lost() -> None:
    """The loop erases the pads that it masks with; nobody else would erase their products."""
    linears, line = masked(WEIGHTS)
    linears.pads.make(KEY, 1)
    (block,) = linears.pads._stocks[KEY]
    x = activations(3)
    x[1, 1] = np.nan
    with pytest.raises(NumericError):
        linears.start(KEY, x)
    assert not line.sent
    for part in (block._pads, block._products):
        assert part is not None
        assert set(part[:3].flat) == ERASED
        assert (part[3:] < P).all()
    assert block.left == BLOCK_ROWS - 3


# The dealer


class DealerLine:
    """See WorkerConnection. Notes at each step whether ``locked`` says that one caller has it to itself."""

    def __init__(self) -> None:
        self.reply = np.zeros((BLOCK_ROWS, 40), np.uint32)
        self.steps: dict[str, bool] = {}
        self.locked: Callable[[], bool] = lambda: False

    def next_id(self) -> int:
        self.steps["next_id"] = self.locked()
        return 1

    def slot(self, size: int, reply_bytes: int) -> Slot:
        self.steps["slot"] = self.locked()
        return Slot(memoryview(bytearray(size)), reply_bytes)

    def ask(self, kind: str, call: Call, slot: Slot) -> DealerLine:
        assert call == MultiplyPads(1, *KEY, 1)
        assert (kind, slot.tensor.nbytes, slot.reply_bytes) == ("linear", KEY_BYTES, self.reply.nbytes)
        self.steps["ask"] = self.locked()
        return self

    def wait(self) -> memoryview:
        self.steps["wait"] = self.locked()
        return self.reply.data.cast("B")

    def fail(self, error: ChannelError) -> None:
        raise error


class Lock:
    """A lock that says how often it is held."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self._lock.release()


def lock_of(owner: object) -> Lock:
    """The one lock of an object, in whose place there is one that can be looked at."""
    (name,) = (name for name, value in vars(owner).items() if isinstance(value, type(threading.Lock())))
    lock = Lock()
    setattr(owner, name, lock)
    return lock


def test_a_dealer_is_asked_by_one_thread_at_a_time() -> None:
    line = DealerLine()
    source = DealerPadSource(line)
    lock = lock_of(source)
    line.locked = lambda: lock.depth == 1
    source.products(guarded(WEIGHTS)[KEY], [bytearray(KEY_BYTES)], np.empty((BLOCK_ROWS, 48), np.uint32))
    assert line.steps == dict.fromkeys(("slot", "next_id", "ask", "wait"), True)
    assert lock.depth == 0


@pytest.mark.parametrize("fails", [False, True])
def test_keys_do_not_stay_where_they_were_sent_from(fails: bool) -> None:
    line, slots = DealerLine(), list[Slot]()

    def ask(kind: str, call: Call, slot: Slot) -> DealerLine:
        slots.append(slot)
        assert bytes(slot.tensor) == b"k" * KEY_BYTES
        return line

    def gone() -> memoryview:
        raise WorkerLost("went away", address="a dealer")

    line.ask = ask  # type: ignore[method-assign]
    line.wait = gone if fails else line.wait  # type: ignore[method-assign]
    with pytest.raises(WorkerLost) if fails else nullcontext():
        DealerPadSource(line).products(
            guarded(WEIGHTS)[KEY], [bytearray(b"k" * KEY_BYTES)], np.empty((BLOCK_ROWS, 48), np.uint32)
        )
    assert not any(slots[0].tensor)


def test_a_dealers_products_are_a_copy_that_it_cannot_change() -> None:
    line = DealerLine()
    got = DealerPadSource(line).products(
        guarded(WEIGHTS)[KEY], [bytearray(KEY_BYTES)], np.empty((BLOCK_ROWS, 48), np.uint32)
    )
    assert not np.shares_memory(got, line.reply)
    line.reply[:] = 1
    assert not got.any()


# The pool's lock


@pytest.mark.parametrize("how", ["take", "make", "close"])
def test_pads_change_hands_under_the_lock_only(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pads_of = PadPool(guarded(WEIGHTS), LocalPadSource(), wait=True)
    lock = lock_of(pads_of)
    held: list[tuple[str, int]] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            held.append((name, lock.depth))
            return real(*arguments)

        monkeypatch.setattr(owner, name, watched)

    pads_of.make(KEY, 2)
    for owner, name in ((PadBlock, "claim"), (Ratchet, "next_key"), (Ratchet, "destroy"), (PadBlock, "destroy")):
        watch(owner, name)
    for stock in pads_of._stocks.values():
        assert lock.depth == 0
        assert all(block.left == BLOCK_ROWS for block in stock)
    call: Callable[[], object] = {
        "take": lambda: pads_of.take(KEY, 40),
        "make": lambda: pads_of.make(KEY, 1),
        "close": pads_of.close,
    }[how]
    call()
    expected = {"take": {"claim", "next_key"}, "make": {"next_key"}, "close": {"destroy"}}[how]
    assert {name for name, _ in held} == expected
    assert {depth for _, depth in held} == {1}


def test_masked_layers_close_their_pool() -> None:
    groups = guarded(WEIGHTS)
    linears = MaskedLinears(HonestConnection(WEIGHTS), groups, PadPool(groups, LocalPadSource(), wait=True))
    root = linears.pads._ratchet._state
    linears.close()
    assert root == bytes(KEY_BYTES)
    assert not torch.from_numpy(groups[KEY].projections.astype(np.int64) - 1).any()


def test_weights_that_were_left_to_a_dealer_multiply_nothing_here() -> None:
    group = guarded(WEIGHTS)[KEY]
    without = replace(group, weights=None)
    with pytest.raises(ValueError, match="dealer"):
        LocalPadSource().products(without, [], np.zeros((BLOCK_ROWS, 48), np.uint32))


@pytest.mark.parametrize("build", [masked, verified], ids=["masked", "verified"])
@pytest.mark.parametrize("bad", ["NaN", "out of range", "wrong"])
def test_each_failure_has_its_name(build: Callable[..., Any], bad: str) -> None:
    linears, line = build(WEIGHTS)
    x = linears.input(KEY, 3)
    assert x.shape == (3, 48)
    x[:] = activations(3)
    changes: dict[str, Callable[[Array], None]] = {"out of range": lambda reply: reply.fill(P), "wrong": wrong}
    expected = {"NaN": NumericError, "out of range": ReplyRangeError, "wrong": ProductMismatch}[bad]
    if bad == "NaN":
        x[2, 0] = torch.nan
    line.change = changes.get(bad, line.change)
    with pytest.raises(expected) as caught:
        linears.start(KEY, x).wait()
    assert type(caught.value) is expected
    assert (line.dead is None) == (bad == "NaN")  # of what was not sent no worker is to blame


@pytest.mark.parametrize("build", [masked, verified], ids=["masked", "verified"])
def test_a_call_says_its_kind_and_its_digits(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    head: GroupKey = ("lm_head", None)
    linears, line = build({KEY: WEIGHTS[KEY], head: WEIGHTS[KEY]})
    real, asked = line.ask, []

    def ask(kind: str, call: Product, *rest: Any) -> Any:
        asked.append((kind, call))
        return real(kind, call, *rest)

    monkeypatch.setattr(line, "ask", ask)
    for key in (KEY, head):
        linears.start(key, activations(1)).wait()
    digits: Digits = 4 if build is masked else 2
    assert asked == [("linear", Product(1, *KEY, 1, digits)), ("lm_head", Product(2, *head, 1, digits))]


@pytest.mark.parametrize("blind", range(3))
def test_products_of_pads_are_checked_with_every_vector(blind: int) -> None:
    """An error that one vector does not see, in the last row and in the last columns."""
    group = guarded(WEIGHTS, checks=3)[KEY]
    x = np.random.default_rng(1).integers(0, P, (5, 48), dtype=np.uint32)
    y = (x.astype(np.int64) @ WEIGHTS[KEY].numpy().astype(np.int64).T % P).astype(np.uint32)
    group.check_products(x, y)
    unseen = group.check_vectors[blind, -2:].astype(np.int64)[::-1] * (1, -1)  # times that vector: 0 mod p
    y[-1, -2:] = (y[-1, -2:] + unseen) % P
    with pytest.raises(ProductMismatch):
        group.check_products(x, y)


@pytest.mark.parametrize("build", [masked, verified], ids=["masked", "verified"])
def test_close_ends_the_line_before_its_vectors(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    linears, line = build(WEIGHTS)
    dead_then: list[bool] = []
    monkeypatch.setattr(GuardedGroup, "forget", lambda _: dead_then.append(line.dead is not None))
    linears.close()
    assert dead_then == [True] * len(WEIGHTS)


def test_nothing_secret_is_printed() -> None:
    """As by a debugger, a log or an error that shows what it was given."""
    linears, _ = masked(WEIGHTS)
    group = linears.groups[KEY]
    pending = linears.start(KEY, activations(1))
    secret = {
        str(number) for part in (group.check_vectors, group.projections, pending.desk.expected) for number in part.flat
    }
    block = pending.slices[0].block
    for thing in (group, pending, pending.desk, pending.slices, block, linears, linears.pads, linears.pads._ratchet):
        assert not {number for number in secret if len(number) > 6 and number in repr(thing)}
        assert "bytearray" not in repr(thing)
        assert "array(" not in repr(thing)
