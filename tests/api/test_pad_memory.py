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
    spec = open_checkpoint(MODEL).spec
    options = GuardConfig(pads_ahead=64, pad_memory=pool_bytes(spec, 32))
    given, needed = (pool_bytes(spec, tokens) for tokens in (32, 64))
    assert ahead_text(spec, options, 32) == f"32 of 64 tokens ahead: pads may take {given} bytes of {needed}"
    assert ahead_text(spec, GuardConfig(pads_ahead=60), 64) == "64 tokens ahead"


def test_the_memory_of_pads_is_what_the_filler_counts() -> None:
    spec = open_checkpoint(MODEL).spec
    for tokens in (1, 16, 17, 100):
        enough = pool_bytes(spec, tokens)
        wanted = targets(spec, tokens, enough)
        assert wanted == targets(spec, tokens, 1 << 62)
        assert targets(spec, tokens, enough - 1) != wanted
        layer_blocks = -(-tokens // 16)
        assert enough >= 16 * layer_blocks * row_bytes(spec, answer=False)
    assert row_bytes(spec, answer=True) - row_bytes(spec, answer=False) == 4 * spec.vocab_size
