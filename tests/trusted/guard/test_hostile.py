"""A worker that cheats meets one named exception, before any token that it had a hand in, and then nothing is left."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import random_tokens, tiny_model
from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import (
    KEY,
    MODES,
    SHAPES,
    Array,
    Weights,
    expected_product,
    make_groups,
    make_linears,
    record_blocks,
    secrets_of,
)
from tests.trusted.guard.honest import HonestConnection
from tests.trusted.guard.hostile import (
    DEADLINE_S,
    AnyProduct,
    Attack,
    HostileWorker,
    NotHereError,
    edited,
    pass_the_deadline_once_stalled,
    serve,
)
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.arith.modulus import P
from tsqp.errors import (
    ChannelError,
    CheckFailed,
    DeadlineExceeded,
    NumericError,
    PadReused,
    ProductMismatch,
    ProtocolError,
    ReplyRangeError,
    ReplyShapeError,
)
from tsqp.trusted.guard import kernels
from tsqp.wire.channel import Arrival

MODEL = str(tiny_model("llama").directory)
PROMPT = random_tokens(21)
STEPS = 5
CALLS = 4 * 2 + 1  # of one pass

ATTACKS: dict[str, tuple[Attack, type[ChannelError]]] = {
    "flips one bit": (edited(hostile.flip_low_bit), ProductMismatch),
    "adds p": (edited(hostile.add_p), ReplyRangeError),
    "zeros": (edited(hostile.zeros), ProductMismatch),
    "last row wrong": (edited(hostile.wrong_last_row), ProductMismatch),
    "swaps layers": (hostile.other_layer, ProductMismatch),
    "replays": (hostile.replayed, ProductMismatch),
    "other weights": (hostile.other_weights, ProductMismatch),
    "changes x": (hostile.changed_input, ProductMismatch),
    "old id": (hostile.old_id, ProtocolError),
    "stalls": (hostile.stalled, DeadlineExceeded),
}
PLACES = {"first call": 0, "second layer": 4, "LM head": 8, "third token": 3 * CALLS + 2}


@pytest.fixture(scope="module")
def honest_tokens() -> list[int]:
    with serve(MODEL) as (_, address), LLM(MODEL, protection="verified", worker=address) as llm:
        return list(llm.generate(PROMPT, SamplingParams(max_tokens=STEPS))[0].token_ids)


def tokens_until_failure(llm: LLM, expected: type[ChannelError]) -> tuple[list[int], ChannelError]:
    generation = iter(llm.engine.generate([PROMPT], SamplingParams(max_tokens=STEPS)))
    tokens: list[int] = []
    with pytest.raises(expected) as caught:
        tokens.extend(output.token or 0 for _, output in generation)  # keeps those before the exception
    assert type(caught.value) is expected
    return tokens, caught.value


def assert_nothing_left(llm: LLM) -> None:
    """Check vectors and pads are gone, and every call raises."""
    guard = llm.guard
    assert guard is not None
    for group in guard.linears.groups.values():
        assert (group.projections == 1).all()
    if guard.filler is not None:
        guard.filler.close()  # which may have been in the middle of a block
        assert guard.filler.ready(answer=False) == 0
    for call in (lambda: llm.logits(PROMPT), lambda: llm.generate(PROMPT), lambda: llm.logits(PROMPT)):
        with pytest.raises((ChannelError, PadReused)):
            call()


def attack_a_run(
    attack: Attack,
    expected: type[ChannelError],
    at: int,
    transport: str,
    mode: ProtectionName,
    right_tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = record_blocks(monkeypatch)
    with (
        serve(MODEL, attack, at, transport) as (worker, address),
        LLM(MODEL, protection=mode, worker=WorkerConfig(address, deadline_s=DEADLINE_S, patience_s=0)) as llm,
    ):
        if expected is DeadlineExceeded:
            pass_the_deadline_once_stalled(monkeypatch, worker)
        tokens, _ = tokens_until_failure(llm, expected)
        assert worker.attacked is not None
        assert tokens == right_tokens[: worker.attacked // CALLS]
        assert worker.products == worker.attacked + 1  # nothing was asked for afterwards
        assert_nothing_left(llm)
        assert worker.products == worker.attacked + 1
        assert bool(blocks) == (mode == "masked")
        assert not secrets_of(blocks)


# Half of all combinations, and every one of three of the four: a fault that needs no more than three is found.
RUNS = [
    (attack, place, transport, MODES[(i + j + k) % 2])
    for i, attack in enumerate(ATTACKS)
    for j, place in enumerate(PLACES)
    for k, transport in enumerate(("mem", "shm"))
]


@pytest.mark.parametrize(("attack", "place", "transport", "mode"), RUNS)
def test_each_attack_is_named_before_any_token(
    attack: str,
    place: str,
    transport: str,
    mode: ProtectionName,
    honest_tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack_a_run(*ATTACKS[attack], PLACES[place], transport, mode, honest_tokens, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_every_later_call_raises_what_ended_the_session(mode: ProtectionName) -> None:
    attack, expected = ATTACKS["zeros"]
    with serve(MODEL, attack, 3) as (_, address), LLM(MODEL, protection=mode, worker=address) as llm:
        _, error = tokens_until_failure(llm, expected)
        for call in (lambda: llm.logits(PROMPT), lambda: llm.generate(PROMPT), lambda: llm.logits(PROMPT)):
            with pytest.raises(expected) as caught:
                call()
            assert caught.value is error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", ["mem", "ipc", "tcp"])
def test_a_wrong_shape(
    transport: str, mode: ProtectionName, honest_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack_a_run(hostile.short, ReplyShapeError, 3, transport, mode, honest_tokens, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", ["mem", "shm"])
def test_what_was_sent_is_never_read_back(transport: str, mode: ProtectionName, honest_tokens: list[int]) -> None:
    with (
        serve(MODEL, hostile.overwritten_input, 4, transport) as (worker, address),
        LLM(MODEL, protection=mode, worker=address) as llm,
    ):
        completion = llm.generate(PROMPT, SamplingParams(max_tokens=STEPS))[0]
    assert worker.attacked == 4
    assert list(completion.token_ids) == honest_tokens


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_changes_after_the_bell_changes_nothing(
    mode: ProtectionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over shm: the worker overwrites its product right after it was copied, and before it is checked."""
    products: list[memoryview] = []

    def remember(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        assert arrival.reply is not None
        products.append(arrival.reply)
        raise NotHereError

    whole = kernels.verify_and_unmask

    def accept(*arguments: Any) -> None:
        products[-1][:] = bytes(products[-1].nbytes)
        whole(*arguments)

    prompt, params = PROMPT[:9], SamplingParams(max_tokens=STEPS)  # each product in one piece
    with serve(MODEL, remember, transport="shm") as (_, address):
        with LLM(MODEL, protection=mode, worker=address) as llm:
            honest = llm.generate(prompt, params)
        monkeypatch.setattr(kernels, "verify_and_unmask", accept)
        with LLM(MODEL, protection=mode, worker=address) as llm:
            assert llm.generate(prompt, params) == honest
    assert len(products) == 2 * CALLS * STEPS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 1, 5, 14])
