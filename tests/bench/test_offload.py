"""``bench offload``: its times belong together, and its bounds are what a real pass moves and multiplies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.commands import Result
from tsqp import LLM, ComputeConfig
from tsqp.bench import offload
from tsqp.bench.offload import CASES, MODELS, Case, Effort, attention_flop, bench_offload, chosen, guard_bytes
from tsqp.bench.pads import pads_of
from tsqp.bench.plot import draw
from tsqp.bench.show import chart, table
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.groups import group_keys, linear_groups
from tsqp.errors import OptionError
from tsqp.model.batch import Batch

pytestmark = pytest.mark.slow  # two minutes in all: each opens models, and measures them

TINY = "synthetic:tiny"
CONFIG = open_checkpoint(TINY).config
PROMPT, DECODE = Case("prefill-tiny", "tiny", 1, 40, 0), Case("decode-tiny-3", "tiny", 3, 1, 20)
ALONE = Case("decode-tiny", "tiny", 1, 1, 20)


@pytest.mark.parametrize("together", [True, False])
def test_each_figure_follows_from_the_times(together: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(offload, "_open_peer", lambda *_: None)
    if not together:
        monkeypatch.setitem(offload.TOGETHER, "tiny", offload.TOGETHER["8b"])
    result = bench_offload([PROMPT, DECODE], Effort(runs=2, steps=3, threads=1), Console(quiet=True))
    assert [row["name"] for row in result["cases"]] == ["prefill-tiny", "decode-tiny-3"]
    for row, passes in zip(result["cases"], (2, 6), strict=True):
        times = row["all_seconds"]
        assert {figure: len(seconds) for figure, seconds in times.items()} == {
            "local": passes,
            "local_int8": passes,
            "masked": passes,
            "trusted": passes,
            "pads": 2,
        }
        assert all(0 < own < whole for own, whole in zip(times["trusted"], times["masked"], strict=True))
        assert row["gain"] * row["trusted_s"] == pytest.approx(row["local_s"])
        assert row["gain_int8"] * row["trusted_s"] == pytest.approx(row["local_int8_s"])
        assert row["gain_tee"] * (row["trusted_s"] + row["pads_s"]) == pytest.approx(row["local_s"])
        assert row["gain_tee_int8"] < row["gain_int8"]
        assert 0 < row["limit_s"] < row["trusted_s"]
        assert row["alternation"] is together
    console = Console(record=True, width=100)
    console.print(table(result))
    assert "decode-tiny-3" in console.export_text()
    draw(chart(result), tmp_path / "offload.png")
    assert (tmp_path / "offload.png").read_bytes().startswith(b"\x89PNG")


class Told:
    """A peer whose times are known."""

    name = "told"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        self.asked.append((len(tokens), steps))
        return 2.0, 0.5 * steps


def test_llama_cpp_gets_short_cases_of_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(offload, "_open_peer", lambda *_: told)
    result = bench_offload([PROMPT, DECODE, ALONE], Effort(runs=1, steps=3, threads=1), Console(quiet=True))
    assert [row.get("llama_cpp_s") for row in result["cases"]] == [2.0, None, 0.5]
    assert told.asked == [(40, 0)] * 2 + [(20, 3)] * 2
    assert result["cases"][2]["gain_llama_cpp"] * result["cases"][2]["trusted_s"] == pytest.approx(0.5)
    assert not any(case.peered for case in CASES if case.model == "8b" or max(case.rows, case.context) > 1024)


@pytest.mark.parametrize("case", [PROMPT, DECODE], ids=lambda case: case.name)
def test_the_bound_counts_what_crosses_and_the_products_of_pads(case: Case) -> None:
    """y' and r·Wq have one size; of what is sent, only the messages around x' are not counted."""
    with LLM(TINY, compute=ComputeConfig(threads=1)) as llm:
        caches = [offload.filled(llm.engine.decoder.new_cache(), CONFIG, case.context) for _ in range(case.sequences)]
        assert [cache.length for cache in caches] == [case.context] * case.sequences
        llm.engine.run(Batch([[7] * case.rows] * case.sequences, caches))
        sent, received = (llm.stats.as_dict()[name] for name in ("bytes_sent", "bytes_received"))
    held = case.sequences * case.context * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    written = guard_bytes(CONFIG, case) - 2 * int(received) - held * case.decodes  # type: ignore[call-overload]
    messages = int(sent) - written  # type: ignore[call-overload]
    assert 0 < messages < 100 * len(list(group_keys(CONFIG)))


@pytest.mark.parametrize("case", [PROMPT, DECODE], ids=lambda case: case.name)
def test_the_bound_counts_each_product_of_attention(case: Case) -> None:
    counted = 0
    for _, _, row in itertools.product(range(CONFIG.num_layers), range(case.sequences), range(case.rows)):
        for _, key in itertools.product(range(CONFIG.num_heads), range(case.context + case.rows)):
            counted += 4 * CONFIG.head_dim * (key <= case.context + row)
    assert attention_flop(CONFIG, case) == counted


def test_a_pass_needs_pads_for_each_token_and_the_head_for_each_sequence() -> None:
    names = list(linear_groups(CONFIG))
    for name in names:
        expected = DECODE.sequences if name == "lm_head" else DECODE.tokens * CONFIG.num_layers
        alone: dict[str, float] = {other: float(other == name) for other in names}
        assert offload._pads_seconds(CONFIG, DECODE, alone) == expected


def test_no_pads_are_made_beside_what_is_measured_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    asked = PROMPT, PROMPT.tokens, Effort(runs=1, steps=1, threads=1), Console(quiet=True)
    with offload._open(offload.MASKED, *asked) as llm:
        _, filler = pads_of(llm)
        offload._passes(offload.MASKED, llm, PROMPT, 1)
        assert not filler.make_some()
    with offload._open(offload.MASKED, *asked) as llm:
        pool, filler = pads_of(llm)
        for _ in range(2):
            offload._pad_row_seconds(llm)
            assert not filler.make_some()
            assert not any(map(pool.ready, pool.keys))


def test_cases_fit_their_models() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        if MODELS[case.model].startswith("synthetic:"):
            assert case.context + case.rows < open_checkpoint(locate(MODELS[case.model])).config.max_positions
    assert chosen(()) == CASES
    assert [case.name for case in chosen(("decode-1b", "prefill-1b-1024"))] == ["prefill-1b-1024", "decode-1b"]
    with pytest.raises(OptionError, match="unknown case 'decode'"):
        chosen(("decode",))


def test_the_command_prints_its_result(tsqp: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(offload, "CASES", (DECODE,))
    done = tsqp("bench", "offload", "--case", "decode-tiny-3", "--runs", "1", "--steps", "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["cases"][0]["name"] == "decode-tiny-3"
    assert tsqp("bench", "offload", "--case", "none").code == 2
    assert tsqp("bench", "offload", "--steps", "0").code == 2
