"""Workers as processes, each with a part of a model and a key, a front, and runs that ask it: what a user types."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from tests.api.mortal import MODEL, PARAMS, PROMPTS, MortalRecorder, living
from tests.commands import Home, Result, read_until
from tests.fronts import RosterWriter, front_process
from tsqp import LLM, Completion, SamplingParams, WorkerConfig
from tsqp.api.worker_state import WorkerState
from tsqp.wire.roster import Member
from tsqp.wire.transport.keys import KeyFiles, create_keys, load_public

LEFT, RIGHT = "0..3/0..1of2", "0..3/1..2of2"  # of a model of two layers


class Site:
    """A directory of keys, workers that are started when they are asked for, and a roster of some of them."""

    def __init__(self, stack: ExitStack, home: Home, directory: Path) -> None:
        self._stack, self._home, self._keys = stack, home, directory / "keys"
        self.own = create_keys(self._keys, "me")
        self.roster = RosterWriter(directory / "roster.json")
        self._count = 0

    def key(self) -> KeyFiles:
        self._count += 1
        return create_keys(self._keys, f"worker{self._count}")

    def workers(self, *shards: str) -> list[tuple[Popen[bytes], Member]]:
        """Processes, which load at the same time."""
        begun = []
        for shard in shards:
            key = self.key()
            keys = ("--key", key.secret, "--allow", self.own.public, "--threads", "1")
            command = ("worker", "--model", MODEL, "--shard", shard, "--listen", "tcp://127.0.0.1:0", *keys)
            begun.append((self._stack.enter_context(self._home.started(*command)), shard, key))
        return [
            (process, Member(address_of(process), shard, load_public(key.public).decode()))
            for process, shard, key in begun
        ]


def address_of(process: Popen[bytes]) -> str:
    """What a worker says once it listens."""
    return str(json.loads(read_until(process, b"\n"))["address"])


def open_together(llm: LLM) -> tuple[Callable[[], None], Callable[[], list[Completion]]]:
    """Eight streams: what takes the first piece of each, and what takes the rest."""
    asked = list(zip(PROMPTS, PARAMS, strict=True)) * 2
    streams = {number: llm.stream(*one) for number, one in enumerate(asked)}
    done: dict[int, Completion] = {}

    def turn() -> None:
        for number in list(streams):
            delta = next(streams[number])
            if delta.completion is not None:
                done[number] = delta.completion
                del streams[number]

    def finish() -> list[Completion]:
        while streams:
            turn()
        return [done[number] for number in range(len(asked))]

    return turn, finish


def state_of(llm: LLM) -> WorkerState:
    state = llm.worker_state
    assert state is not None
    return state


@contextmanager
def site(home: Home, directory: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, home, directory)


RUN = ("generate", "hello", "--model", MODEL, "--threads", "1")


def test_a_roster_that_cannot_be_had_is_one_line(tsqp: Callable[..., Result], tmp_path: Path) -> None:
    missing = tsqp(*RUN, "--worker", f"roster://{tmp_path}/roster.json")
    assert missing.code == 1
    assert f"roster://{tmp_path}/roster.json: the roster cannot be read: No such file" in missing.error
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"roster+tcp://127.0.0.1:{server.getsockname()[1]}"
    nobody = tsqp(*RUN, "--worker", address)
    assert nobody.code == 1
    assert f"{address}: the front cannot be asked" in nobody.error
    malformed = tsqp(*RUN, "--worker", "roster+ipc:///x")
    assert malformed.code == 2
    assert "a roster is at roster:///path/to/file or roster+tcp://host:port" in malformed.error


def test_a_roster_with_keys_asks_for_this_sides_key_by_its_flag(tsqp: Callable[..., Result], tmp_path: Path) -> None:
    roster = RosterWriter(tmp_path / "roster.json")
    roster.names(Member("tcp://192.0.2.1:7000", "0..3", load_public(create_keys(tmp_path, "w").public).decode()))
    refused = tsqp(*RUN, "--worker", roster.address)
    assert refused.code == 1
    assert "have keys: give this side's secret key by --key" in refused.error


@pytest.mark.slow
def test_a_model_in_two_columns_answers_as_one_worker_does(home: Home, tmp_path: Path) -> None:
    run = ("generate", "-", "--model", MODEL, "-n", "8", "--threads", "1", "--json", "--ignore-eos")
    with site(home, tmp_path) as here:
        members = [member for _, member in here.workers(LEFT, RIGHT)]
        here.roster.names(*members)
        with front_process(here.roster.path) as (_, address):
            asked = (*run, "--worker", address, "--key", here.own.secret)
            together = home.run(*asked, stdin="hello")
            stranger = home.run(*run, "--worker", address, "--key", here.key().secret, stdin="hello")
            here.roster.names(members[0])
            half = home.run(*asked, stdin="hello")
    assert together.code == 0, together.err
    assert "protection masked" in together.err
    with living(MortalRecorder()) as one, LLM(MODEL, protection="verified", worker=one) as llm:
        (alone,) = llm.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True))
    assert together.json["token_ids"] == list(alone.token_ids)
    assert stranger.code == 1
    assert "no worker that holds 0..3/" in stranger.error
    assert "the keys did not match" in stranger.error
    assert half.code == 1
    assert f"{address}: the workers do not make one model: nobody holds the last columns" in half.error


@pytest.mark.slow
def test_workers_that_are_killed_under_streams_cost_no_token(home: Home, tmp_path: Path) -> None:
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        expected = open_together(llm)[1]()
    with site(home, tmp_path) as here:
        (_, left), (first, right), (second, replica), (_, later) = here.workers(LEFT, RIGHT, RIGHT, RIGHT)
        here.roster.names(left, right, replica)
        with LLM(MODEL, worker=WorkerConfig(here.roster.address, key=here.own.secret)) as llm:
            begin, finish = open_together(llm)
            begin()
            first.kill()  # its replica has the slice
            assert finish() == expected
            assert (state_of(llm).losses, state_of(llm).state) == (0, "ready")
            begin, finish = open_together(llm)
            begin()
            second.kill()  # nobody has it, until a roster names somebody
            here.roster.names(left, later)
            assert finish() == expected
            state = state_of(llm)
            assert (state.losses, state.reconnects, state.pauses, state.expelled) == (1, 1, 1, {})
