"""Compiled kernels are code: they are kept only where nobody else can put any."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Home, read_until
from tsqp.api import kernel_cache
from tsqp.api.kernel_cache import keeps_none, kernel_cache_directory
from tsqp.arith.jit import cache_name
from tsqp.errors import PathRefused

REPOSITORY = Path(__file__).parents[2]


def test_auto_is_a_private_directory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    directory = kernel_cache_directory("auto")
    assert directory == tmp_path / "kernels" / cache_name()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_in_a_tee_there_is_none_unless_a_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: "Intel TDX")
    assert kernel_cache_directory("auto") is None
    assert kernel_cache_directory(str(tmp_path / "named")) == tmp_path / "named" / cache_name()


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    assert kernel_cache_directory("off") is None


def test_before_the_first_start_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    named = str(tmp_path / "named")
    for choice in ("auto", named):
        assert keeps_none(choice)
        kernel_cache_directory(choice)
        assert not keeps_none(choice)
    assert not keeps_none("off"), "whoever says so knows"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(
        PathRefused, match=f"open to others.*chmod go-w {tmp_path} or choose another compute.kernel_cache"
    ):
        kernel_cache_directory(str(tmp_path))


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PathRefused, match="cannot be used: Not a directory"):
        kernel_cache_directory(str(tmp_path / "file" / "kernels"))
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache, "detect_tee", lambda: None)
    assert kernel_cache_directory("auto") is None  # nobody asked for one


@pytest.mark.parametrize("mode", [0o770, pytest.param(0o777, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["", "worker-kernels", f"worker-kernels/{cache_name()}"])
def test_a_worker_loads_no_code_from_where_others_can_write(home: Home, tmp_path: Path, where: str, mode: int) -> None:
    loose = tmp_path / "cache" / where
    loose.mkdir(parents=True)
    loose.chmod(mode)
    done = home.run("worker", "--model", "synthetic:tiny", TSQP_CACHE=str(tmp_path / "cache"))
    assert done.code == 1
    assert f"{loose} is open to others" in done.error
    assert done.error.endswith("or set TSQP_CACHE to another directory")
    assert not list(loose.rglob("*.nb?"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("command", ["worker", "generate"])
def test_no_side_loads_code_of_another_user(home: Home, tmp_path: Path, command: str) -> None:
    foreign = tmp_path / ("worker-kernels" if command == "worker" else "kernels")
    foreign.mkdir(mode=0o700)
    os.chown(foreign, 65_533, 65_533)
    arguments = [] if command == "worker" else ["a", "--protection", "local"]
    done = home.run(command, *arguments, "--model", "synthetic:tiny", TSQP_CACHE=str(tmp_path))
    assert done.code == 1
    assert f"{foreign} belongs to another user; set TSQP_CACHE to another directory" in done.error


@pytest.mark.slow
def test_a_worker_without_a_place_for_a_cache_works_without_one(home: Home) -> None:
    with home.started("worker", "--model", "synthetic:tiny", TSQP_CACHE="/proc/nowhere") as process:
        assert b"address" in read_until(process, b"\n")


@pytest.mark.slow
def test_a_worker_keeps_its_loops_where_nobody_else_can_enter(home: Home, tmp_path: Path) -> None:
    with home.started("worker", "--model", "synthetic:tiny", TSQP_CACHE=str(tmp_path / "cache")) as process:
        read_until(process, b"\n")
    directory = tmp_path / "cache" / "worker-kernels" / cache_name()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# What measures keeps its loops too: a minute of compiling would be paid by each `tsqp bench` otherwise.

OWN = ("prefill", "decode", "all")  # those with the options of a run
BENCHES = (*OWN, "rpc", "pipeline", "origin", "private", "guard", "constants", "offload", "serve", "load")

IN_ORDER = """
import sys
from contextlib import suppress
from tsqp.arith.jit import SOURCES
import tsqp.cli.bench
from tsqp.cli.main import run

loops = {"tsqp." + source.removesuffix(".py").replace("/", ".") for source in SOURCES} - {"tsqp.arith.jit"}
asked = []

def keep_loops(choice=None):
    asked.append((choice, sorted(loops & sys.modules.keys())))
    raise SystemExit(0)

tsqp.cli.bench.keep_loops = keep_loops
for command in sys.argv[1:]:
    with suppress(SystemExit):
        run(["bench", *command.split()])
print(asked)
"""


def test_a_benchmark_asks_for_it_before_it_loads_what_has_loops() -> None:
    commands = [*BENCHES, "decode --kernel-cache off"]
    done = subprocess.run([sys.executable, "-c", IN_ORDER, *commands], capture_output=True, text=True, check=False)
    assert done.stdout == f"{[('auto' if one in OWN else None, []) for one in BENCHES] + [('off', [])]}\n", done.stderr


def test_so_do_scripts(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    asked = (
        "import benchmarks, sys; from tsqp.arith import jit; print(jit._directory, 'tsqp.arith.loops' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=REPOSITORY,
        env={**environment, "TSQP_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path}/kernels/{cache_name()} False\n"
