"""Every rule refuses what it is there for, by the name of the field, before anything is started."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.refusals import AWAY, BAD_VALUES, ROSTER, Refused, changed, conflicts, unused
from tsqp import LLM
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.rules import CONFLICTS, VALUES, Conflict, Unused, check, check_heads
from tsqp.config.dtype import PlainDtype
from tsqp.config.partition import PARTITIONS, PartitionName
from tsqp.config.protection import PROTECTIONS, ProtectionName
from tsqp.errors import AddressError, OptionError
from tsqp.wire.transport.keys import create_keys

OPEN = RunConfig(protection="open")


def test_each_value_that_has_a_rule_has_an_example() -> None:
    assert {name for name, _, _ in BAD_VALUES} == VALUES.keys()


def test_each_name_of_a_mode_has_its_mode() -> None:
    assert set(get_args(ProtectionName)) == PROTECTIONS.keys()
    assert set(get_args(PartitionName)) == PARTITIONS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in BAD_VALUES])
def test_a_value_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name} must be .*, not {value}$") as refused:
        check(changed(RunConfig(), name, value))
    assert refused.value.fields == (name,)


@pytest.mark.parametrize(("rule", "refused"), unused())
def test_what_would_play_no_part_is_refused(rule: Unused, refused: Refused) -> None:
    why = rule.why.format(mode=refused.run.protection)
    with pytest.raises(OptionError, match=f"^{why}: leave out {refused.fields[0]}$") as error:
        check(refused.run)
    assert error.value.fields == refused.fields


@pytest.mark.parametrize("index", range(len(CONFLICTS)), ids=lambda index: CONFLICTS[index].says[:40])
def test_what_cannot_be_together_is_refused(index: int, tmp_path: Path) -> None:
    rule, refused = conflicts(tmp_path)[index]
    with pytest.raises(OptionError) as error:
        check(refused.run)
    assert str(error.value) == rule.says
    assert error.value.fields == refused.fields
    assert all(name in rule.says for name in rule.fields)


def test_two_options_without_a_part_are_named_together() -> None:
    guard = GuardConfig(pads_ahead=1, warm_pads=True)
    with pytest.raises(OptionError, match=r"has no pads: leave out guard\.pads_ahead, guard\.warm_pads$"):
        check(RunConfig(protection="verified", guard=guard))


@pytest.mark.parametrize(
    "run",
    [
        *(changed(OPEN, "protection", name) for name in PROTECTIONS),
        *(changed(OPEN, "compute.dtype", dtype) for dtype in get_args(PlainDtype)),
        *(RunConfig(compute=ComputeConfig(dtype=dtype)) for dtype in ("auto", "float32")),
        RunConfig(protection="local", compute=ComputeConfig(dtype="float32", compiled_kernels=False, threads=1)),
        changed(OPEN, "worker", WorkerConfig("tcp://127.0.0.1:1", insecure_plain_tcp=True)),
        changed(OPEN, "worker", WorkerConfig(AWAY, key=Path("x"), server_key=Path("x"))),
        RunConfig(
            worker=WorkerConfig(key=Path("x")), guard=GuardConfig(pad_source=f"dealer={AWAY}", dealer_key=Path("x"))
        ),
        RunConfig(guard=GuardConfig(pad_source="dealer=ipc:///x", dealer_no_separation=True)),
        RunConfig(guard=GuardConfig(pads_ahead=0, pad_memory=0)),
        changed(OPEN, "worker", WorkerConfig("cuda:///x", user="root", arena_bytes=1 << 28)),
        RunConfig(worker=WorkerConfig(key=Path("x")), guard=GuardConfig(pad_source="dealer=roster:///x")),
        RunConfig(worker=WorkerConfig("roster:///y"), guard=GuardConfig(pad_source="dealer=roster:///x")),
        RunConfig(
            worker=WorkerConfig(key=Path("x")), guard=GuardConfig(pad_source=f"dealer={ROSTER}", dealer_key=Path("x"))
        ),
        RunConfig(
            guard=GuardConfig(pad_source="dealer=roster+tcp://127.0.0.1:1", dealer_no_separation=True),
        ),
        RunConfig(worker=WorkerConfig(ROSTER, key=Path("x"), user="root", arena_bytes=1 << 28)),
        RunConfig(protection="verified", worker=WorkerConfig("roster:///x", key=Path("x"))),
        RunConfig(protection="verified", worker=WorkerConfig("roster+tcp://127.0.0.1:1")),
        RunConfig(protection="verified", worker=WorkerConfig(ROSTER, insecure_plain_tcp=True)),
    ],
)
def test_what_is_asked_for_with_reason_is_not_refused(run: RunConfig) -> None:
    check(run)


def test_no_rule_names_a_field_that_does_not_exist(tmp_path: Path) -> None:
    names = {"protection"} | {
        f"{section}.{field.name}"
        for section in ("worker", "guard", "compute")
        for field in fields(getattr(RunConfig(), section))
    }
    rules: list[Unused | Conflict] = [rule for rule, _ in unused()]
    assert {name for rule in (*rules, *CONFLICTS) for name in rule.fields} | VALUES.keys() <= names


def test_the_rules_are_asked_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("tsqp.api.parties.LocalWorker", lambda *a, **k: started.append(a))
    monkeypatch.setattr("tsqp.api.open_model.locate", started.append)
    with pytest.raises(OptionError, match=r"leave out compute\.partition"):
        LLM("default", compute=ComputeConfig("op"), announce=started.append)
    assert started == []


DEALT = GuardConfig(dealer_no_separation=True)


@pytest.mark.parametrize(
    ("dealer", "worker"),
    [
        ("ipc:///run/a.sock", "ipc:///run/a.sock"),
        ("ipc:///run//x/./a.sock", "/run/x/a.sock"),
        ("ipc:///run/a.sock", "shm:///run/a.sock"),
        ("mem:a", "mem:a"),
        ("tcp://127.0.0.1:7000", "tcp://localhost:7000"),
        ("tcp://127.0.0.1:7000", "tcp://[::1]:7000"),
        ("ipc://LINK", "ipc://REAL"),
        ("roster:///x/roster.json", "roster:///x/./roster.json"),
        ("roster+tcp://127.0.0.1:7000", "roster+tcp://localhost:7000"),
        ("tcp://127.0.0.1:7000", "roster+tcp://127.0.0.1:7000"),
    ],
)
def test_the_workers_address_is_no_dealers(dealer: str, worker: str, tmp_path: Path) -> None:
    (tmp_path / "b.sock").symlink_to(tmp_path / "a.sock")
    dealer = dealer.replace("LINK", f"{tmp_path}/b.sock")
    guard = GuardConfig(pad_source=f"dealer={dealer}", dealer_no_separation=True)
    with pytest.raises(OptionError, match="is the worker itself"):
        check(RunConfig(worker=WorkerConfig(worker.replace("REAL", f"{tmp_path}/a.sock")), guard=guard))


@pytest.mark.parametrize(
    ("front", "says"),
    [
        (ROSTER, "is not on this host: give its public key"),
        ("roster+tcp://127.0.0.1:1", "may read the line to the dealer"),
    ],
)
def test_a_roster_of_dealers_comes_from_a_front_that_proves_who_it_is(front: str, says: str, tmp_path: Path) -> None:
    """Whoever could change it on its way would be the dealer."""
    guard = GuardConfig(pad_source=f"dealer={front}")
    with pytest.raises(OptionError, match=says):
        check(RunConfig(guard=guard))
    key = create_keys(tmp_path, "front").public
    check(RunConfig(worker=WorkerConfig(key=key), guard=replace(guard, dealer_key=key)))


def test_a_file_names_the_keys_of_dealers(tmp_path: Path) -> None:
    key = create_keys(tmp_path, "front").public
    guard = GuardConfig(pad_source="dealer=roster:///x", dealer_key=key)
    with pytest.raises(OptionError, match="in a file of several dealers: leave out"):
        check(RunConfig(worker=WorkerConfig(key=key), guard=guard))


def test_hosts_are_compared_without_regard_to_case(tmp_path: Path) -> None:
    me, other = create_keys(tmp_path, "me"), create_keys(tmp_path, "other")
    guard = GuardConfig(pad_source="dealer=tcp://HOST.example:7000", dealer_key=other.public)
    with pytest.raises(OptionError, match="is the worker itself"):
        check(RunConfig(worker=WorkerConfig("tcp://host.example:7000", key=me.secret), guard=guard))


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(AddressError, match="http"):
        check(RunConfig(guard=GuardConfig(pad_source="dealer=http://x")))
    for address in ("http://a:1", "foo", "tcp://x", "shm://", "roster:relative"):
        with pytest.raises(AddressError, match=re.escape(repr(address))):
            check(RunConfig(worker=WorkerConfig(address)))
    with pytest.raises(AddressError, match="'foo'"):
        check(RunConfig(worker=WorkerConfig(("shm:///run/a.sock", "foo"))))


@pytest.mark.parametrize("head_dim", [2, 6, 514, 516])
def test_keys_of_8_bits_are_refused_for_heads_that_do_not_fit(head_dim: int) -> None:
    check_heads("bfloat16", head_dim)
    check_heads("int8", 80)
    with pytest.raises(
        OptionError, match=rf"^compute\.kv_dtype int8 is for heads .* heads of {head_dim}: say"
    ) as error:
        check_heads("int8", head_dim)
    assert error.value.fields == ("compute.kv_dtype",)


def test_no_standby_is_the_dealer() -> None:
    guard = GuardConfig(pad_source="dealer=ipc:///b", dealer_no_separation=True)
    with pytest.raises(OptionError, match="is the worker itself"):
        check(RunConfig(worker=WorkerConfig(("ipc:///a", "ipc:///b")), guard=guard))


def test_one_address_is_the_same_however_it_is_given() -> None:
    assert WorkerConfig(("ipc:///x",)) == WorkerConfig("ipc:///x")
    assert WorkerConfig(()) == WorkerConfig()
    assert WorkerConfig("ipc:///x").addresses == ("ipc:///x",)
    assert WorkerConfig(("ipc:///x", "ipc:///y")).addresses == ("ipc:///x", "ipc:///y")
