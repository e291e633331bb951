"""How much memory pads take, how a user says it, and the bar while they are made."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.families import tiny_model
from tsqp.app.guard_options import parse_size
from tsqp.app.pads import pads_bar, pool_bytes, row_bytes
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import OptionError
from tsqp.trusted.filler import targets

MODEL = str(tiny_model("llama").directory)


def test_a_bar_is_drawn_on_a_terminal_alone() -> None:
    for terminal in (True, False):
        written = io.StringIO()
        with pads_bar(Console(file=written, force_terminal=terminal, width=80)) as progress:
            progress(1, 4)
            progress(4, 4)
        assert ("making pads" in written.getvalue()) == terminal


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
