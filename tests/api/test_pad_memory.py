"""How much memory pads take, how a user says it, and what is shown while they are made."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.families import tiny_model
from tsqp.api.guard_config import GuardConfig, parse_size
from tsqp.api.pads import Filling, ahead_text, pads_bar, pool_bytes, row_bytes
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import OptionError
from tsqp.trusted.filler import targets

MODEL = str(tiny_model("llama").directory)


def shown(*, terminal: bool) -> str:
    """What a user sees of a pool of four blocks being filled."""
    written = io.StringIO()
    with pads_bar(Console(file=written, force_terminal=terminal, width=30)) as progress:
        for ready in (0, 1, 4):
            progress(Filling(ready, 4, 32, 2_500_000))
    return written.getvalue()


def test_a_bar_is_drawn_on_a_terminal() -> None:
    assert "making pads" in shown(terminal=True)
    assert "filling" not in shown(terminal=True)


def test_elsewhere_there_is_a_first_and_a_last_line() -> None:
    assert shown(terminal=False).splitlines() == [
        "filling pads for 32 tokens, 2.5 MB",
        "pads for 32 tokens are ready",
    ]


def test_a_pool_that_memory_shrinks_says_so() -> None:
    spec = open_checkpoint(MODEL).spec
    options = GuardConfig(pads_ahead=64, pad_memory=pool_bytes(spec, 32))
    given, needed = (f"{pool_bytes(spec, tokens) / 1000:.1f} kB" for tokens in (32, 64))
    assert ahead_text(spec, options, 32) == f"32 of 64 tokens ahead (--pad-memory {given}, {needed} needed)"
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("512MB", 512_000_000),
        ("2GB", 2 * 10**9),
        ("1GiB", 2**30),
        ("1.5 kib", 1536),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1XB", "1 2", "nan", "1e3"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_size(text)
