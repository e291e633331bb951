"""``masked`` is ``verified`` is a plain int64 model of the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.conftest import TRANSPORTS
from tests.families import FAMILIES, random_tokens, tiny_model
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import serve
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.arith.row_threads import row_threads
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.default import fetch_default
from tsqp.config.dtype import PRIVATE_KV_DTYPES, PrivateKVDtype
from tsqp.config.groups import GroupKey
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import DecoderLayers, Norms
from tsqp.model.kernels import pick_kernels
from tsqp.model.linear import LinearWeights, load_groups
from tsqp.model.local import LocalEmbedding
from tsqp.model.pending import Deferred, Pending
from tsqp.trusted.engine.decoder import Decoder
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.micro_batches import Fixed
from tsqp.trusted.stats import Stats

P = 2**31 - 1
LEAST_SCALE = torch.tensor(2.0**-126)
ONE = torch.tensor(1.0)
PROMPTS = [random_tokens(37), random_tokens(9, seed=1)]
STEPS = 12

Answers = tuple[torch.Tensor, list[tuple[int, ...]]]  # logits of the first prompt, tokens of all


class IntegerGroup:
    """One group by the formulas of docs/masking.md §1, in float32 and int64, and by no code of the package."""

    def __init__(self, group: LinearWeights) -> None:
        weight = group.weight
        scales = weight.abs().amax(1) / 127
        self.scales = torch.where(scales < LEAST_SCALE, ONE, scales)
        self.wq = (weight / self.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = torch.zeros(len(weight)) if group.bias is None else group.bias
        largest = int(self.wq.long().abs().sum(1).max())
        self.limit = min(32_639, (P - 1) // 2 // max(1, largest))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True) / self.limit
        scale = torch.where(scale < LEAST_SCALE, ONE, scale)
        xq = (x / scale).round().clamp(-self.limit, self.limit).long()
        y = torch.cat([xq @ rows.long().T for rows in self.wq.split(4096)], dim=1)
        return ((y.float() * scale) * self.scales) + self.bias


class IntegerLinears:
    """See Linears."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._groups = {key: IntegerGroup(group) for key, group in load_groups(checkpoint, torch.float32).items()}

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._groups[key].wq.shape[1])

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        product = self._groups[key].product(x.clone())
        return Deferred(lambda: product)


def integer_engine(
    model: str, *, prefill_chunk: int = 2048, micro_batches: int = 1, kept: PrivateKVDtype = "bfloat16"
) -> Engine:
    """The decoder of the package with these linear layers."""
    checkpoint, stats = open_checkpoint(model), Stats()
    norms = Norms.load(checkpoint, torch.float32)
    block = DecoderLayers(
        checkpoint.config,
        norms,
        IntegerLinears(checkpoint),
        BlockAttention(checkpoint.config.windows, stats),
        pick_kernels(torch.float32, compiled=True, cache_dtype=cache_dtype(kept)),
        stats,
    )
    table = checkpoint.tensor("model.embed_tokens.weight").float()
    decoder = Decoder(
        block,
        LocalEmbedding(table, stats),
        dtype=torch.float32,
        cache_dtype=cache_dtype(kept),
        max_rows=prefill_chunk,
        micro_batches=Fixed(micro_batches),
        stats=stats,
    )
    return Engine(decoder, (), stats)


def answers(engine: Engine) -> Answers:
    """Logits of every position of a prompt, and a batch answered greedily."""
    tokens: dict[int, list[int]] = {index: [] for index in range(len(PROMPTS))}
    for index, output in engine.generate(PROMPTS, SamplingParams(max_tokens=STEPS, ignore_eos=True)):
        tokens[index].append(output.token or 0)
    return engine.logits(PROMPTS[0]), [tuple(tokens[index]) for index in tokens]


def private_answers(
    model: str,
    mode: ProtectionName,
    address: str,
    *,
    prefill_chunk: int = 2048,
    micro_batches: int = 1,
    guard: GuardConfig | None = None,
    kept: PrivateKVDtype = "bfloat16",
) -> Answers:
    with LLM(
        model,
        protection=mode,
        worker=address,
        guard=guard if mode == "masked" else None,
        compute=ComputeConfig(prefill_chunk=prefill_chunk, micro_batches=micro_batches, kv_dtype=kept),
    ) as llm:
        if guard is not None and llm.guard is not None and llm.guard.filler is not None:
            llm.guard.filler.fill()
        return answers(llm.engine)


def assert_same(ours: Answers, expected: Answers) -> None:
    assert torch.equal(ours[0].view(torch.int32), expected[0].view(torch.int32))
    assert ours[1] == expected[1]


SCHEDULES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"prefill_chunk": 8},
    "micro-batches": {"micro_batches": 3},
    "chunks and micro-batches": {"prefill_chunk": 20, "micro_batches": 2},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_integer_model(family: str, schedule: str) -> None:
    model, options = str(tiny_model(family).directory), SCHEDULES[schedule]
    expected = answers(integer_engine(model, **options))
    with serve(model) as (_, address):
        for mode in MODES:
            assert_same(private_answers(model, mode, address, **options), expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport(transport: str) -> None:
    model = str(tiny_model("qwen3").directory)
    expected = answers(integer_engine(model))
    with serve(model, transport=transport) as (_, address):
        for mode in MODES:
            assert_same(private_answers(model, mode, address), expected)


@pytest.mark.parametrize("kept", PRIVATE_KV_DTYPES)
def test_every_dtype_of_keys_and_values(kept: PrivateKVDtype) -> None:
    model = str(tiny_model("llama").directory)
    expected = answers(integer_engine(model, kept=kept, prefill_chunk=19))
    with serve(model) as (_, address):
        for mode in MODES:
            assert_same(private_answers(model, mode, address, kept=kept, prefill_chunk=19), expected)


@pytest.mark.parametrize("ahead", [0, 16, 256])
@pytest.mark.parametrize("checks", [1, 5])
def test_pads_and_checks_change_nothing(ahead: int, checks: int) -> None:
    """Whether pads are ready, run out on the way or are never there."""
    model = str(tiny_model("llama-biases").directory)
    expected = answers(integer_engine(model))
    with serve(model) as (_, address):
        options = GuardConfig(pads_ahead=ahead, checks=checks)
        assert_same(private_answers(model, "masked", address, guard=options), expected)


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    row_threads.cache_clear()
    try:
        yield
    finally:
        torch.set_num_threads(1)
        row_threads.cache_clear()


@pytest.mark.parametrize("count", [2, 4])
def test_more_threads(count: int) -> None:
    model = str(tiny_model("llama").directory)
    with threads(count), serve(model) as (_, address):
        expected = answers(integer_engine(model))
        for mode in MODES:
            assert_same(private_answers(model, mode, address), expected)


@pytest.mark.slow
def test_the_default_model() -> None:
    model = str(fetch_default())
    prompt = list(b"a few")
    with threads(2), serve(model) as (_, address):
        engine = integer_engine(model, kept="float32")  # as its weights are stored
        expected = engine.logits(prompt)
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        tokens = [output.token for _, output in engine.generate([prompt], params)]
        for mode in MODES:
            with LLM(model, protection=mode, worker=address) as llm:
                assert torch.equal(llm.logits(prompt), expected)
                assert list(llm.generate(prompt, params)[0].token_ids) == tokens
