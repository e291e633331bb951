"""An actor that holds one worker: it starts the worker's process, says where it listens, and ends with it."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from tsqp.cluster.book import Said
from tsqp.cluster.state import Started, taken
from tsqp.errors import TsqpError
from tsqp.launch.local import WORKER_COMMAND, ListeningProcess, worker_environment
from tsqp.wire.roster import Member
from tsqp.wire.transport.keys import create_keys, load_public

INTERVAL_S: Final = 1.0  # between two announcements
LOOK_S: Final = 0.1  # between two looks whether the worker is still there
PREFIX: Final = "tsqp-keys-"
AGAIN_S: Final = 5.0  # before a worker that could not be started again is tried once more


class Task(msgspec.Struct, frozen=True):
    """What an actor is told. ``whole``: whether its shard is all of the model. ``ip``: where its worker listens, in
    brackets if IPv6.

    ``mark``: of the cluster's processes, by name.
    """

    number: int
    shard: str
    whole: bool
    ip: str
    started: Started
    mark: dict[str, str]


class HeldWorker:
    """A worker process, with its keys where it has some. Raises WorkerUnreachable with the worker's last words."""

    def __init__(self, task: Task) -> None:
        with _workshop() as workshop:
            key, options = _keys(workshop, task.started.allow)
            address = f"tcp://{task.ip}:0"
            self.process = ListeningProcess(
                [*_command(task), "--listen", address, *options],
                address,
                environment=worker_environment() | task.mark,
                what="worker",
            )
            self.process.wait_ready()  # a worker that listens has read them
        member = Member(self.process.address, task.shard, key)
        self.said = Said(task.number, secrets.token_hex(8), member, os.uname().nodename, self.process.pid)


class Holder:
    """The actor. ``announce``: takes a ``Said`` in JSON. ``again``: whether there was one with its number before it."""

    def __init__(self, task: bytes, announce: Callable[[bytes], object], node: str, *, again: bool) -> None:
        self._failed: str | None = None
        try:
            worker = HeldWorker(msgspec.json.decode(task, type=Task))
        except (TsqpError, OSError) as error:
            if again:  # nobody waits to hear of it; Ray starts the actor again, perhaps elsewhere
                time.sleep(AGAIN_S)
                os._exit(1)
            self._failed = str(error)
            return
        self._said = msgspec.structs.replace(worker.said, node=node)
        threading.Thread(target=self._watch, args=(worker, announce), daemon=True).start()

    def ready(self) -> str:
        """Nothing once the worker listens; otherwise why it does not."""
        return self._failed or ""

    def _watch(self, worker: HeldWorker, announce: Callable[[bytes], object]) -> None:
        document, next_s = msgspec.json.encode(self._said), 0.0
        while not worker.process.ended:
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + INTERVAL_S
                announce(document)
            time.sleep(LOOK_S)
        worker.process.close()  # and whatever it started
        os._exit(1)  # to Ray an actor that crashed, which it starts again


def _command(task: Task) -> list[str]:
    started = task.started
    command = [*WORKER_COMMAND, "--model", started.model, "--device", started.device, "--dtype", "field"]
    command += [] if task.whole else ["--shard", task.shard]
    return command if started.threads is None else [*command, "--threads", str(started.threads)]


@contextmanager
def _workshop() -> Iterator[Path]:
    """A directory of this user alone, for keys until a worker has read them. It is locked while this process lives.

    What is not locked was left by a process that was killed, and goes: there is a secret key in it.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), _opened(left) as lock:
            if os.fstat(lock).st_uid == os.geteuid() and taken(lock, left):
                shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        path = _locked(stack)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def _locked(stack: ExitStack) -> Path:
    """A new directory, locked until the stack ends. One that another process takes for left, before that, is gone."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        with suppress(FileNotFoundError):
            if taken(stack.enter_context(_opened(path)), path):
                return path


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """A descriptor of it. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _keys(directory: Path, allow: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """A fresh pair and the options of a worker that lets in who has one of these public keys; none without."""
    if not allow:
        return None, []
    own = create_keys(directory, "worker")
    options = ["--key", str(own.secret)]
    for place, public in enumerate(allow):
        path = directory / f"client-{place}.key"
        path.write_text(f'curve\n    public-key = "{public}"\n', encoding="ascii")
        options += ["--allow", str(path)]
    return load_public(own.public).decode("ascii"), options
