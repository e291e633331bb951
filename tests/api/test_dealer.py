"""A dealer is another party's, and the line to it is closed to whoever runs the worker, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Home, Result
from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, GuardConfig, SamplingParams, WorkerConfig
from tsqp.api.config import RunConfig
from tsqp.api.dealer import Dealer
from tsqp.errors import ChannelError, ModelMismatch, WorkerUnreachable
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.messages import Hello, MultiplyPads, Product
from tsqp.wire.transport import connect
from tsqp.wire.transport.keys import ClientKeys, KeyFiles, create_keys, load_public, load_secret

MODEL = str(tiny_model("llama").directory)
AWAY = "tcp://192.0.2.1:7000"  # documentation's network: nobody is there
PROMPT = random_tokens(20)
FOUR = SamplingParams(max_tokens=4)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, KeyFiles]:
    return {name: create_keys(tmp_path / "keys", name) for name in ("me", "worker", "dealer")}


def options(address: str, **more: Any) -> GuardConfig:
    return GuardConfig(pad_source=f"dealer={address}", **more)


def test_a_dealer_with_a_key_is_separated(keys: dict[str, KeyFiles]) -> None:
    guard = options(AWAY, dealer_key=keys["dealer"].public)
    dealer = Dealer.of(RunConfig(worker=WorkerConfig(key=keys["me"].secret), guard=guard))
    assert dealer is not None
    assert dealer.separated
    assert dealer.security == ClientKeys(load_secret(keys["me"].secret), load_public(keys["dealer"].public))
    assert Dealer.of(RunConfig()) is None


def test_an_error_of_its_line_is_about_the_dealer(tmp_path: Path) -> None:
    dealer = Dealer.of(RunConfig(guard=options(f"ipc://{tmp_path}/nobody.sock", dealer_no_separation=True)))
    assert dealer is not None
    with pytest.raises(WorkerUnreachable, match="the dealer") as error:
        dealer.dial(connect)
    assert error.value.side == "dealer"


class Seen:
    """What was sent to one side."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def wrap(self, channel: Channel) -> Channel:
        send = channel.send

        def recording(frames: Frames, reply_bytes: int = 0) -> None:
            self.messages.append(decode_to_worker(frames.control))
            send(frames, reply_bytes)

        monkey: Any = channel
        monkey.send = recording
        return channel


def test_the_dealer_gets_keys_and_the_worker_noise(start_worker: StartWorker) -> None:
    worker, dealer = Seen(), Seen()
    with LLM(MODEL, protection="verified", worker=start_worker(MODEL, dtype="field")) as llm:
        expected = llm.generate(PROMPT, FOUR)
    guard = options(start_worker(MODEL, dtype="field"), dealer_no_separation=True, pads_ahead=16)
    workers_own = start_worker(MODEL, dtype="field")

    def dial(address: str, **more: Any) -> Channel:
        """As a user's own program may dial, to see or change what crosses."""
        return (worker if address == workers_own else dealer).wrap(connect(address, **more))

    with LLM(MODEL, protection="masked", worker=workers_own, guard=guard, connect=dial) as llm:
        assert llm.generate(PROMPT, FOUR) == expected
        assert all(group.weights is None for group in llm.guard.linears.groups.values())  # type: ignore[union-attr]
    assert {type(message) for message in worker.messages} == {Hello, Product}
    assert {type(message) for message in dealer.messages} == {Hello, MultiplyPads}


def test_a_dealer_with_another_model_is_refused(start_worker: StartWorker) -> None:
    other = str(tiny_model("llama-biases").directory)
    guard = options(start_worker(other, dtype="field"), dealer_no_separation=True)
    with pytest.raises(ModelMismatch, match=r"the dealer at .* refused"):
        LLM(MODEL, protection="masked", worker=start_worker(MODEL, dtype="field"), guard=guard)


def test_a_dealer_that_is_not_there_is_named(start_worker: StartWorker, tmp_path: Path) -> None:
    guard = options(f"ipc://{tmp_path}/nobody.sock", dealer_no_separation=True)
    with pytest.raises(WorkerUnreachable, match="the dealer"):
        LLM(MODEL, protection="masked", worker=start_worker(MODEL, dtype="field"), guard=guard)


def test_a_dealer_that_is_lost_is_named(home: Home, start_worker: StartWorker) -> None:
    with home.worker("--model", MODEL, "--dtype", "field", "--listen", f"ipc://{home.runtime}/d.sock") as found:
        process, address = found
        guard = options(address, dealer_no_separation=True, pads_ahead=0)
        worker = WorkerConfig(start_worker(MODEL, dtype="field"), patience_s=0)
        with LLM(MODEL, protection="masked", worker=worker, guard=guard) as llm:
            process.kill()
            with pytest.raises(ChannelError, match=f"{address}: the dealer went away") as caught:
                llm.generate(PROMPT, FOUR)
            assert (caught.value.side, caught.value.address) == ("dealer", address)


@pytest.mark.slow
def test_over_tcp_with_keys(home: Home, keys: dict[str, KeyFiles]) -> None:
    listen = ("--listen", "tcp://127.0.0.1:0", "--key", keys["dealer"].secret, "--allow", keys["me"].public)
    with home.worker("--model", MODEL, "--dtype", "field", *listen) as (_, address):
        run = ("generate", "-", "--model", MODEL, "-n", "4", "--json", "--pad-source", f"dealer={address}")
        good = home.run(*run, "--dealer-key", keys["dealer"].public, "--key", keys["me"].secret, stdin="hello")
        assert good.code == 0, good.err
        assert "no separation" not in good.err
        assert f"pads by the dealer {address}" in good.err
        assert good.json["stats"]["pads_used"] > 0
        assert (good.json["dealer"], good.json["dealer_separation"]) == (address, True)
        wrong = home.run(*run, "--dealer-key", keys["worker"].public, "--key", keys["me"].secret, stdin="hello")
        assert wrong.code == 1
        assert (
            f"{address}: the dealer was not reached: the keys did not match; check both public keys and its list"
            in wrong.error
        )


def test_no_separation_is_said(tsqp: Callable[..., Result], start_worker: StartWorker) -> None:
    address, worker = (start_worker(MODEL, "ipc", dtype="field") for _ in range(2))
    run = ("generate", "hello", "--model", MODEL, "-n", 2, "--threads", 1, "--worker", worker)
    result = tsqp(*run, "--pad-source", f"dealer={address}", "--dealer-no-separation", "--json")
    assert result.code == 0, result.err
    assert (result.json["dealer"], result.json["dealer_separation"]) == (address, False)
    assert f"no separation: whoever runs the worker may read the line to the dealer {address}" in result.err
