"""Runs the ``tsqp`` command as a user does: a process of its own, an environment of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TSQP = [sys.executable, "-m", "tsqp"]
# Of any one wait: a hang fails the test and a slow machine does not. On a fresh machine a command compiles its loops
# first, which is more than a minute of one core, and other tests do the same beside it.
LIMIT_S = 300.0


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The one error line; fails when there is a traceback or a second error line."""
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


class Home:
    """A runtime directory of its own and the environment that names it."""

    def __init__(self) -> None:
        self.runtime = Path(tempfile.mkdtemp(prefix="tsqp-t"))  # short: socket paths are limited to 107 bytes
        self.runtime.chmod(0o700)
        self.before: list[str] = []  # what starts the commands, such as a shell that sets limits
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TSQP_", "LLAMA_"))
        }
        self.environment |= dict.fromkeys(("XDG_RUNTIME_DIR", "XDG_STATE_HOME"), str(self.runtime))
        if "TSQP_CACHE" in os.environ:
            self.environment["TSQP_CACHE"] = os.environ["TSQP_CACHE"]

    def run(self, *arguments: str | Path, stdin: str = "", **environment: str) -> Result:
        """Run one command to its end."""
        done = subprocess.run(
            [*self.before, *TSQP, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
            timeout=LIMIT_S,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def started(self, *arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command under way, killed at the end if it is still there."""
        process = subprocess.Popen(
            [*self.before, *TSQP, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.environment, **environment},
            preexec_fn=heed_ctrl_c,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    @contextlib.contextmanager
    def worker(self, *arguments: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """A standing worker and the address it said it listens on."""
        with self.started("worker", *arguments) as process:
            line = read_until(process, b"\n")
            yield process, json.loads(line)["address"]

    def leftovers(self) -> list[str]:
        """What lies in the runtime directory."""
        return sorted(path.name for path in self.runtime.rglob("*") if not path.is_dir())

    def remove(self) -> None:
        remove_tree(self.runtime)


def remove_tree(directory: Path) -> None:
    """Remove a directory with all in it, though a worker whose user was killed may tidy up there at the same time."""
    until = now() + LIMIT_S
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            try:
                shutil.rmtree(directory)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or now() > until:  # something came meanwhile
                    raise


def heed_ctrl_c() -> None:
    """Tests that run in the background have SIGINT ignored, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(process: subprocess.Popen[bytes], mark: bytes) -> bytes:
    """Standard output up to ``mark``."""
    assert process.stdout is not None
    seen = b""
    while mark not in seen:
        assert select.select([process.stdout], [], [], LIMIT_S)[0], "nothing came"
        piece = os.read(process.stdout.fileno(), 1)
        assert piece, process.stderr.read().decode() if process.stderr else ""
        seen += piece
    return seen


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, whichever of its threads has started them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def descriptors_of(path: str | Path) -> list[str]:
    """Descriptors of this process that lead to a file. Of others there may be more or fewer at any time."""
    found: list[str] = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it
            found += [link.name] if str(link.readlink()) == str(path) else []
    return found


def wait_gone(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.closing(os.fdopen(descriptor)):
        assert select.select([descriptor], [], [], LIMIT_S)[0], f"process {pid} is still there"


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until it does: what it looks at is in another process."""
    until = now() + LIMIT_S
    while not holds():
        assert now() < until, "it has not come to hold"
        time.sleep(0.002)


def now() -> float:
    return time.monotonic()
