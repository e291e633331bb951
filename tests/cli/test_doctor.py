"""``tsqp doctor``, ``tsqp model`` and ``tsqp keys``."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from tests.commands import Home, Result
from tests.families import tiny_model
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.cli.models import parameters
from tsqp.tee.detection import detect_tee

Command = Callable[..., Result]


def test_doctor_reports_what_it_tried(tsqp: Command, home: Home) -> None:
    result = tsqp("doctor", "--json")
    report = result.json
    assert (result.code, report["healthy"]) == (0, True)
    found = {finding["what"]: finding for finding in report["findings"]}
    for transport in ("mem", "shm", "ipc", "tcp"):
        assert found[f"transport {transport}"]["state"] == "ok"
    assert str(home.runtime) in found["runtime directory"]["detail"]
    assert "same user id" in found["isolation"]["detail"]
    assert "--lock-memory is" in found["swapped memory"]["detail"]
    assert {"TEE", "accelerator", "versions", "default model"} <= found.keys()
    assert home.leftovers() == []


@pytest.mark.parametrize(("available", "state"), [(1 << 29, "note"), (1 << 31, "ok")])
def test_doctor_compares_pads_with_the_memory_that_is_available(
    tsqp: Command, monkeypatch: pytest.MonkeyPatch, available: int, state: str
) -> None:
    monkeypatch.setattr("tsqp.cli.doctor.available_bytes", lambda: available)
    found = {finding["what"]: finding for finding in tsqp("doctor", "--json").json["findings"]}
    assert found["memory for pads"]["state"] == state
    assert found["memory for pads"]["detail"].startswith(f"{available / 1e9:.1f} GB available")


def test_doctor_fails_when_something_is_broken(tsqp: Command, home: Home) -> None:
    (home.runtime / "tsqp").write_text("in the way")
    result = tsqp("doctor")
    assert result.code == 1
    assert "broken" in result.out


def test_doctor_reports_whatever_a_check_raises(
    tsqp: Command, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strange = tmp_path / "a [/bold] cache"
    monkeypatch.setattr("tsqp.cli.doctor.default_directory", lambda: strange)

    def fail(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr("tsqp.cli.doctor.listen", fail)
    result = tsqp("doctor")
    assert result.code == 1
    assert "[/bold]" in result.out
    report = tsqp("doctor", "--json").json
    states = {finding["what"]: finding["state"] for finding in report["findings"]}
    assert {states[f"transport {name}"] for name in ("mem", "shm", "ipc", "tcp")} == {"broken"}
    assert states["TEE"] == "note"


def test_an_attestation_that_cannot_be_read_is_a_tee_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "dev/attestation/attestation_type"
    path.mkdir(parents=True)
    assert detect_tee(tmp_path) == "Gramine (SGX attestation: unknown)"
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    assert "Gramine" in (detect_tee(tmp_path) or "")


@pytest.mark.parametrize(
    ("path", "content", "name"),
    [
        ("dev/tdx_guest", "", "Intel TDX"),
        ("dev/sev-guest", "", "AMD SEV-SNP"),
        ("dev/attestation/attestation_type", "dcap\n", "Gramine (SGX attestation: dcap)"),
    ],
)
def test_tees_are_told_apart(tmp_path: Path, path: str, content: str, name: str) -> None:
    assert detect_tee(tmp_path) is None
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content)
    assert detect_tee(tmp_path) == name


def test_models_are_listed(tsqp: Command) -> None:
    names = {model["model"] for model in json.loads(tsqp("model", "list", "--json").out)}
    assert names == {"default", *(f"synthetic:{name}" for name in SHAPES)}
    lines = tsqp("model", "list").out.splitlines()
    assert any(line.startswith("synthetic:llama-3.2-1b ") for line in lines)
    assert len({line.index("random weights") for line in lines if "random weights" in line}) == 1


def test_a_model_is_described(tsqp: Command) -> None:
    model = tiny_model("qwen2")
    info = tsqp("model", "info", model.directory, "--json").json
    assert info["architecture"] == "qwen2"
    assert info["fingerprint"] == open_checkpoint(str(model.directory)).fingerprint()
    assert info["calls_per_pass"] == {"op": 20, "batched": 14, "linear": 9, "layer": 4}
    for_a_person = dict(line.split(maxsplit=1) for line in tsqp("model", "info", model.directory).out.splitlines())
    assert for_a_person["calls_per_pass"] == "op 20, batched 14, linear 9, layer 4"
    assert (for_a_person["sliding_window"], for_a_person["not_used"]) == ("none", "none")
    assert for_a_person["tied_embeddings"] == ("yes" if info["tied_embeddings"] else "no")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3"])
def test_parameters_are_counted(family: str) -> None:
    model = tiny_model(family)
    config = open_checkpoint(str(model.directory)).config
    assert parameters(config) == sum(p.numel() for p in model.oracle.parameters())


def test_nothing_to_fetch(tsqp: Command) -> None:
    assert "nothing to fetch" in tsqp("model", "fetch", "synthetic:tiny").error
    assert tsqp("model", "fetch", "org/name", "--from", "x.whl").code == 2


def test_keys_are_private_and_never_overwritten(tsqp: Command, tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    assert tsqp("keys", directory, "--name", "me").code == 0
    secret = directory / "me.key_secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = secret.read_text()
    again = tsqp("keys", directory, "--name", "me")
    assert again.code == 1
    assert "choose another" in again.error
    assert secret.read_text() == before
    printed = before.split('secret-key = "')[1].split('"')[0]
    assert printed not in again.out + again.err
