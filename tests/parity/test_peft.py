"""Adapters that PEFT itself has saved are the model that PEFT computes. Skipped where PEFT is not installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig

peft: Any = pytest.importorskip("peft")

TOKENS = random_tokens(50)
TOLERANCE = 1e-4
KINDS: dict[str, dict[str, Any]] = {
    "default": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 16, "lora_alpha": 32},
    "rslora": {"target_modules": ["down_proj", "o_proj"], "use_rslora": True, "r": 6, "lora_alpha": 9},
    "expression": {"target_modules": r".*\.layers\.1\..*(gate|up)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 3, "model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 40},
    },
    "some layers": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_computes(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **KINDS[kind])
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(model.oracle), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].float()
    compute = ComputeConfig(dtype="float32", lora=(str(tmp_path / "adapter"),))
    with LLM(str(model.directory), protection="local", compute=compute) as llm:
        found = llm.logits(TOKENS, lora="adapter")
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE
    assert float((model.logits(TOKENS) - expected).norm() / expected.norm()) > 0.01
