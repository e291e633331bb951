"""How much memory pads take, and what is said where that is too much."""

from __future__ import annotations

from tests.families import tiny_model
from tsqp.api.config import GuardConfig
from tsqp.api.describe import ahead_text
from tsqp.api.pads import pool_bytes, row_bytes
from tsqp.checkpoint import open_checkpoint
from tsqp.trusted.filler import targets

MODEL = str(tiny_model("llama").directory)


def test_a_pool_that_memory_shrinks_says_so() -> None:
    config = open_checkpoint(MODEL).config
    options = GuardConfig(pads_ahead=64, pad_memory=pool_bytes(config, 32))
    given, needed = (pool_bytes(config, tokens) for tokens in (32, 64))
    assert ahead_text(config, options, 32) == f"32 of 64 tokens ahead: pads may take {given} bytes of {needed}"
    assert ahead_text(config, GuardConfig(pads_ahead=60), 64) == "64 tokens ahead"


def test_the_memory_of_pads_is_what_the_filler_counts() -> None:
    config = open_checkpoint(MODEL).config
    for tokens in (1, 16, 17, 100):
        enough = pool_bytes(config, tokens)
        wanted = targets(config, tokens, enough)
        assert wanted == targets(config, tokens, 1 << 62)
        assert targets(config, tokens, enough - 1) != wanted
        layer_blocks = -(-tokens // 16)
        assert enough >= 16 * layer_blocks * row_bytes(config, answer=False)
    assert row_bytes(config, answer=True) - row_bytes(config, answer=False) == 4 * config.vocab_size
