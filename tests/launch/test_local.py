"""A worker started here that lies, floods or will not go: the trusted side ends it and says so in one line."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.commands import Home, wait_gone
from tests.families import tiny_model
from tsqp.errors import WorkerUnreachable
from tsqp.launch import local as launch
from tsqp.launch.local import LocalWorker

READY = "import json, sys; address = sys.argv[sys.argv.index('--listen') + 1]; "
FD_SETSIZE = 1024  # no descriptor from here on is for select()
SAY = "print(json.dumps({'address': address}), flush=True); "


def start(script: str, monkeypatch: pytest.MonkeyPatch) -> LocalWorker:
    """A worker that runs ``script`` instead of ours."""
    monkeypatch.setattr(launch, "WORKER_COMMAND", (sys.executable, "-c", READY + script))
    return LocalWorker("synthetic:tiny", device="cpu", dtype="float32", threads=1)


def test_it_must_listen_where_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = "print(json.dumps({'address': 'tcp://127.0.0.1:9'}), flush=True); sys.stdin.read()"
    with start(lie, monkeypatch) as worker, pytest.raises(WorkerUnreachable, match="where it was told to"):
        worker.wait_ready()


@pytest.mark.parametrize(
    "said", ["print('hello')", "print('{}')", "print('x' * 10**7)", "sys.stdout.write('\\xff\\n')"]
)
def test_anything_but_an_address_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    with (
        start(f"{said}; sys.stdout.flush(); sys.stdin.read()", monkeypatch) as worker,
        pytest.raises(WorkerUnreachable),
    ):
        worker.wait_ready()


def test_its_last_words_cannot_drive_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print('\\x1b]0;pwned\\x07 no weights', file=sys.stderr); sys.exit(3)"
    with start(script, monkeypatch) as worker, pytest.raises(WorkerUnreachable, match="no weights") as error:
        worker.wait_ready()
    assert "\x1b" not in str(error.value)


def test_a_flood_of_errors_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = "sys.stderr.write('x' * 50_000_000); sys.stderr.flush(); " + SAY + "sys.stdin.read()"
    with start(flood, monkeypatch) as worker:
        worker.wait_ready()
        assert sum(map(len, worker._errors)) <= 50 * launch.MAX_LINE_BYTES


def test_what_it_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import os, signal\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        f"    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "    os.write(w, b'x')\n"
        "    signal.pause()\n"
        "os.read(r, 1)\n" + SAY + "\nsys.stdin.read()"
    )
    monkeypatch.setattr(launch, "WORKER_COMMAND", (sys.executable, "-c", READY + "\n" + script))
    with LocalWorker("synthetic:tiny", device="cpu", dtype="float32", threads=1) as worker:
        worker.wait_ready()
        grandchild = int(pid_file.read_text())
    wait_gone(grandchild)


def test_a_process_with_many_descriptors_starts_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with a raised limit and a connection for each of a thousand clients, whose worker was lost."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2 * FD_SETSIZE:
        pytest.skip(f"no process here may have more than {hard} descriptors")
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * FD_SETSIZE), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while stack.enter_context(open(os.devnull)).fileno() < FD_SETSIZE:  # noqa: PTH123
            pass
        with start(SAY + "sys.stdin.read()", monkeypatch) as worker:
            worker.wait_ready()
            assert worker.listens


def test_closing_again_kills_nobody_who_has_its_number_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start("", monkeypatch)
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    for _ in range(3):
        worker.close()
    assert killed == [worker.pid]


def test_a_death_by_a_signal_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        start("import os; os.kill(os.getpid(), 40)", monkeypatch) as worker,
        pytest.raises(WorkerUnreachable, match="signal 40"),
    ):
        worker.wait_ready()


def test_modules_of_the_current_directory_are_not_loaded(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("msgspec", "torch", "types", "tsqp"):
        (tmp_path / f"{name}.py").write_text("import os; open('loaded', 'w').close()\nraise SystemExit('poisoned')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", dict(home.environment))
    with LocalWorker(str(tiny_model("llama").directory), device="cpu", dtype="float32", threads=1) as worker:
        worker.wait_ready()
    assert not os.path.exists("loaded")  # noqa: PTH110
    assert home.leftovers() == []


def test_a_worker_stopped_while_it_loads_leaves_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(home.environment))
    worker = LocalWorker("synthetic:llama-3.1-8b", device="cpu", dtype="bfloat16", threads=1)
    worker.close()
    assert home.leftovers() == []
