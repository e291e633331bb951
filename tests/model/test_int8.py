"""int8 on either side: its linear layers are the integer formula, with either kernel, and the model stays itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch

from tests.arith.kernels import CPU, KERNELS
from tests.families import random_tokens, tiny_model
from tests.model.launches import Launches
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.quantise import quantise_rows
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey
from tsqp.config.partition import PARTITIONS
from tsqp.errors import UnsupportedModel
from tsqp.model import int8
from tsqp.model.int8 import Int8Linear, load_int8_group
from tsqp.model.linear import LinearProduct, LinearWeights, load_group
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.transport import listen

PROMPT = random_tokens(50)
GREEDY = SamplingParams(max_tokens=24)
BIASES: GroupKey = ("qkv", 1)

_numbers = count()


@dataclass(frozen=True)
class Reference:
    """The formula, with int64 sums: what every int8 product must equal bit for bit."""

    floats: LinearWeights

    @property
    def group(self) -> Any:
        return self.floats.group

    def input(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.group.in_features, dtype=torch.bfloat16)

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        first, end = self.group.part_rows(part)
        w, x_rows = quantise_rows(self.floats.weight), quantise_rows(x)
        sums = x_rows.values.long() @ w.values[first:end].long().t()
        y = sums.float() * x_rows.scales.unsqueeze(1) * w.scales[first:end]
        if self.floats.bias is not None:
            y = y + self.floats.bias[first:end]
        return y.to(torch.bfloat16) if out is None else out.copy_(y)


@contextmanager
def serving(store: WeightStore) -> Iterator[str]:
    with closing(listen(f"mem:int8-{next(_numbers)}")) as listener:
        thread = threading.Thread(target=Worker(store).serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.address
        listener.interrupt()
        thread.join(10)


def checkpoint_of(family: str) -> Checkpoint:
    return open_checkpoint(str(tiny_model(family).directory))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("part", [None, 0, 2])
def test_a_product_is_the_formula(
    kernel: DigitKernel, rows: int, part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "BLOCK_ELEMENTS", 500)  # so that the rows take several blocks
    checkpoint = checkpoint_of("llama-biases")
    linear = load_int8_group(checkpoint, BIASES, kernel, torch.bfloat16, CPU)
    reference = Reference(load_group(checkpoint, BIASES, torch.float32))
    x = torch.randn(rows, linear.group.in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
    expected = reference.product(x, part)
    for one in (linear, replace(linear, at_once=True)):  # in blocks, and as a device does it
        assert torch.equal(one.product(x, part), expected)
        place = torch.empty_like(expected)
        assert one.product(x, part, out=place) is place
        assert torch.equal(place, expected)


def test_a_device_is_given_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches do not grow with rows: blocks that fit a cache of the CPU would be dozens of them."""
    monkeypatch.setattr(int8, "BLOCK_ELEMENTS", 500)
    loaded = load_int8_group(checkpoint_of("llama"), BIASES, BlockedKernel(), torch.bfloat16, CPU)
    linear = replace(loaded, at_once=True)
    counts = []
    for rows in (2, 40):
        with Launches() as launches:
            linear.product(torch.zeros(rows, linear.group.in_features, dtype=torch.bfloat16))
        counts.append(len(launches.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_tokens_are_those_of_the_reference_model(kernel: DigitKernel, partition: PartitionName) -> None:
    model = tiny_model("llama-biases")
    checkpoint = checkpoint_of("llama-biases")
    store, reference = (WeightStore(checkpoint, "float32", CPU, kernel=kernel) for _ in range(2))
    weights = store.prepare("int8")
    assert isinstance(weights, ModelWeights)
    groups: dict[GroupKey, LinearProduct] = {
        key: Reference(load_group(checkpoint, key, torch.float32)) for key in weights.groups
    }
    answers = []
    reference._prepared["int8"] = replace(weights, groups=groups)
    for held in (store, reference):
        with (
            serving(held) as address,
            LLM(
                str(model.directory),
                protection="open",
                worker=address,
                compute=ComputeConfig(partition=partition, dtype="int8", prefill_chunk=19),
            ) as llm,
        ):
            answers.append((llm.generate(PROMPT, GREEDY)[0].token_ids, llm.logits(PROMPT)))
    (tokens, logits), (expected_tokens, expected_logits) = answers
    assert tokens == expected_tokens
    assert torch.equal(logits, expected_logits)
    exact = model.logits(PROMPT)
    assert float((logits - exact).norm() / exact.norm()) <= 0.05


@pytest.mark.parametrize("partition", PARTITIONS)
def test_an_int8_wire_stays_close(partition: PartitionName) -> None:
    model = tiny_model("qwen3")
    with (
        serving(WeightStore(checkpoint_of("qwen3"), "float32", CPU)) as address,
        LLM(
            str(model.directory),
            protection="open",
            worker=address,
            compute=ComputeConfig(partition=partition, dtype="float32", wire_dtype="int8", prefill_chunk=19),
        ) as llm,
    ):
        logits = llm.logits(PROMPT)
    exact = model.logits(PROMPT)
    assert float((logits - exact).norm() / exact.norm()) <= 0.05


def test_weights_are_a_byte_each_and_the_embedding_is_kept_apart() -> None:
    weights = ModelWeights.load(checkpoint_of("llama-tied"), "int8", CPU)
    head = weights.groups["lm_head", None]
    assert isinstance(head, Int8Linear)
    assert (head.wq.dtype, weights.embedding.dtype, weights.compute) == (torch.int8, torch.bfloat16, "int8")


def test_sums_that_int32_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "MAX_INT8_TERMS", 63)
    with pytest.raises(UnsupportedModel, match="63 terms"):
        ModelWeights.load(checkpoint_of("llama"), "int8", CPU)


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied"])
def test_local_computes_what_a_worker_and_this_side_do_together(family: str) -> None:
    """The same formula in one process, so the same logits to the last bit; and no worker."""
    directory, compute = str(tiny_model(family).directory), ComputeConfig(dtype="int8", prefill_chunk=19)
    with (
        serving(WeightStore(checkpoint_of(family), "float32", CPU)) as address,
        LLM(directory, protection="open", worker=address, compute=compute) as llm,
    ):
        expected, tokens = llm.logits(PROMPT), llm.generate(PROMPT, GREEDY)[0].token_ids
    with LLM(directory, protection="local", compute=compute) as llm:
        assert llm.session is None
        assert torch.equal(llm.logits(PROMPT), expected)
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == tokens


def test_one_worker_serves_floats_and_int8_to_those_who_ask() -> None:
    directory = str(tiny_model("llama").directory)
    store = WeightStore(checkpoint_of("llama"), "float32", CPU)
    computes = []
    with serving(store) as address:
        for dtype in ("float32", "int8", "int8", "float32"):
            with LLM(directory, protection="open", worker=address, compute=ComputeConfig(dtype=dtype)) as llm:
                llm.generate(PROMPT, SamplingParams(max_tokens=2))
                assert llm.session is not None
                computes.append(llm.session.welcome.dtype)
    assert computes == ["float32", "int8", "int8", "float32"]
    assert store.prepare("int8") is store.prepare("int8")  # read once, then kept


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_weights_that_are_no_numbers_are_refused_by_group_and_layer(
    kind: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of("llama-biases")
    read = checkpoint.row_blocks

    def broken(name: str, *which: int) -> Iterator[tuple[int, torch.Tensor]]:
        for first, rows in read(name, *which):
            found = rows.clone()
            if name == f"model.layers.1.mlp.up_proj.{kind}" and first == 0:
                found.flatten()[3] = value
            yield first, found

    monkeypatch.setattr(checkpoint, "row_blocks", broken)
    with pytest.raises(UnsupportedModel, match=r"group gate_up of layer 1 .*finite"):
        ModelWeights.load(checkpoint, "int8", CPU)
