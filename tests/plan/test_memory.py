"""What each party holds."""

from __future__ import annotations

import pytest

from tsqp.api.config import GuardConfig, RunConfig
from tsqp.api.memory_plan import integer_bytes, memory_plan, pool_size
from tsqp.api.pads import pool_bytes
from tsqp.api.plan import Plan
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.checkpoint import open_checkpoint, stored_dtype
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.memory import PAD_MEMORY, PADS_AHEAD, memory, ready_tokens

CONFIG = SHAPES["llama-3.2-1b"]
SETTING = Setting(CONFIG, "masked", Link(None), 2, "cpu", prompt=1024)


@pytest.mark.parametrize("mode", ["masked", "verified"])
@pytest.mark.parametrize("dealers", [0, 1])
def test_one_worker_holds_what_the_plan_of_a_run_says(mode: str, dealers: int) -> None:
    place = "synthetic:llama-3.2-1b"
    guard = GuardConfig(pad_source="dealer=shm:///dealer", dealer_no_separation=True) if dealers else GuardConfig()
    masked = mode == "masked"
    run = RunConfig(place, mode, guard=guard if masked else GuardConfig())  # type: ignore[arg-type]
    wanted = memory_plan(open_checkpoint(place), Plan.of(run, stored_dtype(place)))
    found = memory(Setting(CONFIG, mode, Link(None), 2, "cpu", dealers=dealers if masked else 0), Team())  # type: ignore[arg-type]
    assert found.worker == wanted.worker
    assert found.embedding + found.weights + found.vectors == pytest.approx(wanted.trusted, rel=0.001)  # without norms
    assert found.kv == wanted.kv
    assert found.pads == wanted.pads  # 419 MB, for which a run has room unless told otherwise
    assert (found.pads > 0) == masked


def test_columns_divide_what_a_worker_holds_and_multiply_projections() -> None:
    whole, parts = memory(SETTING, Team()), memory(SETTING, Team(columns=8))
    assert whole.worker == integer_bytes(CONFIG)
    assert parts.worker == pytest.approx(whole.worker / 8)
    inputs = 16 * (2048 * 3 + 8192) + 2048
    assert parts.vectors - whole.vectors == 4 * 2 * 7 * inputs


def test_sets_of_layers_are_as_even_as_they_can_be() -> None:
    layer = memory(SETTING, Team(layers=17)).worker  # the head is heavier than a layer, and alone
    head = 128_256 * (2048 + 4)
    assert layer == head
    two = memory(SETTING, Team(layers=2)).worker
    of_layer = (integer_bytes(CONFIG) - head) // 16
    assert two == max(10 * of_layer, 6 * of_layer + head)


def test_replicas_hold_the_same() -> None:
    assert memory(SETTING, Team(replicas=4)) == memory(SETTING, Team())


def test_a_batch_has_keys_and_pads_of_its_own() -> None:
    many = memory(Setting(CONFIG, "masked", Link(None), 2, "cpu", batch=512, prompt=100), Team())
    assert many.kv == 512 * 100 * 32_768
    of_layers = 512 * 4 * 16 * (3072 + 2048 + 16_384 + 2048) + 512 // 16 * 64 * 32  # each block of 16 rows has a key
    assert many.pads == of_layers + 64 * 4 * 128_256 + 64 // 16 * 32  # of the head no more than 64 rows


@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-70b", "llama-3.1-405b"])
def test_pads_are_those_that_a_run_keeps_whose_memory_allows_them(name: str, batch: int) -> None:
    config = SHAPES[name]
    found = memory(Setting(config, "masked", Link(None), 2, "cpu", batch=batch), Team()).pads
    ahead = ready_tokens(batch)
    assert ahead >= batch
    for room, kept in ((0, found), (-1, pool_bytes(config, ahead - BLOCK_ROWS))):
        guard = GuardConfig(pads_ahead=ahead, pad_memory=found + room)
        assert pool_size(config, guard) == kept


def test_what_a_run_keeps_unless_told_otherwise_is_what_a_plan_takes_for_it() -> None:
    assert (GuardConfig().pads_ahead, GuardConfig().pad_memory) == (PADS_AHEAD, PAD_MEMORY)
