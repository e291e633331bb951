"""A dealer is another party's, and the line to it is closed to whoever runs the worker, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Home, Result
from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, GuardConfig, SamplingParams
from tsqp.api.dealer import Dealer
from tsqp.errors import AddressError, ChannelError, ModelMismatch, OptionError, WorkerUnreachable
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.messages import Hello, MultiplyPads, Product
from tsqp.wire.transport.keys import ClientKeys, KeyFiles, create_keys, load_public, load_secret

MODEL = str(tiny_model("llama").directory)
AWAY = "tcp://192.0.2.1:7000"  # documentation's network: nobody is there
PROMPT = random_tokens(20)
FOUR = SamplingParams(max_tokens=4)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, KeyFiles]:
    return {name: create_keys(tmp_path / "keys", name) for name in ("me", "worker", "dealer")}


def client_keys(keys: dict[str, KeyFiles], worker: str = "worker") -> ClientKeys:
    return ClientKeys(load_secret(keys["me"].secret), load_public(keys[worker].public))


def options(address: str, **more: Any) -> GuardConfig:
    return GuardConfig(pad_source=f"dealer={address}", **more)


@pytest.mark.parametrize(
    ("dealer", "worker"),
    [
        ("ipc:///run/a.sock", "ipc:///run/a.sock"),
        ("ipc:///run//x/./a.sock", "/run/x/a.sock"),
        ("ipc:///run/a.sock", "shm:///run/a.sock"),
        ("mem:a", "mem:a"),
        ("tcp://127.0.0.1:7000", "tcp://localhost:7000"),
        ("tcp://127.0.0.1:7000", "tcp://[::1]:7000"),
        ("tcp://HOST.example:7000", "tcp://host.example:7000"),
    ],
)
def test_the_workers_address_is_refused(dealer: str, worker: str) -> None:
    with pytest.raises(OptionError, match="is the worker itself"):
        Dealer.check(options(dealer, dealer_no_separation=True), worker, None)


def test_a_link_to_the_workers_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.sock").symlink_to(tmp_path / "a.sock")
    with pytest.raises(OptionError, match="is the worker itself"):
        Dealer.check(options(f"ipc://{tmp_path}/b.sock", dealer_no_separation=True), f"ipc://{tmp_path}/a.sock", None)


def test_the_workers_key_is_refused(keys: dict[str, KeyFiles]) -> None:
    chosen = options(AWAY, dealer_key=keys["worker"].public)
    with pytest.raises(OptionError, match="has the worker's key"):
        Dealer.check(chosen, "tcp://192.0.2.2:7000", client_keys(keys))


@pytest.mark.parametrize(
    ("address", "more", "words"),
    [
        (AWAY, {}, "give its public key"),
        (AWAY, {"dealer_no_separation": True}, "give its public key"),
        ("tcp://127.0.0.1:7000", {}, "whoever runs the worker may read"),
        ("shm:///run/d.sock", {}, "whoever runs the worker may read"),
        ("ipc:///run/d.sock", {}, "--dealer-no-separation"),
        ("ipc:///run/d.sock", {"dealer_key": "x"}, "is not tcp: leave out --dealer-key"),
        (AWAY, {"dealer_key": "x", "dealer_no_separation": True}, "leave out --dealer-no-separation"),
        (AWAY, {"dealer_key": "x"}, "this side's secret key"),
    ],
)
def test_a_line_that_is_not_closed_is_refused(address: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Dealer.check(options(address, **more), "ipc:///run/worker.sock", None)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(AddressError, match="http"):
        Dealer.check(options("http://x"), None, None)


def test_keys_come_from_the_workers_or_from_a_file_of_their_own(keys: dict[str, KeyFiles]) -> None:
    chosen = options(AWAY, dealer_key=keys["dealer"].public)
    with_workers = Dealer.check(chosen, "tcp://192.0.2.2:7000", client_keys(keys))
    own = options(AWAY, dealer_key=keys["dealer"].public, own_key=keys["me"].secret)
    with_own = Dealer.check(own, None, None)
    assert with_workers == with_own
    assert with_own is not None
    assert with_own.separated
    assert with_own.security == client_keys(keys, "dealer")


def test_it_is_refused_before_anything_is_started_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("tsqp.api.llm.LocalWorker", lambda *a, **k: started.append(a))
    monkeypatch.setattr("tsqp.api.llm.locate", started.append)
    guard = options("mem:w", dealer_no_separation=True)
    with pytest.raises(OptionError, match="worker itself"):
        LLM(MODEL, protection="masked", worker="mem:w", guard=guard, announce=started.append)
    assert started == []


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
    address = start_worker(MODEL, dtype="field")
    hooks: dict[str, Any] = {"wrap_channel": worker.wrap, "wrap_dealer": dealer.wrap}
    with LLM(MODEL, protection="masked", worker=address, guard=guard, **hooks) as llm:
        assert llm.generate(PROMPT, FOUR) == expected
        assert all(group.weights is None for group in llm.guard.linears._groups.values())  # type: ignore[union-attr]
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
        with LLM(MODEL, protection="masked", worker=start_worker(MODEL, dtype="field"), guard=guard) as llm:
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
