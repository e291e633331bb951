from __future__ import annotations

import time

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.model import RopeConfig
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint

from .makers import TEXTS


def test_tiny_is_a_whole_model_of_transformers() -> None:
    checkpoint = open_checkpoint("synthetic:tiny")
    given = AutoConfig.for_model(**hf_config_of(checkpoint.config, "float32"))
    model = AutoModelForCausalLM.from_config(given)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    assert sorted(names) == sorted(tensor_shapes(checkpoint.config))
    model.load_state_dict({name: checkpoint.tensor(name) for name in names}, strict=False)
    logits = model(torch.arange(10)[None]).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_values(name: str) -> None:
    tensor = open_checkpoint("synthetic:smollm2-135m").tensor(name)
    assert tensor.dtype == torch.bfloat16
    values = tensor.float()
    wanted = tensor.shape[1] ** -0.5
    assert wanted / 1.5 < values.std() < wanted * 1.5
    assert abs(values.mean()) < wanted / 100
    assert torch.equal(tensor.to(torch.float16).float(), values)  # every dtype holds the same weights


PINNED_BITS = [-16786, 15893, -17051, 15838, 15855, 15559]


def test_generator_is_pinned() -> None:
    """Two machines must make the same weights: these bits may only change with GENERATOR_VERSION."""
    tensor = open_checkpoint("synthetic:tiny").tensor("model.layers.0.self_attn.q_proj.weight")
    assert tensor.flatten()[:6].view(torch.int16).tolist() == PINNED_BITS
    assert torch.equal(open_checkpoint("synthetic:TINY").tensor("model.norm.weight"), torch.ones(64).bfloat16())


def test_fingerprints() -> None:
    prints = {open_checkpoint(f"synthetic:{name}").fingerprint() for name in SHAPES}
    assert len(prints) == len(SHAPES)
    upper = open_checkpoint("synthetic:TinyLlama-1.1B")
    assert upper.fingerprint() in prints


def test_known_shapes() -> None:
    config = SHAPES["llama-3.2-1b"]
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size) == (
        2048,
        8192,
        16,
        128_256,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.tied_embeddings) == (32, 8, 64, True)
    assert config.rope == RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)


def test_one_tensor_is_made_alone_and_fast() -> None:
    checkpoint = open_checkpoint("synthetic:llama-3.1-8b")
    start = time.thread_time()  # of this thread, which computes it: the processor may be others' for longer
    assert checkpoint.tensor("model.layers.31.self_attn.q_proj.weight").shape == (4096, 4096)
    assert time.thread_time() - start < 2.0


def test_text_is_bytes() -> None:
    text = open_checkpoint("synthetic:tiny").text_format()
    assert text.eos_token_ids == ()
    assert text.chat_template is None
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    for line in TEXTS:
        ids = tokenizer.encode(line).ids
        assert bytes(ids) == line.encode()
        assert tokenizer.decode([*ids, 300, 511]) == line


def test_unknown_names() -> None:
    with pytest.raises(CheckpointNotFound, match=r"llama-3\.2-1b.*tiny"):
        open_checkpoint("synthetic:gpt-5")
    with pytest.raises(CorruptCheckpoint, match="nonsense"):
        open_checkpoint("synthetic:tiny").tensor("nonsense")
