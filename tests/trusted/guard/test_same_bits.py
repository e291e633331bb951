"""The logits of a sequence in a private mode are the same bits alone and in any batch, chunk size and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.families import FAMILIES, random_tokens, tiny_model
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import serve
from tsqp import LLM
from tsqp.api.config import ComputeConfig, ProtectionName
from tsqp.arith.row_threads import row_threads
from tsqp.config.dtype import PRIVATE_KV_DTYPES, PrivateKVDtype
from tsqp.model.batch import Batch
from tsqp.trusted.engine.engine import Engine

PROMPTS = [random_tokens(37), random_tokens(150, seed=1), random_tokens(1, seed=2), random_tokens(129, seed=3)]
STEPS = [random_tokens(3, seed=4 + index) for index in range(len(PROMPTS))]


def logits(engine: Engine, chosen: Sequence[int]) -> list[torch.Tensor]:
    """Logits of every row of some prompts and of three decode steps after them, together: (T, vocab) for each."""
    caches = [engine.decoder.new_cache() for _ in chosen]
    found: list[list[torch.Tensor]] = [[] for _ in chosen]
    for step in range(4):
        tokens = [PROMPTS[index] if step == 0 else STEPS[index][step - 1 : step] for index in chosen]
        rows = engine.run(Batch(tokens, caches, every_row=True)).split([len(one) for one in tokens])
        for own, new in zip(found, rows, strict=True):
            own.append(new.clone())
    return [torch.cat(own) for own in found]


def opened(
    model: str,
    mode: ProtectionName,
    address: str,
    prefill_chunk: int,
    micro_batches: int,
    kept: PrivateKVDtype | None = None,
) -> LLM:
    compute = ComputeConfig(prefill_chunk=prefill_chunk, micro_batches=micro_batches, kv_dtype=kept)
    return LLM(model, protection=mode, worker=address, compute=compute)


@pytest.mark.parametrize(
    ("family", "mode", "kept"),
    [
        *((family, mode, None) for family in FAMILIES for mode in MODES),
        *(("llama", "masked", kept) for kept in PRIVATE_KV_DTYPES),
    ],
)
def test_alone_and_in_any_batch_and_schedule(family: str, mode: ProtectionName, kept: PrivateKVDtype | None) -> None:
    model = str(tiny_model(family).directory)
    with serve(model) as (_, address):
        with opened(model, mode, address, 2048, 1, kept) as llm:
            alone = [logits(llm.engine, [index])[0] for index in range(len(PROMPTS))]
        for chunk, parts in ((2048, 1), (2048, 3), (7, 1), (130, 2)):
            with opened(model, mode, address, chunk, parts, kept) as llm:
                for ours, expected in zip(logits(llm.engine, range(len(PROMPTS))), alone, strict=True):
                    assert torch.equal(ours, expected), (chunk, parts)


@pytest.mark.parametrize(("mode", "kept"), [*((mode, None) for mode in MODES), ("masked", "int8")])
def test_on_any_number_of_threads(mode: ProtectionName, kept: PrivateKVDtype | None) -> None:
    model = str(tiny_model("llama").directory)
    found = []
    with serve(model) as (_, address):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            row_threads.cache_clear()
            try:
                with opened(model, mode, address, 2048, 1, kept) as llm:
                    found.append(torch.cat(logits(llm.engine, range(len(PROMPTS)))))
            finally:
                torch.set_num_threads(1)
                row_threads.cache_clear()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
