"""The manifest for SGX, rendered as gramine-manifest does: it is a command of ours and leaves nothing to the host."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.deploy.unit_files import DEPLOY
from tsqp.cli.commands import app

GRAMINE = DEPLOY / "gramine"
TEMPLATE = (GRAMINE / "tsqp-server.manifest.template").read_text("utf-8")
README = (GRAMINE / "README.md").read_text("utf-8")
MODEL, KEYS = "/srv/models/llama", "/etc/tsqp/enclave"


class Gramine:
    """What the template asks of gramine-manifest's environment."""

    def runtimedir(self) -> Path:
        return Path("/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc")


class Python:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "stdlib").mkdir()
        (directory / "stdlib.zip").touch()

    def get_sys_path(self, interpreter: str) -> list[Path]:
        assert interpreter == "/opt/tsqp/bin/python"
        return [self.directory / "stdlib.zip", self.directory / "stdlib"]


def variables() -> dict[str, str]:
    """Those of the command in the README."""
    return dict(re.findall(r"-D(\w+)=(\S+)", README))


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # as Gramine's
    environment.globals |= {"gramine": Gramine(), "python": Python(tmp_path)}
    return tomllib.loads(environment.from_string(TEMPLATE).render(variables()))


def test_every_variable_is_given_by_the_command_of_the_readme_and_none_is_in_vain(manifest: dict[str, Any]) -> None:
    assert set(variables()) == set(re.findall(r"\{\{ (\w+) \}\}", TEMPLATE)) - {"path"}  # of its own loop


def test_the_host_says_neither_arguments_nor_environment(manifest: dict[str, Any]) -> None:
    assert not re.search(r"insecure__|passthrough", TEMPLATE)
    assert not manifest["loader"].keys() & {"argv_src_file", "env_src_file"}
    assert all(isinstance(value, str) for value in manifest["loader"]["env"].values())


def test_the_command_is_one_that_we_have(manifest: dict[str, Any]) -> None:
    python, *words = manifest["loader"]["argv"]
    assert python == manifest["libos"]["entrypoint"]
    assert words[:4] == ["-P", "-m", "tsqp", "serve"]
    _, bound, _ = app.parse_args(words[3:], exit_on_error=False, print_error=False)
    run, server = bound.arguments["run"], bound.arguments["server"]
    assert (run.protection, server.evidence, server.tls_cert) == ("masked", "gramine", None)
    assert run.model == MODEL
    assert run.worker.addresses[0].startswith("tcp://")
    for path in (run.worker.key, run.worker.server_key, server.api_keys):
        assert path.parent == Path(KEYS)


def test_what_clients_refuse_is_off(manifest: dict[str, Any]) -> None:
    sgx = manifest["sgx"]
    assert (sgx["debug"], sgx["remote_attestation"]) == (False, "dcap")
    assert "allowed_files" not in sgx
    assert "file_check_policy" not in sgx  # strict


def test_every_file_of_the_host_is_measured(manifest: dict[str, Any]) -> None:
    """A place that is mounted and not trusted could be read if somebody allowed it later."""
    trusted = {one.rstrip("/") for one in manifest["sgx"]["trusted_files"]}
    mounted = {mount["uri"] for mount in manifest["fs"]["mounts"] if mount.get("type") != "tmpfs"}
    assert mounted == trusted
    assert all(one.endswith("/") for one in manifest["sgx"]["trusted_files"] if not one.endswith(".zip"))


def test_what_is_written_stays_in_the_enclave(manifest: dict[str, Any]) -> None:
    assert {"type": "tmpfs", "path": "/tmp"} in manifest["fs"]["mounts"]
    environment = manifest["loader"]["env"]
    for name in ("HOME", "TSQP_CACHE", "XDG_RUNTIME_DIR"):
        assert environment[name].startswith("/tmp")


def test_there_is_a_thread_for_each_that_computes(manifest: dict[str, Any]) -> None:
    assert manifest["sgx"]["max_threads"] >= 4 * int(manifest["loader"]["env"]["OMP_NUM_THREADS"])
