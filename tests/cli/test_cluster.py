"""``tsqp cluster``: what is refused before anything is started, and what is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.fake_pool import FakePool
from tests.commands import Result
from tests.fresh_interpreter import loaded, modules_after
from tsqp.cli.cluster import _resolved
from tsqp.cluster import control
from tsqp.cluster.state import ClusterDirectory
from tsqp.wire.transport.keys import create_keys

Command = Callable[..., Result]
TINY = ("--model", "synthetic:tiny")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """In place of Ray."""
    made = FakePool()
    monkeypatch.setattr("tsqp.cluster.own_ray.check_installed", lambda: None)
    for command in (control.up, control.scale, control.status, control.down):
        monkeypatch.setattr(command, "__kwdefaults__", {**(command.__kwdefaults__ or {}), "machinery": made.machinery})
    monkeypatch.setattr(control, "end_processes", lambda *directories: made.lost())
    monkeypatch.setattr(control, "processes_of", lambda *directories: [1] if made.registry else [])
    return made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("up", "--interface", "10.0.0.1"), "--interface 10.0.0.1: others can reach the workers"),
        (("up", "--address", "10.0.0.1:1", "--token", "x"), "--address 10.0.0.1:1: others can reach the workers"),
        (("up", "--address", "127.0.0.1:1"), "--address and --token go together"),
        (("up", "--token", "x"), "--address and --token go together"),
        (("up", "--address", "127.0.0.1:1", "--token", "x", "--nodes", 2), "--nodes is for a Ray that is started here"),
        (("up", "--nodes", 0), "--nodes must be at least 1"),
        (("up", "--threads", 0), "--threads must be at least 1"),
        (("up", "--timeout", 0), "--timeout must be more than 0 s"),
        (("up", "--name", "../x"), "cannot name a cluster"),
        (("up", "--workers", 5, "--layers", 2), "--workers 5: give a multiple of 2"),
        (("up", "--allow", "/nowhere/x.key"), "cannot read the key"),
        (("up", "--interface", "fe80::1"), "--interface fe80::1: others can reach the workers"),
        (("up", "--interface", "127.1"), "--interface: malformed address"),
        (("up", "--address", "10.0.0.1", "--token", "x"), "--address: malformed address"),
        (("up", "--device", "cuda:1"), "--device cuda:1: cpu or cuda; Ray gives each worker GPUs of its own"),
        (("up", "--device", "1"), "--device 1: cpu or cuda"),
        (("up", "--device", "cuda:1,cuda:2"), "so several are cuda:0,cuda:1"),
        (("up", "--device", "cuda,cuda"), "so several are cuda:0,cuda:1"),
        (("up", "--device", ""), "--device : cpu or cuda"),
        (("scale", "--workers", 2, "--timeout", 0), "--timeout must be more than 0 s"),
        (("scale", "--workers", 2, "--timeout", -5), "--timeout must be more than 0 s"),
        (("scale",), "give either --workers or --replicas"),
        (("scale", "--workers", 2, "--replicas", 2), "give either --workers or --replicas"),
    ],
)
def test_what_is_refused_is_one_line_and_starts_nothing(
    options: tuple[object, ...], said: str, tsqp: Command, pool: FakePool
) -> None:
    model = TINY if options[0] == "up" else ()
    result = tsqp("cluster", *options, *model)
    assert (result.code, result.out) == (2 if "key" not in said else result.code, "")
    assert result.code != 0
    assert said in result.error
    assert pool.events == []


def test_a_cluster_is_begun_shown_scaled_and_ended(tsqp: Command, pool: FakePool, tmp_path: Path) -> None:
    key = create_keys(tmp_path, "me").public
    shown = tsqp("cluster", "up", *TINY, "--workers", 2, "--allow", key, "--json").json
    assert [worker["shard"] for worker in shown["workers"]] == ["0..3/0..1of2", "0..3/1..2of2"]
    assert tsqp("cluster", "status", "--json").json["model"] == "synthetic:tiny"
    text = tsqp("cluster", "scale", "--workers", 4).out.splitlines()
    assert text[0].startswith("cluster default, epoch 1, front roster+tcp://127.0.0.1:7777")
    assert len(text) == 5
    assert tsqp("cluster", "down").out == "cluster default is down\n"
    assert tsqp("cluster", "down").out == "there was no cluster default\n"
    assert pool.running == {}
    gone = tsqp("cluster", "status")
    assert (gone.code, "there is no cluster default" in gone.error) == (1, True)


@pytest.mark.parametrize("given", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_loopback_of_ipv6_is_an_address_with_or_without_brackets(given: str, tsqp: Command) -> None:
    tsqp("cluster", "up", *TINY, "--interface", given)
    record = ClusterDirectory("default").read()
    assert record is not None
    assert record.started.interface == "[::1]"


@pytest.mark.parametrize("device", ["cpu", "cuda", "0", "cuda:0", "cuda:1,cuda:0"])
def test_gpus_that_each_worker_has_of_its_own_are_taken(device: str, tsqp: Command) -> None:
    assert tsqp("cluster", "up", *TINY, "--device", device).code == 0


def test_a_worker_that_does_not_listen_shows_in_the_exit_code(tsqp: Command, pool: FakePool) -> None:
    tsqp("cluster", "up", *TINY, "--workers", 2)
    assert tsqp("cluster", "status").code == 0
    pool.state = "lost"
    lost = tsqp("cluster", "status", "--json")
    assert lost.code == 1
    assert {worker["state"] for worker in json.loads(lost.out)["workers"]} == {"lost"}


@pytest.mark.parametrize("words", [("up", *TINY), ("status",), ("scale", "--workers", 2), ("down",)])
def test_an_image_of_the_trusted_side_places_no_workers(
    words: tuple[object, ...], tsqp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.cli.cluster.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("tsqp.cluster")]:
        monkeypatch.setitem(sys.modules, name, None)  # as where its folder is not there
    result = tsqp("cluster", *words)
    assert (result.code, result.out) == (2, "")
    assert "this installation is the trusted side alone" in result.error


def test_a_model_that_is_there_is_named_by_its_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert _resolved("model.gguf") == str(tmp_path / "model.gguf")
    assert _resolved("synthetic:tiny") == "synthetic:tiny"


def test_the_rest_of_the_command_line_loads_neither_ray_nor_the_cluster() -> None:
    modules = modules_after("from tsqp.cli.main import run; run(['cluster', 'up', '--help'])")
    assert not loaded(modules, "ray")
    assert not loaded(modules, "tsqp.cluster")
