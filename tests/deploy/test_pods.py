"""Pods as their manifests say, on this machine: what was prepared passes the rules for keys and compiled code.

Nothing is multiplied: loops would be compiled for minutes, and what is private is looked at before that.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.commands import LIMIT_S
from tests.deploy.confined import TOOLS
from tests.deploy.manifests import documents, templates
from tests.deploy.pods import running, script_of
from tests.families import tiny_model
from tests.tee.certificates import key_pair
from tsqp.server.api_keys import line_for, new_key
from tsqp.wire.roster import Member, roster_document
from tsqp.wire.transport.keys import create_keys, load_public

PODS = {name: template for name, (_, template) in templates(documents("trusted", "untrusted")).items()}
MISSING = [tool for tool in (*TOOLS, "chroot") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make other users' processes"),
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)} here"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """That any user can read, wherever the directory of this test is: it is mounted."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama").directory, copy)
    copy.chmod(0o755)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    for name in ("server", "left-0"):
        create_keys(directory, name)
    return directory


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Of a pod's log, until it ends: then the test fails with all of them."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        yield line
    raise AssertionError("".join(seen))


def check_process(process: subprocess.Popen[str], user: int) -> dict[str, str]:
    """What the kernel says of it. Returns what is mounted where, and whether it may be written to."""
    found = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    assert set(found["Uid"].split()) == {str(user)}
    assert found["NoNewPrivs"].strip() == "1"
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    mounts = [line.split() for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()]
    return {words[4]: words[5][:2] for words in mounts}


def test_a_server_takes_its_keys_and_keeps_compiled_code(model: Path, keys: Path) -> None:
    """Keys, certificate and API keys are read before anything is loaded; the line says that a cache is there."""
    pair = key_pair()
    files = {
        "line": {"server.key_secret": (keys / "server.key_secret").read_bytes()},
        "api": {"api": f"{line_for('alice', new_key())}\n".encode()},
        "tls": {
            "tls.crt": ssl.DER_cert_to_PEM_cert(pair.der).encode(),
            "tls.key": pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        },
    }
    replaced = {"--port=8000": "--port=0", "--metrics-port=9100": "--metrics-port=0"}
    replaced["front.tsqp-untrusted.svc.cluster.local:7100"] = "127.0.0.1:9"
    with running(script_of("server", PODS["server"], "server", files, model, replaced)) as process:
        for line in lines(process):  # a library may say something too, and not in JSON
            if line.startswith("{") and "no compiled loops are kept yet" in json.loads(line)["message"]:
                break
        mounts = check_process(process, 10001)
        expected = {"/": "ro", "/keys": "ro", "/models/llama": "ro", "/var/cache/tsqp": "rw", "/tmp": "rw"}
        assert expected.items() <= mounts.items()
        assert "/secrets/line" not in mounts


def test_a_worker_takes_its_key_and_listens(model: Path, keys: Path) -> None:
    files = {
        "line": {"left-0.key_secret": (keys / "left-0.key_secret").read_bytes()},
        "allowed": {"server.key": (keys / "server.key").read_bytes()},
    }
    replaced = {"0.0.0.0:7000": "127.0.0.1:0", "0..17": "0..3"}
    with running(script_of("left", PODS["left"], "worker", files, model, replaced)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        assert json.loads(line)["address"].startswith("tcp://127.0.0.1:")
        mounts = check_process(process, 10002)
        assert {"/": "ro", "/keys": "ro", "/models/llama": "ro"}.items() <= mounts.items()


def test_a_front_reads_the_roster(model: Path, keys: Path) -> None:
    address = "tcp://left-0.workers.tsqp-untrusted.svc.cluster.local:7000"
    member = Member(address, "0..3", load_public(keys / "left-0.key").decode())
    files = {"roster": {"roster.json": roster_document(1, [member])}}
    with running(script_of("front", PODS["front"], "worker", files, model, {"0.0.0.0:7100": "127.0.0.1:0"})) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["address"].startswith("roster+tcp://127.0.0.1:")
        check_process(process, 10002)
        process.terminate()
        assert process.wait(LIMIT_S) == 0
