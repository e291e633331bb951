"""Each side runs from a package without the other's folders, as the images have it, and is checked as they are."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from tests.commands import LIMIT_S, Home
from tests.deploy.recipes import CONTAINER, package_of
from tests.families import tiny_model

SERVE = ("-m", "tsqp", "serve", "--port", "0", "--log-format", "json", "--no-compiled-kernels", "--dtype", "float32")
CHECK = ("-I", str(CONTAINER / "check_image.py"))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The package of each image, as a directory to be put on the path."""
    return {side: package_of(side, tmp_path_factory.mktemp(side)) for side in ("server", "worker", "cluster")}


@contextmanager
def started(home: Home, package: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of one side's package; this tree's is not on its path, since that package is found first."""
    with subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**home.environment, "PYTHONPATH": str(package)},
    ) as process:
        alarm = threading.Timer(LIMIT_S, process.kill)
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            process.kill()


def ready(process: subprocess.Popen[str]) -> str:
    """The address in the log of a server."""
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)
        if text.startswith("{") and (line := json.loads(text))["event"] == "ready":
            return str(line["message"]).split(": ", 1)[1].partition("/v1,")[0]
    raise AssertionError("".join(seen))


def answers(address: str) -> bool:
    body = {"model": "llama", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{address}/v1/completions", json=body, timeout=LIMIT_S).status_code == 200


@pytest.mark.slow
def test_the_trusted_side_alone_answers_without_a_worker(home: Home, sides: dict[str, Path]) -> None:
    model = ("--model", str(tiny_model("llama").directory))
    with started(home, sides["server"], *SERVE, *model, "--protection", "local") as server:
        assert answers(ready(server))


@pytest.mark.slow
def test_the_trusted_side_alone_answers_with_the_untrusted_side_alone(home: Home, sides: dict[str, Path]) -> None:
    model = ("--model", str(tiny_model("llama").directory))
    listen = f"shm://{home.runtime}/w.sock"
    worker_options = ("--dtype", "float32", "--no-compiled-calls", "--listen", listen)
    with started(home, sides["worker"], "-m", "tsqp.untrusted", *model, *worker_options) as worker:
        assert worker.stdout is not None
        assert select.select([worker.stdout], [], [], LIMIT_S)[0]
        assert json.loads(worker.stdout.readline())["address"] == listen
        options = ("--protection", "open", "--worker", listen)
        with started(home, sides["server"], *SERVE, *model, *options) as server:
            assert answers(ready(server))


def test_the_trusted_side_alone_starts_no_worker_and_says_so(home: Home, sides: dict[str, Path]) -> None:
    program = """
from tsqp.launch.local import LocalWorker
LocalWorker("none", device="cpu", dtype="field", threads=None)
"""
    with started(home, sides["server"], "-c", program) as process:
        _, errors = process.communicate()
    assert errors.splitlines()[-1] == (
        "tsqp.errors.OptionError: this installation is the trusted side alone: name a worker that runs elsewhere"
    )


# --- The check at the end of each build ---


def installed(package: Path, place: Path, *listed: str) -> Path:
    """A directory as pip leaves one: the package, and what pip says that it has installed."""
    place.mkdir()
    (place / "tsqp").symlink_to(package / "tsqp")
    information = place / f"tsqp-{version('tsqp')}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.4\nName: tsqp\nVersion: {version('tsqp')}\n")
    (information / "RECORD").write_text("".join(f"{name},,\n" for name in ("tsqp/__init__.py", *listed)))
    return place


def checked(side: str, place: Path, **environment: str) -> str:
    """What the check says of an installation, but for the user, who may be root here."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from check_image import faults; print(*faults(sys.argv[3]), sep='; ')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place), str(CONTAINER), side],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(place), **environment},
    )
    return "; ".join(fault for fault in done.stdout.strip().split("; ") if fault != "it would run as root")


@pytest.mark.parametrize("side", ["server", "worker"])
def test_the_check_of_an_image_lets_its_own_side_pass(side: str, sides: dict[str, Path], tmp_path: Path) -> None:
    assert checked(side, installed(sides[side], tmp_path / "site")) == ""


def test_the_check_of_an_image_for_a_cluster_wants_what_is_called_there(sides: dict[str, Path], tmp_path: Path) -> None:
    place, programs = installed(sides["cluster"], tmp_path / "site"), tmp_path / "bin"
    programs.mkdir()
    assert checked("cluster", place, PATH=str(programs)) == (
        "no bash is on the path; no ray is on the path; no tsqp is on the path"
    )
    for name in ("bash", "ray", "tsqp"):
        (programs / name).symlink_to(sys.executable)
    assert checked("cluster", place, PATH=str(programs)) == ""


@pytest.mark.parametrize(("side", "other"), [("server", "worker"), ("worker", "server")])
def test_the_check_of_an_image_refuses_the_other_side(
    side: str, other: str, sides: dict[str, Path], tmp_path: Path
) -> None:
    found = checked(side, installed(sides[other], tmp_path / "site"))
    assert f"tsqp/{'untrusted' if side == 'server' else 'trusted'} is there" in found
    assert "it does not start: " in found


def test_the_check_of_an_image_refuses_a_list_of_files_that_is_not_true(sides: dict[str, Path], tmp_path: Path) -> None:
    found = checked("server", installed(sides["server"], tmp_path / "site", "tsqp/untrusted/worker.py"))
    assert found == "tsqp/untrusted is listed as installed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused as root")
def test_the_check_of_an_image_refuses_root() -> None:
    done = subprocess.run([sys.executable, *CHECK, "server"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it would run as root" in done.stderr
