"""What is foretold of memory, against what is then held."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.families import tiny_model
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig
from tsqp.api.memory_plan import MemoryPlan, guarded_bytes, memory_plan
from tsqp.api.pads import pool_bytes
from tsqp.api.plan import Plan
from tsqp.arith.product import OffsetKernel
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import AskedDtype, PlainDtype
from tsqp.config.protection import ProtectionName
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import Norms
from tsqp.model.weights import ModelWeights
from tsqp.trusted.private import load_private_model
from tsqp.untrusted.paths.field import FieldWorkerWeights

FAMILIES = ["llama", "llama-tied", "llama-biases", "qwen3"]
EMBEDDING = "model.embed_tokens.weight"
CPU = torch.device("cpu")


def opened(family: str) -> Checkpoint:
    return open_checkpoint(str(tiny_model(family).directory))


def foretold(
    checkpoint: Checkpoint, protection: ProtectionName, dtype: AskedDtype = "auto", **guard: Any
) -> MemoryPlan:
    run = RunConfig("m", protection, guard=GuardConfig(**guard), compute=ComputeConfig(dtype=dtype))
    return memory_plan(checkpoint, Plan.of(run, "float32"))


def held_bytes(value: object) -> int:
    """Of every tensor and array that an object has, each once."""
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif hasattr(value, "ctypes"):
            found[value.ctypes.data] = value.nbytes  # type: ignore[attr-defined]
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif isinstance(value, tuple):
            for item in value:
                look(item)
        elif hasattr(value, "__dataclass_fields__"):
            look(vars(value))

    look(value)
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_private_modes(family: str) -> None:
    checkpoint = opened(family)
    worker = FieldWorkerWeights.load(checkpoint, CPU, kernel=OffsetKernel())
    table, norms = checkpoint.copy(EMBEDDING), Norms.load(checkpoint, torch.float32)
    for keeps in (True, False):
        model = load_private_model(checkpoint, table, norms, checks=3, keep_weights=keeps)
        assert guarded_bytes(checkpoint, 3, multiplies=keeps) == held_bytes((table, norms, model))
    masked, verified = foretold(checkpoint, "masked"), foretold(checkpoint, "verified")
    assert masked.worker == verified.worker == held_bytes(worker.groups)
    assert masked.trusted == guarded_bytes(checkpoint, 2, multiplies=True)
    assert verified.trusted == guarded_bytes(checkpoint, 2, multiplies=False)
    dealt = foretold(checkpoint, "masked", pad_source="dealer=shm:///dealer", dealer_no_separation=True)
    assert dealt.trusted == verified.trusted
    assert masked.pads == dealt.pads == pool_bytes(checkpoint.config, 256)
    assert verified.pads == 0
    assert masked.kv == KVCache(checkpoint.config, torch.float32).bytes_for(1024)
    assert foretold(checkpoint, "masked", pad_memory=100_000).pads <= 100_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_modes(family: str, dtype: PlainDtype) -> None:
    checkpoint = opened(family)
    weights = ModelWeights.load(checkpoint, dtype, CPU, kernel=OffsetKernel())
    held = held_bytes((weights.groups, weights.embedding, weights.norms))
    split, local = foretold(checkpoint, "open", dtype), foretold(checkpoint, "local", dtype)
    assert (split.worker, local.worker, local.trusted) == (held, 0, held)
    assert split.trusted == held_bytes((weights.embedding, weights.norms))
    assert split.pads == local.pads == 0


@pytest.mark.slow
@pytest.mark.parametrize(("side", "protection"), [("field", "masked"), ("private", "masked"), ("bfloat16", "local")])
def test_a_process_takes_what_was_foretold(side: str, protection: ProtectionName) -> None:
    """Private memory of a process that loads 135 million weights, within 15 %."""
    model = "synthetic:smollm2-135m"
    command = [sys.executable, "-m", "tests.checkpoint.loading_child", model, side]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    told = foretold(open_checkpoint(model), protection, "auto" if side != "bfloat16" else "bfloat16")
    expected = told.worker if side == "field" else told.trusted
    assert json.loads(run.stdout)["after"] == pytest.approx(expected, rel=0.15)