@pytest.mark.parametrize("ahead", [0, 64], ids=["no pads ready", "pads ready"])
def test_other_products_under_way_go_down_too(
    mode: ProtectionName, at: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With micro-batches several are, each with pads of its own."""
    blocks = record_blocks(monkeypatch)
    guard = GuardConfig(pads_ahead=ahead) if mode == "masked" else None
    with (
        serve(MODEL, edited(hostile.zeros), at) as (worker, address),
        LLM(MODEL, protection=mode, worker=address, guard=guard, compute=ComputeConfig(micro_batches=2)) as llm,
    ):
        if llm.guard is not None and llm.guard.filler is not None:
            llm.guard.filler.fill()
        with pytest.raises(ProductMismatch):
            llm.generate(random_tokens(32), SamplingParams(max_tokens=STEPS))
        assert worker.attacked == at
        assert_nothing_left(llm)
        assert not secrets_of(blocks)


# One product, without a worker


def some_input(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


def tampered(weights: Weights, change: Callable[[Array], None]) -> HonestConnection:
    """A line whose worker changes its right products in place."""
    line = HonestConnection(weights)
    line.change = change
    return line


@pytest.mark.parametrize("mode", MODES)
def test_every_flipped_bit_is_found(mode: ProtectionName) -> None:
    """Each of 32 bits in eight places, of products of 1 to 19 rows."""
    generator = np.random.default_rng(1)
    for trial in range(256):
        groups, weights = make_groups({KEY: SHAPES[KEY]}, seed=trial)
        rows = int(generator.integers(1, 20))
        row, column, bit = int(generator.integers(rows)), int(generator.integers(24)), np.uint32(1 << trial % 32)
        seen: list[int] = []

        def flip(y: Array, row: int = row, column: int = column, bit: Any = bit, seen: list[int] = seen) -> None:
            y[row, column] ^= bit
            seen.append(int(y[row, column]))

        line = tampered(weights, flip)
        linears = make_linears(mode, line, groups)
        pending = linears.start(KEY, some_input(rows, trial))
        with pytest.raises(CheckFailed) as caught:
            pending.wait()
        assert type(caught.value) is (ProductMismatch if seen[0] < P else ReplyRangeError)
        assert line.dead is caught.value
        assert linears.products_checked == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
def test_every_row_is_checked(mode: ProtectionName, rows: int) -> None:
    for row in range(rows):
        groups, weights = make_groups()
        line = tampered(weights, partial(hostile.other_number, row=row, column=0))
        linears = make_linears(mode, line, groups)
        with pytest.raises(ProductMismatch):
            linears.start(KEY, some_input(rows)).wait()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("column", range(24))
def test_p_added_to_any_number_is_out_of_range(mode: ProtectionName, column: int) -> None:
    def tamper(y: Array) -> None:
        y[1, column] += np.uint32(P)

    groups, weights = make_groups()
    with pytest.raises(ReplyRangeError):
        make_linears(mode, tampered(weights, tamper), groups).start(KEY, some_input(3)).wait()


LOOPS = ("quantise_and_mask", "verify_and_unmask")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moment", ["before the copy", "after the copy", "after the check"])
def test_a_reply_is_read_once(mode: ProtectionName, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes it after the copy changes nothing, and before the copy is found out."""
    groups, weights = make_groups()
    replies: list[Array] = []
    linears = make_linears(mode, tampered(weights, replies.append), groups)
    x = some_input(5)
    pending = linears.start(KEY, x)
    (reply,) = replies
    name = LOOPS[1]
    loop = getattr(kernels, name)

    def patched(*arguments: Any) -> None:
        if moment == "after the copy":
            hostile.other_number(reply, 0, 0)
        loop(*arguments)
        if moment == "after the check":
            hostile.other_number(reply, 0, 0)

    monkeypatch.setattr(kernels, name, patched)
    if moment == "before the copy":
        hostile.other_number(reply, 0, 0)
        with pytest.raises(ProductMismatch):
            pending.wait()
    else:
        assert torch.equal(pending.wait(), expected_product(groups[KEY], weights[KEY], x))


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_that_never_stays_the_same_is_right_or_refused(mode: ProtectionName) -> None:
    """A thread changes one number back and forth while the reply is copied, checked and rescaled."""
    groups, weights = make_groups({KEY: (2000, 16)})
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    expected = expected_product(groups[KEY], weights[KEY], x)
    for _ in range(30):
        groups, weights = make_groups({KEY: (2000, 16)})
        replies: list[Array] = []
        pending = make_linears(mode, tampered(weights, replies.append), groups).start(KEY, x)
        (memory,) = replies
        stop = threading.Event()

        def scribble(memory: Array = memory, stop: threading.Event = stop) -> None:
            right, wrong = memory[:, 1000].copy(), np.zeros_like(memory[:, 1000])
            while not stop.is_set():
                memory[:, 1000] = wrong
                memory[:, 1000] = right

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            product = pending.wait()
        except ProductMismatch:
            continue
        finally:
            stop.set()
            thread.join()
        assert torch.equal(product, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", [0, 1], ids=["asking", "checking"])
@pytest.mark.parametrize("skipped", [0, 3, -1])
def test_a_row_without_a_verdict_is_refused(
    mode: ProtectionName, loop: int, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, weights = make_groups()
    line = HonestConnection(weights)
    linears = make_linears(mode, line, groups)
    name = LOOPS[loop]
    whole = getattr(kernels, name)

    def all_but_one(*arguments: Any) -> None:
        *arrays, first, end = arguments
        wanted = [row for row in range(first, end) if row != range(first, end)[skipped]]
        for row in wanted:
            whole(*arrays, row, row + 1)

    monkeypatch.setattr(kernels, name, all_but_one)
    with pytest.raises(ProductMismatch):
        linears.start(KEY, some_input(7)).wait()
    assert len(line.sent) == loop


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x", [torch.zeros(3, 40), some_input(3)], ids=["zeros", "noise"])
def test_after_close_nothing_passes(mode: ProtectionName, x: torch.Tensor) -> None:
    """Neither a product that is under way, nor one asked for afterwards; not even that of zeros, which is zeros."""
    groups, weights = make_groups()
    linears = make_linears(mode, HonestConnection(weights), groups)
    pending = linears.start(KEY, x)
    linears.close()
    for later in (pending.wait, lambda: linears.start(KEY, x).wait()):
        with pytest.raises((ChannelError, PadReused)):
            later()


@pytest.mark.parametrize("mode", MODES)
def test_after_a_failure_nothing_passes(mode: ProtectionName) -> None:
    """Other products that were under way are right, and are refused."""
    spoilt: list[int] = []

    def tamper(y: Array) -> None:
        if not spoilt:
            spoilt.append(1)
            hostile.zeros(y)

    groups, weights = make_groups()
    line = tampered(weights, tamper)
    linears = make_linears(mode, line, groups)
    first, second = (linears.start(KEY, some_input(3, seed)) for seed in range(2))
    with pytest.raises(ProductMismatch) as caught:
        first.wait()
    assert line.dead is caught.value
    for later in (second.wait, lambda: linears.start(KEY, some_input(3))):
        with pytest.raises(ProductMismatch):
            later()
    line.dead = None  # even if the line were not dead
    for later in (second.wait, lambda: linears.start(KEY, some_input(3)).wait()):
        with pytest.raises((CheckFailed, PadReused)):
            later()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_numbers_are_not_sent(mode: ProtectionName, bad: float) -> None:
    groups, weights = make_groups()
    line = HonestConnection(weights)
    x = some_input(5)
    x[3, 7] = bad
    with pytest.raises(NumericError):
        make_linears(mode, line, groups).start(KEY, x)
    assert not line.sent


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tamper", [hostile.zeros, hostile.add_p, hostile.flip_low_bit])
def test_no_error_holds_a_number_of_the_data(mode: ProtectionName, tamper: Callable[[Array], None]) -> None:
    groups, weights = make_groups()
    linears = make_linears(mode, tampered(weights, tamper), groups)
    with pytest.raises(CheckFailed) as caught:
        linears.start(KEY, some_input(4)).wait()
    assert not re.search(r"\d", str(caught.value))
    assert len(caught.value.args) == 1
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_an_honest_product_is_the_formula(mode: ProtectionName, rows: int) -> None:
    groups, weights = make_groups()
    linears = make_linears(mode, HonestConnection(weights), groups)
    for seed in range(3):
        x = some_input(rows, seed)
        assert torch.equal(linears.start(KEY, x).wait(), expected_product(groups[KEY], weights[KEY], x))
    assert linears.products_checked == 3
