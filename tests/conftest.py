"""Shared fixtures: workers on a thread, a home for a command and the command inside of this process, prose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from io import BytesIO, TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import tests.cached_loops  # noqa: F401  (before anything that has loops)
from tests.commands import Home, Result
from tests.session_directory import session_directory
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.cli.main import run
from tsqp.config.dtype import DTYPE_NAMES, ComputeDtype, numeric_path
from tsqp.tee.hardening import Hardening
from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.transport import listen, new_ipc_address, new_shm_address

# Speed is checked in benchmarks, never in tests: neither that of a test nor that of making its examples.
settings.register_profile("tsqp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tsqp")

StartWorker = Callable[..., str]

_numbers = count()
TRANSPORTS = ("mem", "ipc", "shm", "tcp")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are tiny, and both sides of a split share the cores


@pytest.fixture(scope="session", autouse=True)
def _this_process_stays_as_it_is() -> Iterator[None]:
    """Private modes harden their process for the rest of its life; what that does is tested in processes of its own.

    For the whole session: a fixture of a module comes before those of a test, and may make a private LLM.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsqp.api.open_model.harden_process", lambda: Hardening(undumpable=True, no_core=True))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_directory() -> Iterator[None]:
    """Sockets of this process are apart from those of commands and of other test processes, and go with it."""
    directory = session_directory() / "run"
    directory.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        patch.setenv("XDG_STATE_HOME", str(directory))
        yield


def fresh_address(transport: str, name: str = "test") -> str:
    """An address nobody else uses, of each transport that exists."""
    match transport:
        case "mem":
            return f"mem:{name}-{next(_numbers)}"
        case "ipc":
            return new_ipc_address()
        case "shm":
            return new_shm_address()
        case _:
            return "tcp://127.0.0.1:0"


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Serves a checkpoint on a thread of this process; returns the address. Everything ends with the test."""
    with ExitStack() as stack:

        def start(model: str | Path, transport: str = "mem", dtype: ComputeDtype = "float32", wrap: Any = None) -> str:
            checkpoint: Checkpoint = open_checkpoint(str(model))
            store = WeightStore(checkpoint, dtype if dtype in DTYPE_NAMES else "float32", torch.device("cpu"))
            listener = stack.enter_context(closing(listen(fresh_address(transport))))
            calls = stack.enter_context(closing(CompiledCalls())) if transport == "shm" else None
            worker = Worker(store, calls)
            worker.prepare(numeric_path(dtype))
            thread = threading.Thread(target=worker.serve, args=(listener,), daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(listener.interrupt)
            return listener.address

        yield start


def prose() -> str:
    """Public-domain prose; see tests/data/README.md."""
    return (Path(__file__).parent / "data" / "prose.txt").read_text(encoding="utf-8")


@pytest.fixture
def home() -> Iterator[Home]:
    home = Home()
    yield home
    home.remove()


@pytest.fixture
def tsqp(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command without a process of its own: saves the seconds that loading torch takes."""
    monkeypatch.setattr("os.environ", dict(home.environment))
    monkeypatch.setattr("tsqp.bench.tree.commit", lambda: "0123abc")  # results of a tree that may have changes

    def call(*arguments: object, stdin: str | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(stdin.encode()), encoding="utf-8"))
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
