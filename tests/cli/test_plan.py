"""``tsqp plan``: a table, an object, and refusals in one line. It loads no library of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Result
from tests.fresh_interpreter import loaded, modules_after

Command = Callable[..., Result]


def test_a_cluster_is_planned(tsqp: Command) -> None:
    asked = ("plan", "--model", "70b", "--workers", 8, "--columns", 4, "--layers", 2, "--device", "h200")
    result = tsqp(
        *asked, "--link", "100Gbit", "--rtt", "0.2ms", "--cores", 64, "--batch", 16, "--prompt", 2048, "--json"
    )
    assert result.code == 0
    found = json.loads(result.out)
    assert found["model"] == "70b"
    assert found["team"] == {"columns": 4, "layers": 2, "replicas": 1, "workers": 8}
    assert found["link"] == {"transport": "tcp", "bytes_per_s": 12.5e9, "rtt_s": 2e-4, "loss": 0.0, "plain": False}
    assert (found["batch"], found["prompt"], found["trusted_cores"]) == (16, 2048, 64)
    assert found["decode"]["parts_s"]["round_trips"] == pytest.approx(321 * 2e-4)
    assert found["decode"]["tokens_per_s"] > found["decode"]["lasting_tokens_per_s"] > 0


def test_a_plan_for_a_person_names_the_bottleneck_and_what_is_held(tsqp: Command) -> None:
    result = tsqp("plan", "--model", "8b", "--workers", 2, "--link", "shm", "--cores", 4, "--dealers", 1)
    assert result.code == 0
    for words in (
        "masked, 2 workers (cpu, 2 cores each)",
        "link shm",
        "most of it is",
        "pads by 1 dealer:",
        "check vectors",
    ):
        assert words in result.out


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("1b", "--prompt", 256), []),
        (("1b", "--protection", "verified"), []),
        (("1b",), ["pads of 1024 tokens are ready where a run has --pads-ahead 1024 --pad-memory 1577MB"]),
        (("1b", "--prompt", 1, "--batch", 300), ["pads of 304 tokens are ready where a run has --pads-ahead 304"]),
        (
            ("70b", "--prompt", 1000),
            [
                "pads of 256 tokens are ready where a run has --pad-memory 6912MB",
                "pads of 1008 tokens are ready where a run has --pads-ahead 1008 --pad-memory 27119MB",
            ],
        ),
    ],
)
def test_a_plan_says_what_a_run_needs_for_pads_that_are_ready(
    asked: tuple[str | int, ...], told: list[str], tsqp: Command
) -> None:
    """For a step and for a prompt; nothing of what a run does anyway."""
    out = tsqp("plan", "--model", *asked).out
    assert [line for line in out.splitlines() if "--pad" in line] == told


@pytest.mark.parametrize("memory", ["2G", "2GB", "2000000000"])
def test_memory_is_a_size_as_for_every_command(memory: str, tsqp: Command) -> None:
    assert "and has 2 GB" in tsqp("plan", "--worker-memory", memory).err
    assert tsqp("plan", "--worker-memory", f"{memory[0]}0{memory[1:]}").code == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--link", "fast"), "--link is a rate such as 100Gbit, and not 'fast'"),
        (("--link", "0Gbit"), "--link must be more than 0"),
        (("--rtt", "1 parsec"), "--rtt is a time such as 0.1ms, and not '1 parsec'"),
        (("--workers", "7", "--columns", "2"), "7 workers do not make such a team"),
        (("--worker-memory", "1GB"), "a worker holds"),
        (("--device", "h100"), "--device h100 was not measured: use cpu, h200"),
        (("--loss", "1"), "--loss must be at least 0 and below 1, not 1.0"),
        (("--checks", "17"), "--checks must be at most 16, not 17"),
        (("--batch", "0"), "--batch must be at least 1, not 0"),
        (("--batch", "2000000"), "--batch must be at most 1,048,576, not 2,000,000"),
        (("--prompt", "2000000"), "--prompt must be at most 1,048,576, not 2,000,000"),
        (("--loss", "nan"), "--loss must be at least 0 and below 1, not nan"),
        (("--link", "shm", "--rtt", "5ms"), "--rtt is for a link that is not shm"),
        (("--link", "shm", "--loss", "0"), "--loss is for a link that is not shm"),
        (("--link", "shm", "--plain"), "--plain is for a link that is not shm"),
        (("--device", "h200", "--worker-cores", "64"), "--worker-cores is for workers that are processors"),
        (("--protection", "verified", "--dealers", "4"), "--dealers make pads, and verified has none"),
        (("--worker-memory", "0GB"), "--worker-memory must be more than 0"),
        (("--worker-cores", "0"), "--worker-cores must be at least 1, not 0"),
        (("--model", "synthetic:none"), "no synthetic model"),
        (("--model", "71b"), "or one of the shapes 1b, 8b, 70b, 405b"),
        (
            ("--constants", "/nowhere.json"),
            "--constants /nowhere.json: No such file or directory; give a file that tsqp bench constants",
        ),
        (("--constants", "/"), "--constants /: Is a directory; give a file that tsqp bench constants"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments: tuple[str, ...], error: str, tsqp: Command) -> None:
    result = tsqp("plan", *arguments)
    assert result.code in (1, 2)
    assert error in result.err
    assert len(result.err.splitlines()) == 1


def test_constants_by_which_all_takes_no_time_are_refused_in_one_line(tmp_path: Path, tsqp: Command) -> None:
    """As a machine might be measured that is far too busy: what is fitted ends at zero."""

    def without_times(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: part[key] if key in ("cores", "memory") else without_times(part[key]) for key in part}
        return 0.0 if isinstance(part, float) else part

    measured = json.loads((files("tsqp.plan") / "constants.json").read_bytes())
    own = tmp_path / "constants.json"
    own.write_text(json.dumps(without_times(measured)))
    for protection in ("masked", "verified"):
        result = tsqp("plan", "--constants", own, "--protection", protection)
        assert result.code == 2
        assert "with these figures something takes no time: run tsqp bench constants again" in result.err
        assert len(result.err.splitlines()) == 1


def test_a_plan_says_whose_cores_it_counts_and_how_many_of_each_there_are(tsqp: Command) -> None:
    out = tsqp("plan", "--workers", "1", "--cores", "1", "--worker-cores", "1", "--dealers", "1").out
    assert out.startswith("masked, 1 worker (cpu, 1 core each): 1 column, 1 set of layers, 1 replica; link")
    assert "; 1 trusted core\n" in out
    assert "pads by 1 dealer:" in out
    out = tsqp("plan", "--workers", "8", "--columns", "2", "--layers", "2", "--device", "h200", "--cores", "2").out
    assert out.startswith("masked, 8 workers (h200): 2 columns, 2 sets of layers, 2 replicas; link")
    assert "; 2 trusted cores\n" in out


def test_a_plan_says_what_link_it_is_for(tsqp: Command) -> None:
    result = tsqp("plan", "--link", "10Gbit", "--rtt", "5ms", "--loss", "0.01", "--plain")
    assert "link 10 Gbit/s, 5 ms, 0.01 of packets lost, no keys;" in result.out
    found = json.loads(tsqp("plan", "--link", "10Gbit", "--loss", "0.01", "--plain", "--json").out)
    assert found["link"] == {"transport": "tcp", "bytes_per_s": 1.25e9, "rtt_s": 1e-4, "loss": 0.01, "plain": True}


@pytest.mark.parametrize("forbidden", ["torch", "numba", "zmq"])
def test_a_plan_loads_no_library_of_tensors(forbidden: str) -> None:
    assert not loaded(modules_after("from tsqp.cli.main import run; run(['plan', '--model', '405b'])"), forbidden)
