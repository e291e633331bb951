"""GGUF files of quantised forms, from the file to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import StartWorker
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.checkpoint import open_checkpoint
from tsqp.config.protection import ProtectionName

from .gguf_blocks import FORMS, write_mix

PROMPT = [3, 7, 1, 250, 99, 42, 8]
GREEDY = SamplingParams(max_tokens=8)


def expected_logits(path: Path) -> torch.Tensor:
    """Of transformers with the same numbers, of every position."""
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
        )
    ).eval()
    theirs.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.shapes}, strict=False)
    with torch.no_grad():
        return theirs(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("forms", [(), FORMS], ids=["Q4_K_M", "every-form"])
def test_a_mix_of_forms_gives_what_transformers_gives_for_its_numbers(tmp_path: Path, forms: Sequence[str]) -> None:
    path = tmp_path / "m.gguf"
    write_mix(path, forms=forms, layers=4)
    used = set(open_checkpoint(str(path)).stored_as())
    assert used == {*(forms or ("Q4_K", "Q6_K")), "F32"}
    expected = expected_logits(path)
    with LLM(str(path), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        assert (llm.logits(PROMPT) - expected).norm() <= 1e-4 * expected.norm()


def test_masked_is_verified_for_quantised_files(tmp_path: Path, start_worker: StartWorker) -> None:
    """Both sides dequantise for themselves, and have the same 8-bit weights: else the digests would not agree."""
    path = tmp_path / "m.gguf"
    write_mix(path)
    address = start_worker(path, "shm", dtype="field")
    found = []
    modes: tuple[ProtectionName, ...] = ("masked", "verified")
    for protection in modes:
        with LLM(str(path), protection=protection, worker=address) as llm:
            found.append((llm.logits(PROMPT), llm.generate(PROMPT, GREEDY)[0].token_ids))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    expected = expected_logits(path)
    assert (found[0][0] - expected).norm() <= 0.05 * expected.norm()
