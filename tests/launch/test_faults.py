"""Processes that are killed, interrupted, started twice: nothing hangs and nothing is left behind."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.commands import LIMIT_S, Home, children, wait_gone
from tests.families import tiny_model

TINY = ("--model", "synthetic:tiny")
MODEL = ("--model", str(tiny_model("llama").directory))
ENDLESS = ("--ignore-eos", "-n", "2000", "--deadline", "600")  # far longer than any wait of a test


@pytest.mark.slow
def test_a_worker_killed_while_generating_is_reported_before_any_deadline(home: Home) -> None:
    with home.started("generate", "hello", *MODEL, *ENDLESS, "--worker-patience", "0") as process:
        assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert out.endswith(b"\n")  # on a terminal the error has a line of its own
    (line,) = [line for line in err.decode().splitlines() if ": error: " in line]
    assert f"shm://{home.runtime}/tsqp/" in line
    assert line.endswith("the worker that was started here went away: it was ended by SIGKILL")
    assert b"Traceback" not in err
    assert home.run("generate", "hello", *MODEL, "-n", "2").code == 0  # nothing blocks the next start
    assert home.leftovers() == []


@pytest.mark.slow
def test_a_standing_worker_killed_while_generating_is_reported_before_any_deadline(home: Home) -> None:
    with home.worker(*MODEL, "--dtype", "float32") as (worker, address):
        options = (*MODEL, "--worker", address, *ENDLESS, "--worker-patience", "0")
        with home.started("generate", "hello", *options) as process:
            assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
            worker.kill()
            _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert address in err.decode()
    with home.worker(*MODEL, "--listen", address) as (_, again):  # the stale socket is reclaimed
        assert again == address


@pytest.mark.slow
def test_a_worker_killed_while_generating_costs_a_line_and_no_token(home: Home) -> None:
    asked = ("generate", "hello", *MODEL, "--ignore-eos", "-n", "1000")
    with home.started(*asked) as process:
        first = os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    (line,) = [line for line in err.decode().splitlines() if "SIGKILL" in line]
    assert line.startswith(f"tsqp: shm://{home.runtime}/tsqp/")
    undisturbed = home.run(*asked)
    assert (first + out).decode() == undisturbed.out
    assert home.leftovers() == []


def test_ctrl_c_ends_with_130_and_leaves_nothing(home: Home) -> None:
    with home.started("generate", "hello", *MODEL, *ENDLESS) as process:
        assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in err
    wait_gone(worker)
    assert home.leftovers() == []


def test_terminate_stops_the_worker_too(home: Home) -> None:
    with home.started("generate", "hello", *MODEL, *ENDLESS) as process:
        assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        process.terminate()
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    wait_gone(worker)
    assert home.leftovers() == []


def test_a_worker_does_not_outlive_a_killed_parent(home: Home) -> None:
    with home.started("generate", "hello", *MODEL, *ENDLESS) as process:
        assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        process.kill()
        wait_gone(worker)
    assert home.leftovers() == []


@pytest.mark.slow
def test_a_standing_worker_stops_on_signals_and_removes_its_socket(home: Home) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with home.worker(*TINY) as (worker, _):
            worker.send_signal(number)
            worker.communicate(timeout=LIMIT_S)
        assert worker.returncode == 0
        assert home.leftovers() == []


@pytest.mark.slow
def test_two_at_once_never_collide(home: Home) -> None:
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: home.run("generate", "hello", *MODEL, "-n", "8", "--json"), range(2)))
    assert [run.code for run in runs] == [0, 0]
    assert runs[0].json["token_ids"] == runs[1].json["token_ids"]
    assert runs[0].json["address"] != runs[1].json["address"]
    assert home.leftovers() == []


@pytest.mark.slow
def test_two_clients_share_a_standing_worker(home: Home) -> None:
    with home.worker(*MODEL, "--dtype", "float32") as (_, address), ThreadPoolExecutor() as pool:
        options = ("generate", "hello", *MODEL, "--worker", address, "-n", "8", "--json")
        runs = list(pool.map(lambda _: home.run(*options), range(2)))
    assert [run.code for run in runs] == [0, 0]
    assert runs[0].json["token_ids"] == runs[1].json["token_ids"]


def test_a_worker_gets_a_scrubbed_environment_and_no_descriptor(home: Home) -> None:
    inherited = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    secret = "correct-horse"
    # At open: the memory and the environment of a private mode's process can be read by nobody but root.
    run = ("generate", "hello", *MODEL, "--protection", "open", *ENDLESS)
    with home.started(*run, MY_SECRET=secret) as process:
        assert os.read(process.stdout.fileno(), 1)  # type: ignore[union-attr]
        (worker,) = children(process.pid)
        environment = Path(f"/proc/{worker}/environ").read_bytes()
        assert secret.encode() not in environment
        assert secret.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
        targets = {str(link.readlink()) for link in Path(f"/proc/{worker}/fd").iterdir()}
        files = {target for target in targets if target.startswith("/")}
        expected = ("/tsqp/", "safetensors", "/memfd:tsqp-arena")
        assert not {file for file in files if not any(part in file for part in expected)}, files
    os.close(inherited)


@pytest.mark.slow
def test_curve_over_tcp(home: Home, tmp_path: Path) -> None:
    for name in ("worker", "client", "stranger"):
        assert home.run("keys", tmp_path, "--name", name).code == 0
    listen = ("--listen", "tcp://127.0.0.1:0", "--key", tmp_path / "worker.key_secret")
    with home.worker(*MODEL, *listen, "--allow", tmp_path / "client.key") as (_, address):
        common = ("generate", "hello", *MODEL, "--worker", address, "-n", "2", "--json")
        keys = ("--worker-key", tmp_path / "worker.key", "--key")
        good = home.run(*common, *keys, tmp_path / "client.key_secret")
        assert good.code == 0, good.err
        assert good.json["transport"] == "tcp"
        for refused in (home.run(*common, *keys, tmp_path / "stranger.key_secret"), home.run(*common)):
            assert refused.code == 1
            assert address in refused.error
