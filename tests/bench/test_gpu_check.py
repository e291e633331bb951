"""The GPU's check without a GPU: parts have budgets, fail alone and leave results; what is measured is exact first."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_check, gpu_open
from benchmarks.gpu_check import BENCH, OPEN, PARTS, PYTEST, TOTAL_S, TSQP, Check, Part, main
from benchmarks.gpu_field import Case, candidates, compare, measure, product_mod_p

from tests.arith import interpreted
from tests.commands import LIMIT_S, wait_until
from tsqp.arith.field import MAX_FIELD_TERMS
from tsqp.arith.jit import cache_name
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel
from tsqp.arith.triton_field import Tiles
from tsqp.bench.gpu import Work
from tsqp.bench.gpu_ceilings import Sizes, ceilings
from tsqp.cli.commands import app

GPU = {"device": "a fake", "commit": "0123abc"}
CPU = torch.device("cpu")


def part(name: str, code: str, budget_s: float = 30, *, measures: bool = True) -> Part:
    return Part(name, (sys.executable, "-c", code), budget_s, measures, alone=measures)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    parts = [
        part("tests", "import sys; print('a test broke'); sys.exit(3)", measures=False),
        part("field", "print('a table'); print('{\"gpu_ceilings\": {\"copy\": 4}}')"),
        part("talks", "print('no result')"),
        part("list", "print('[1]')"),
        part("rpc", 'print(\'{"p50_us": 9, "machine": {"commit": "unknown", "cpu": "x"}}\')'),
    ]
    ended = Check(tmp_path, GPU).run(parts)
    assert [(one.name, one.outcome, one.code) for one in ended] == [
        ("tests", "failed", 3),
        ("field", "passed", 0),
        ("talks", "no result", 0),
        ("list", "no result", 0),
        ("rpc", "passed", 0),
    ]
    result = read(tmp_path / "gpu-rpc.json")
    assert result["gpu"] == GPU
    assert read(tmp_path / "gpu-field.json")["gpu_ceilings"] == {"copy": 4}
    assert result["commit"] == result["machine"]["commit"] == "0123abc"
    assert result["machine"]["cpu"] == "x"
    summary = read(tmp_path / "gpu-check.json")
    assert [one["outcome"] for one in summary["parts"]] == ["failed", "passed", "no result", "no result", "passed"]
    assert "a test broke" in (tmp_path / "gpu-check.log").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("gpu-check.json", "gpu-check.log", "gpu-field.json", "gpu-rpc.json")
    }


@pytest.mark.parametrize("apart", [True, False], ids=["child in a session of its own", "child in its session"])
@pytest.mark.parametrize("heeds", [True, False], ids=["heeds an interrupt", "ignores it"])
def test_a_part_over_its_budget_has_last_words_and_is_ended_with_what_it_started(
    heeds: bool, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        f"signal.signal(signal.SIGINT, signal.{'default_int_handler' if heeds else 'SIG_IGN'})\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"started = subprocess.Popen(command, start_new_session={apart})\n"
        f"print('began'); path = pathlib.Path({str(child)!r}); new = path.with_suffix('.new')\n"
        "try: new.write_text(str(started.pid)); new.rename(path); time.sleep(600)\n"
        "except KeyboardInterrupt: print('what has failed so far')"
    )
    wait = subprocess.Popen.wait

    def passes_once_it_runs(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """The budget of the first part, which may take longer to begin than any that a test would wait for."""
        if timeout == 4 - 1:
            wait_until(child.exists)
            timeout = 0.01
        elif timeout == 1 and heeds:
            timeout = LIMIT_S
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", passes_once_it_runs)
    ended = Check(tmp_path / "out", GPU).run([part("slow", code, 4, measures=False), part("rpc", "print('{}')")])
    assert [(one.outcome, one.code) for one in ended] == [("over its budget", None), ("passed", 0)]
    log = (tmp_path / "out" / "gpu-check.log").read_text(encoding="utf-8")
    assert "began" in log
    assert ("what has failed so far" in log) == heeds
    pid = int(child.read_text())
    while lives(pid):  # the signal is sent; the test's own time limit bounds this
        os.sched_yield()


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_parts_after_the_last_second_are_not_begun(tmp_path: Path) -> None:
    ended = Check(tmp_path, GPU, total_s=0.5).run([part("rpc", "print('{}')")])
    assert [one.outcome for one in ended] == ["no time left"]
    assert not (tmp_path / "gpu-rpc.json").exists()


def test_kernels_are_not_interpreted_in_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    Check(tmp_path, GPU).run([part("rpc", code)])
    assert "TRITON_INTERPRET" not in read(tmp_path / "gpu-rpc.json")
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_the_budgets_fit_into_eight_minutes() -> None:
    together = max(one.budget_s for one in PARTS if not one.alone)
    assert together + sum(one.budget_s for one in PARTS if one.alone) <= TOTAL_S == 480
    assert len({one.name for one in PARTS}) == len(PARTS)
    assert len([one for one in PARTS if one.measures]) + 2 <= 8  # files, with the summary and the log


def test_what_is_measured_is_one_setting_and_no_search() -> None:
    """Options are those that the commands have, and say in how many micro-batches a prompt is taken."""
    asked = {}
    for one in PARTS:
        if one.command[: len(BENCH)] == BENCH:
            _, bound, unknown = app.parse_args(one.command[len(TSQP) :], exit_on_error=False, print_error=False)
            assert not unknown
            asked[one.name] = bound.arguments.get("micro_batches")
        elif one.command[: len(OPEN)] == OPEN:
            asked[one.name] = gpu_open.parsed(one.command[3:]).micro_batches
    assert asked == {"loops": None, "rpc": None, "private": 1, "linear": [1, 2], "layer": [1]}


@pytest.mark.slow
def test_every_test_is_in_one_part(request: pytest.FixtureRequest) -> None:
    """Of those that need a GPU. Parts run at the same time, but for what looks at the memory of the whole device."""

    asked = {one.name: one.command[len(PYTEST) :] for one in PARTS if one.command[: len(PYTEST)] == PYTEST}
    asked["every"] = ("tests/gpu",)
    collect = [[*PYTEST[3:], "--collect-only", "-q", "-q", *options] for options in asked.values()]
    # One after another by one process: to import everything takes some seconds.
    code = "import json, sys, pytest\nfor one in json.loads(sys.argv[1]): print('# ended by', int(pytest.main(one)))"
    command = [sys.executable, "-c", code, json.dumps(collect)]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=True)
    *collected, rest = done.stdout.split("# ended by 0\n")
    assert rest == ""
    found = [re.findall(r"^tests/gpu/.+::.+$", text, re.MULTILINE) for text in collected]
    parts = dict(zip(asked, found, strict=True))
    every = parts.pop("every")
    assert sorted(test for tests in parts.values() for test in tests) == sorted(every)
    assert all(parts.values())
    assert [one.name for one in PARTS if one.name in parts and one.alone] == ["memory"]
    assert all("test_memory" in test for test in parts["memory"])


def test_tests_and_their_workers_keep_kernels_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_check, "gpu", lambda: GPU)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    monkeypatch.setattr(gpu_check, "PARTS", (part("rpc", code),))
    assert main(["--output", str(tmp_path)]) == 0
    kept = Path(read(tmp_path / "gpu-rpc.json")["TRITON_CACHE_DIR"])
    assert kept == tmp_path / "cache" / "worker-kernels" / cache_name() / "triton"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_part_that_ends_early_leaves_its_time_to_those_after_it(tmp_path: Path) -> None:
    ended = Check(tmp_path, GPU).run([part("rpc", "print('{}')"), part("field", "print('{}')", budget_s=0)])
    assert [one.outcome for one in ended] == ["passed", "passed"]


def test_without_a_device_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", "gpu-check: there is no CUDA device here, so nothing was run\n")
    assert not (tmp_path / "out").exists()


def test_with_a_device_the_parts_that_were_asked_for_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "gpu", lambda: GPU)
    monkeypatch.setattr(gpu_check, "PARTS", (part("rpc", "print('{}')"), part("field", "raise SystemExit(1)")))
    assert main(["--output", str(tmp_path), "--only", "rpc"]) == 0
    assert main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "gpu-check: 1 of 2 parts passed; not field"


@pytest.mark.parametrize("options", [["--only", "nothing"], ["--seconds", "0"], ["--seconds", "481"], ["more"]])
def test_wrong_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2


def once(work: Work) -> float:
    """A timer that takes 2 ms for everything."""
    work()
    return 2.0


def each(works: Any) -> float:
    for work in works:
        work()
    return 0.5


def test_ceilings_are_rates() -> None:
    found = ceilings(CPU, Sizes(copied_bytes=1_000, bus_bytes=500, gemm=16, starts=4), once, each)
    assert found["copy_bytes_per_s"] == 1_000_000  # read and written
    assert found["bf16_flop_per_s"] == found["int8_op_per_s"] == 2 * 16**3 / 0.002
    assert found["pageable_to_device_bytes_per_s"] == 250_000
    assert (found["start_us"], found["replayed_start_us"]) == (500, 500)


@pytest.mark.parametrize("number", [1, P // 2 + 1, P - 1, P - 0x808080])
@pytest.mark.parametrize("weight", [127, -127])
def test_products_are_compared_with_an_exact_one(number: int, weight: int) -> None:
    x = torch.full((1, MAX_FIELD_TERMS), number, dtype=torch.int32)
    w = torch.full((1, MAX_FIELD_TERMS), weight, dtype=torch.int8)
    assert product_mod_p(x, w).tolist() == [[number * weight * MAX_FIELD_TERMS % P]]


def test_a_product_is_measured_beside_others() -> None:
    case = Case("qkv", 3, CPU, shape=(40, 64))
    found = compare(case, interpreted.kernel(), once, each)
    assert (found["exact"], found["field_ms"], found["started_ms"], found["ratio"]) == (True, 0.5, 2.0, 1.0)
    assert found["group"] == "qkv"


def test_a_product_that_is_wrong_is_named() -> None:
    class Wrong(BlockedKernel):
        def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return super().accumulate(x, w) + 1

    assert measure(Case("o", 2, CPU, shape=(8, 16)), Wrong(), once, each)["exact"] is False


def test_tiles_that_do_not_compile_have_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise SyntaxError("too much shared memory")

    monkeypatch.setattr("benchmarks.gpu_field.TritonKernel", refuse)
    tiles = Tiles(16, 32, 64, warps=4, stages=3, split=False)
    (found,) = candidates(Case("o", 2, CPU, shape=(8, 16)), [tiles], once, each)
    assert found["error"] == "SyntaxError: too much shared memory"
