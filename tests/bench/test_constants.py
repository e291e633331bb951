"""Constants of a plan: from passes whose times follow from known constants, the same come back."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from benchmarks import scaling
from benchmarks.constants import h200
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from tests.plan.numbers import SHM, constants
from tsqp.bench import constants as bench
from tsqp.bench import probe as bench_probe
from tsqp.bench.constants import (
    attention,
    bench_constants,
    calls_in_python,
    numbers_and_call,
    source_of,
    with_prompts,
    worker_products,
)
from tsqp.bench.probe import (
    ALONE,
    LINKS,
    LONG,
    LONG_PROMPT,
    NO_CALLS,
    PROMPT,
    SHORT,
    UNKNOWN,
    LongPasses,
    Passes,
    Probe,
)
from tsqp.bench.product_times import Products, fitted, least_seconds, solved
from tsqp.bench.show import table
from tsqp.bench.trusted_times import PassTime
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.cores import cores
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import FEW_ROWS, Constants, NumberTimes, ProductTimes, TransportKind
from tsqp.plan.passes import Model, Parts
from tsqp.plan.report import plan

DEEP, WIDE = "smollm2-135m", "llama-3.2-1b-4-layers"
WORKER = ProductTimes(5e-5, 3e-11, 2e-12, 1e-12, 2e-9)
NUMBERS = NumberTimes(3e-9, 5e-9, row=1e-5, once=2e-9)
KNOWN = constants(
    WORKER,
    call_s={"step": 4e-5, "shm": 2e-4, "tcp": 5e-4, "team_shm": 3e-4, "team_tcp": 7e-4},
    further_call_s={"shm": 6e-5, "tcp": 9e-5},
    number_s={"masked": NUMBERS, "verified": NUMBERS},
    dot_s=1e-10,
    byte_s=1e-9,
    team_byte_s=1e-10,
    cache_byte_s=1e-10,
    flop_s=1e-11,
)


def planned(shape: str, link: Link, team: Team, *, batch: int = 0, tokens: int = PROMPT) -> Parts:
    """Of a step of ``batch`` sequences after so many tokens; of a prompt for batch 0."""
    setting = Setting(SHAPES[shape], "masked", link, cores(), "cpu", batch=batch or 1, prompt=tokens)
    model = Model(KNOWN, setting, team)
    return model.decode() if batch else model.prefill()


def passed(parts: Parts) -> PassTime:
    """What a pass of these parts would take."""
    return PassTime(parts.total, parts.trusted, parts.worker, parts.attention)


def passes(shape: str) -> Passes:
    one, few = (passed(planned(shape, SHM, ALONE, batch=batch, tokens=SHORT)) for batch in (1, FEW_ROWS))
    return Passes(one, few, passed(planned(shape, SHM, ALONE)))


class FakeProbe(Probe):
    """Measures what the constants say. Calls in Python over shm are those of a prompt."""

    def __init__(self, shape: str) -> None:
        super().__init__(f"synthetic:{shape}", 1, Console(quiet=True))
        self.shape = shape

    def long_passes(self) -> LongPasses:
        steps = (passed(planned(self.shape, SHM, ALONE, batch=1, tokens=tokens)) for tokens in (SHORT, LONG))
        prompts = (passed(planned(self.shape, SHM, ALONE, tokens=tokens)) for tokens in (PROMPT, LONG_PROMPT))
        return LongPasses(*steps, *prompts)

    def step_in_python(self) -> PassTime:
        parts = planned(self.shape, SHM, ALONE, batch=1, tokens=SHORT)
        return passed(replace(parts, calls=self.calls * KNOWN.trusted.call_s["shm"]))

    def over_tcp(self) -> tuple[PassTime, PassTime]:
        step = planned(self.shape, LINKS["tcp"], ALONE, batch=1, tokens=SHORT)
        return passed(step), passed(planned(self.shape, LINKS["tcp"], ALONE))

    def by_team(self, of: Team, transport: TransportKind) -> tuple[PassTime, PassTime]:
        step = planned(self.shape, LINKS[transport], of, batch=1, tokens=SHORT)
        return passed(step), passed(planned(self.shape, LINKS[transport], of))


@pytest.fixture(scope="module")
def probes() -> tuple[FakeProbe, FakeProbe]:
    return FakeProbe(DEEP), FakeProbe(WIDE)


def test_attention_is_what_longer_passes_take_more(probes: tuple[FakeProbe, FakeProbe]) -> None:
    found = attention(probes[1], probes[1].long_passes(), UNKNOWN)
    assert found.cache_byte_s == pytest.approx(1e-10)
    assert found.flop_s == pytest.approx(1e-11)


def test_numbers_and_calls_of_steps_give_back_theirs(probes: tuple[FakeProbe, FakeProbe]) -> None:
    known = msgspec.structs.replace(UNKNOWN, cache_byte_s=1e-10)
    numbers, call_s = numbers_and_call(*probes, passes(DEEP), passes(WIDE), known)
    assert (numbers.few, numbers.once, call_s) == pytest.approx((3e-9, 2e-9, 4e-5))


def test_numbers_and_rows_of_prompts_give_back_theirs(probes: tuple[FakeProbe, FakeProbe]) -> None:
    found = with_prompts(NumberTimes(3e-9, 0.0, 0.0, 2e-9), *probes, passes(DEEP), passes(WIDE), KNOWN.trusted)
    # The one row of a prompt's LM head is counted as one of many.
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(NUMBERS), rel=5e-3)


def test_calls_in_python_and_of_teams_give_back_theirs(probes: tuple[FakeProbe, FakeProbe]) -> None:
    none = UNKNOWN.further_call_s
    known = msgspec.structs.replace(KNOWN.trusted, call_s=NO_CALLS, byte_s=0.0, team_byte_s=0.0, further_call_s=none)
    found = calls_in_python(probes[1], passes(WIDE), known, 4e-5)
    assert found.call_s == pytest.approx(KNOWN.trusted.call_s)
    assert found.further_call_s == pytest.approx(KNOWN.trusted.further_call_s)
    assert found.byte_s == pytest.approx(1e-9)
    assert found.team_byte_s == pytest.approx(1e-10)


def test_products_give_back_theirs(probes: tuple[FakeProbe, FakeProbe]) -> None:
    found = worker_products(*probes, passes(DEEP), passes(WIDE))
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(WORKER))


def test_noise_gives_nothing_below_zero(probes: tuple[FakeProbe, FakeProbe]) -> None:
    none, slow = PassTime(0.0, 0.0, 0.0, 0.0), PassTime(1.0, 1.0, 1.0, 1.0)
    falling = attention(probes[1], LongPasses(slow, none, slow, none), UNKNOWN)
    assert (falling.cache_byte_s, falling.flop_s) == (0, 0)
    odd = Passes(slow, none, none)
    numbers, call_s = numbers_and_call(*probes, odd, odd, UNKNOWN)
    numbers = with_prompts(numbers, *probes, odd, odd, KNOWN.trusted)
    assert min(*msgspec.structs.astuple(numbers), call_s) >= 0
    assert probes[1].rest_of_step(none, KNOWN.trusted, "shm") == 0


times = st.floats(0, 1)
counts = st.floats(1e-3, 1e3)


@given(counts, counts, counts, counts, times, times)
def test_two_times_give_back_the_two_constants_of_both(
    a: float, b: float, c: float, d: float, x: float, y: float
) -> None:
    assume(abs(a * d - b * c) > 0.1 * (a * d + b * c))
    assume(min(a * x + b * y, c * x + d * y) > 1e-6)
    found = solved((a, b, a * x + b * y), (c, d, c * x + d * y))
    assert a * found[0] + b * found[1] == pytest.approx(a * x + b * y)
    assert c * found[0] + d * found[1] == pytest.approx(c * x + d * y)


@given(counts, counts, counts, counts, times, times)
def test_no_constant_is_below_zero_whatever_was_measured(
    a: float, b: float, c: float, d: float, one: float, other: float
) -> None:
    assert min(solved((a, b, one), (c, d, other))) >= 0


def test_where_one_constant_would_be_below_zero_the_other_fits_both_times_as_well_as_it_can() -> None:
    assert solved((1.0, 1.0, 1.0), (1.0, 2.0, 4.0)) == pytest.approx((0.0, 1.5 / 1.25))
    assert solved((1.0, 1.0, 1.0), (2.0, 1.0, 4.0)) == pytest.approx((1.5 / 1.25, 0.0))
    assert solved((1.0, 2.0, 3.0), (2.0, 4.0, 6.0)) == pytest.approx((0.0, 1.5))  # the same twice says nothing of one


@given(*(times for _ in range(6)))
def test_a_fit_of_noise_has_no_time_below_zero(
    one: float, few: float, many: float, one_wide: float, few_wide: float, many_wide: float
) -> None:
    narrow = Products(121, 100, 10, 30, PROMPT, one, few, many)
    wide = Products(17, 1000, 10, 60, PROMPT, one_wide, few_wide, many_wide)
    assert min(msgspec.structs.astuple(fitted(narrow, wide))) >= 0


def test_work_is_done_once_more_than_it_is_timed() -> None:
    done: list[str] = []
    least_seconds([lambda: done.append("a"), lambda: done.append("b")], 2)
    assert done == ["a", "b"] * 3


def test_a_gpu_is_what_its_kept_products_say() -> None:
    groups = {"qkv": 3072 * 2048, "o": 2048 * 2048, "gate_up": 16_384 * 2048, "down": 2048 * 8192}
    products = [
        {
            "group": name,
            "rows": rows,
            "field_ms": 0.5 if rows == 1 else 0.5 + weights * 1e-9 + weights * 1024 * 1e-10,
            "bf16_ms": 2 * weights * 1e-9,
        }
        for name, weights in groups.items()
        for rows in (1, 1024)
    ]
    times = h200({"products": products})["products"]["masked"]
    assert times["call_s"] == pytest.approx(5e-4)
    assert times["weight_s"] == pytest.approx(1e-12)
    assert times["many_s"] == pytest.approx(1e-13, rel=0.01)


def test_a_device_says_where_it_was_measured_and_not_in_which_file_that_is() -> None:
    here: dict[str, str | int] = {"cpu": "A chip, 2 cores", "date": "2026-11-30", "commit": "abc1234"}
    assert source_of(here) == "tsqp bench constants on A chip, 2 cores, 2026-11-30, commit abc1234"


def test_each_constant_of_the_trusted_side_has_a_row_for_a_person() -> None:
    shown = Console(width=100, record=True, file=StringIO())
    shown.print(table(msgspec.to_builtins(KNOWN) | {"machine": {"cpu": "a chip"}}))
    text = shown.export_text()
    for words in (
        "call, team_tcp",
        "a row of many, masked",
        "once a call, verified",
        "team byte",
        "here, int8: number",
    ):
        assert words in text


def test_the_tables_of_the_page_are_those_of_the_files() -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.with_tables(text) == text


@pytest.mark.slow
def test_constants_are_measured_and_can_be_planned_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (bench, bench_probe):
        for name, value in (("PROMPT", 32), ("LONG_PROMPT", 64), ("LONG", 256), ("STEPS", 1)):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(bench, "PAD_SHAPE", (64, 32))
    monkeypatch.setattr(bench, "FULL_BYTES", 1 << 16)
    found = bench_constants(1, Console(quiet=True), "synthetic:tiny", "synthetic:tiny")
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(found))
    known = msgspec.json.decode(file.read_bytes(), type=Constants)
    assert known.devices["cpu"].products.keys() == {"masked", "verified"}
    assert known.devices["cpu"].source == source_of(known.machine)
    assert known.trusted.call_s.keys() == {"step", "shm", "tcp", "team_shm", "team_tcp"}
    assert known.cores == cores()
    trusted, worker = known.trusted, known.devices["cpu"].products
    # One of the two that a time is fitted by may come out at nothing, never both.
    for one in (trusted.alone, *worker.values()):
        assert one.call_s + one.weight_s + one.few_s > 0
    assert min(trusted.dot_s, trusted.pad_number_s) > 0
    # A plan leaves out what calls take where everything runs here, and on a busy machine that may be all of `alone`.
    known = msgspec.structs.replace(known, trusted=msgspec.structs.replace(trusted, alone=WORKER))
    setting = Setting(SHAPES["tiny"], "masked", Link.parse("shm", None, None, None), cores(), "cpu")
    planned = plan(known, setting, [Team(columns=2)])
    assert planned["decode"]["step_s"] > 0
    assert planned["prefill"]["prompt_s"] > 0
