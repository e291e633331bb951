"""Which team is the best, what is refused, and what is said."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.numbers import SHM, TINY, model, running
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.groups import linear_groups
from tsqp.config.shard import Shard
from tsqp.config.tiling import MOST_SLICES, Tiling
from tsqp.errors import OptionError
from tsqp.plan.cluster import Setting, Team, teams
from tsqp.plan.constants import ProductTimes, load
from tsqp.plan.memory import memory
from tsqp.plan.pads import pad_times
from tsqp.plan.passes import Model
from tsqp.plan.report import WORDS, found, lines, plan
from tsqp.plan.shapes import NAMES, shape_of
from tsqp.plan.units import parse_rate, parse_seconds, rate_text, seconds_text, size_text

SLOW_WORKER = ProductTimes(0.0, 1.0, 1.0, 1.0)
SETTING = Setting(TINY, "masked", SHM, 1, "cpu", prompt=32)


@given(st.integers(1, 64))
def test_teams_have_all_workers(workers: int) -> None:
    found = list(teams(SHAPES["llama-3.1-70b"], workers, None, None, None))
    assert all(team.workers == workers for team in found)
    assert len(set(found)) == len(found)
    assert (Team(columns=workers) in found) == (workers <= MOST_SLICES)


@pytest.mark.parametrize("columns", [MOST_SLICES, MOST_SLICES + 1])
def test_a_team_has_as_many_columns_as_a_client_takes(columns: int) -> None:
    config = SHAPES["llama-3.2-1b"]
    shards = [Shard(0, config.num_layers + 1, part, part + 1, columns) for part in range(columns)]
    if columns == MOST_SLICES:
        Tiling(shards, config)
        assert list(teams(config, columns, columns, None, None)) == [Team(columns=columns)]
        return
    with pytest.raises(OptionError):
        Tiling(shards, config)
    with pytest.raises(OptionError, match="at most 31 columns"):
        list(teams(config, columns, columns, None, None))


def test_no_team_has_more_workers_than_a_roster() -> None:
    config = SHAPES["llama-3.2-1b"]
    assert Team(replicas=4096) in list(teams(config, 4096, None, None, None))
    with pytest.raises(OptionError, match="--workers 4097 are more than a roster has, 4096"):
        list(teams(config, 4097, None, None, None))


def test_teams_are_those_asked_for() -> None:
    assert list(teams(TINY, 12, 2, 3, None)) == [Team(2, 3, 2)]
    assert list(teams(TINY, 12, None, None, 12)) == [Team(1, 1, 12)]
    for asked in ((12, 5, None, None), (12, 2, 2, 2), (12, None, 4, None), (0, None, None, None), (4, 2, 0, 2)):
        with pytest.raises(OptionError):
            list(teams(TINY, *asked))


def test_the_fastest_team_is_chosen() -> None:
    slow = running(worker=SLOW_WORKER)
    assert plan(slow, SETTING, teams(TINY, 4, None, None, None))["team"]["columns"] == 4
    asking = running(further_call_s={"shm": 1.0, "tcp": 1.0})
    assert plan(asking, SETTING, teams(TINY, 4, None, None, 1))["team"] == {
        "columns": 2,
        "layers": 2,
        "replicas": 1,
        "workers": 4,
    }


def test_only_what_fits_is_chosen() -> None:
    asking = running(memory=memory(SETTING, Team(columns=4)).worker, further_call_s={"shm": 1.0, "tcp": 1.0})
    assert plan(asking, SETTING, teams(TINY, 4, None, None, None))["team"]["columns"] == 4
    with pytest.raises(OptionError, match="a worker holds"):
        plan(asking, SETTING, teams(TINY, 2, None, None, None))
    with pytest.raises(OptionError, match="--device h100 was not measured: use cpu"):
        plan(asking, Setting(TINY, "masked", SHM, 1, "h100"), [Team()])


def test_pads_made_here_slow_what_lasts() -> None:
    known = running(worker=SLOW_WORKER, pad_number_s=1e3)
    here = found(model(known))
    one, pad = 1 / here["decode"]["tokens_per_s"], 1 / here["pads"]["tokens_per_s"]
    assert 1 / here["decode"]["lasting_tokens_per_s"] == pytest.approx(one + pad)
    assert here["decode"]["lasting_largest"] == "pads"
    assert here["decode"]["largest"] in ("reading", "multiplying")
    clear = found(model(known, mode="verified"))
    assert clear["pads"] is None
    assert clear["decode"]["lasting_tokens_per_s"] == clear["decode"]["tokens_per_s"]


def test_pads_of_dealers_are_expanded_and_checked_by_the_cores_that_passes_need() -> None:
    known = running(worker=SLOW_WORKER, pad_number_s=1e3)
    setting = model(known, dealers=1)
    dealt = found(setting)
    for name, rows in (("decode", 1), ("prefill", 32)):
        own = pad_times(known, setting.setting, rows).own / rows
        assert 1 / dealt[name]["lasting_tokens_per_s"] == pytest.approx(1 / dealt[name]["tokens_per_s"] + own)


@pytest.mark.parametrize("name", ["prefill-1b-1024", "decode-1b"])
def test_what_pads_add_is_what_a_benchmark_of_pads_adds_up(name: str) -> None:
    from tsqp.bench.offload import CASES, _pads_seconds

    case = next(case for case in CASES if case.name == name)
    prompt, config, known = case.tokens > 1, SHAPES["llama-3.2-1b"], load()
    setting = Setting(config, "masked", SHM, 2, "cpu", prompt=case.tokens if prompt else case.context)
    row_s: dict[str, float] = {
        name: (known.trusted.pad_weight_s * one.in_features * one.out_features / 2)
        + known.trusted.pad_number_s * (one.in_features + one.out_features) / 2
        for name, one in linear_groups(config).items()
    }
    planned = found(Model(known, setting, Team()))["prefill" if prompt else "decode"]
    added = 1 / planned["lasting_tokens_per_s"] - 1 / planned["tokens_per_s"]
    assert added * case.tokens == pytest.approx(_pads_seconds(config, case, row_s))


def test_rates_are_of_all_sequences() -> None:
    known = running(call_s={"step": 1.0, "shm": 1.0, "tcp": 1.0}, alone=ProductTimes(0.0, 1.0, 0.0, 0.0))
    one = found(model(known, batch=3))
    assert one["decode"]["tokens_per_s"] == pytest.approx(3 / 9)
    assert one["prefill"]["tokens_per_s"] == pytest.approx(32 / 9)
    assert one["decode"]["gain"] == pytest.approx(one["decode"]["tokens_per_s"] / one["decode"]["in_tee_tokens_per_s"])


def test_a_prompt_of_one_token_is_no_faster_in_parts() -> None:
    known = running(worker=SLOW_WORKER, call_s={"step": 1.0, "shm": 1.0, "tcp": 1.0})
    one, more = (found(model(known, prompt=1, micro_batches=count))["prefill"] for count in (1, 8))
    assert one == more


def test_each_part_has_words() -> None:
    text = "\n".join(lines(found(model(running(worker=SLOW_WORKER)))))
    assert "the workers' reading of weights" in text or "the workers' multiplying" in text
    names = set(found(model(running()))["decode"]["parts_s"])
    assert names | {"pads"} == set(WORDS)


def test_shapes_by_short_names() -> None:
    assert shape_of("70B").num_layers == 80
    assert shape_of("synthetic:tiny") is SHAPES["tiny"]
    assert {shape_of(name).vocab_size for name in NAMES} == {128_256}
    counts = {name: sum(_weights(name)) for name in NAMES}
    assert {name: round(count / 1e9, 1) for name, count in counts.items()} == {
        "1b": 1.2,
        "8b": 7.5,
        "70b": 69.5,
        "405b": 403.7,
    }


def _weights(name: str) -> tuple[int, int]:
    from tsqp.plan.passes import weights_of

    return weights_of(shape_of(name))


def test_units() -> None:
    assert parse_rate("100Gbit", "--link") == 12.5e9
    assert parse_rate("2.5 gbit/s", "--link") == 312.5e6
    assert parse_seconds("0.1ms", "--rtt") == pytest.approx(1e-4)
    assert (size_text(1234), size_text(5), size_text(7.5e9)) == ("1.23 kB", "5 B", "7.5 GB")
    assert rate_text(12.5e9) == "100 Gbit/s"
    assert (seconds_text(0.0001), seconds_text(0.05), seconds_text(2)) == ("100 µs", "50 ms", "2 s")
    for text in ("100", "Gbit", "-1Gbit", "1e9Gbit", "1 Gbyte", "x" * 99, "1ms"):
        with pytest.raises(OptionError, match=r"^--link is a rate such as 100Gbit, and not '"):
            parse_rate(text, "--link")


def test_the_constants_of_the_package_are_whole() -> None:
    known = load()
    assert {"cpu", "h200"} <= set(known.devices)
    assert known.trusted.number_s.keys() == {"masked", "verified"}
    assert known.trusted.call_s.keys() == {"step", "shm", "tcp", "team_shm", "team_tcp"}


@pytest.mark.parametrize("change", [{"cores": 0}, {"benchmark": "guard"}, {"further": 1}, {"trusted": {}}])
def test_other_constants_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({**json.loads(_packaged()), **change}))
    with pytest.raises(OptionError, match="not what tsqp bench constants writes"):
        load(file)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (("trusted", "call_s"), "trusted.call_s has no step, shm, tcp, team_shm, team_tcp"),
        (("trusted", "further_call_s"), "trusted.further_call_s has no shm, tcp"),
        (("trusted", "number_s"), "trusted.number_s has no masked, verified"),
        (("devices", "cpu", "products"), "devices.cpu.products has no masked, verified"),
        (("devices",), "devices"),
    ],
)
def test_constants_that_lack_something_are_refused_by_its_name(
    place: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    changed = json.loads(_packaged())
    *way, last = place
    reduce(getitem, way, changed)[last] = {}
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(OptionError, match=told) as refused:
        load(file)
    assert "not what tsqp bench constants writes" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_constants_that_lack_one_mode_are_refused_by_its_name(tmp_path: Path) -> None:
    changed = json.loads(_packaged())
    del changed["trusted"]["call_s"]["team_tcp"]
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(OptionError, match=r"call_s has no team_tcp$"):
        load(file)


def _packaged() -> str:
    from importlib.resources import files

    return (files("tsqp.plan") / "constants.json").read_text()
