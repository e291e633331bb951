"""The images and the file that runs both: no root, nothing to write to, and the sides kept apart."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from tests.deploy.unit_files import DEPLOY
from tsqp.cli.commands import app
from tsqp.config.worker_options import parse_worker_options

ROOT = DEPLOY.parent
RECIPE = (DEPLOY / "container" / "Containerfile").read_text("utf-8").replace("\\\n", " ")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text("utf-8"))[
    "services"
]
each_service = pytest.mark.parametrize("name", ["server", "worker"])


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions and what follows them, by stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in RECIPE.splitlines():
        if match := re.fullmatch(r"FROM \S+ AS (\S+)", line):
            name = match[1]
        elif match := re.fullmatch(r"([A-Z]+) (.*)", line):
            found.setdefault(name, []).append((match[1], match[2]))
    return found


def of(stage: str, instruction: str) -> list[str]:
    return [rest for one, rest in stages()[stage] if one == instruction]


@each_service
def test_an_image_has_a_user_of_its_own_and_is_told_to_end_gently(name: str) -> None:
    (user,) = of(name, "USER")
    assert re.fullmatch(r"1000[12]:1000[12]", user)
    assert of(name, "STOPSIGNAL") == ["SIGTERM"]
    (entry,) = of(name, "ENTRYPOINT")
    assert entry.startswith('["')  # no shell between the signal and the process


def test_the_sides_are_different_users_without_each_others_code() -> None:
    assert of("server", "USER") != of("worker", "USER")
    (server,), (worker,) = of("build-server", "RUN"), of("build-worker", "RUN")
    assert shlex.split(server)[2].endswith("/tsqp/untrusted")
    assert {"trusted", "api", "server", "cli"} <= set(shlex.split(worker))
    packages = {path.name for path in (ROOT / "src" / "tsqp").iterdir()}
    assert set(shlex.split(worker.partition("rm -r ")[2])) - packages == {"/opt/tsqp/bin/tsqp"}


def test_all_that_is_copied_from_the_tree_is_let_in_and_is_locked() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for rest in of("build", "COPY") for word in rest.split()[:-1]}
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    locked, torch = (line for line in of("build", "RUN")[1].split("&&") if "pip install" in line)
    assert "--require-hashes" in locked
    assert "constraints.txt" in torch


@each_service
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"core": 0}
    assert service["build"]["target"] == name
    assert "privileged" not in service
    assert all(volume.endswith(":ro") for volume in service["volumes"] if volume.startswith("./"))


def test_the_worker_has_no_network_and_the_server_no_swap() -> None:
    assert SERVICES["worker"]["network_mode"] == "none"
    assert "ports" not in SERVICES["worker"]
    assert SERVICES["server"]["mem_limit"] == SERVICES["server"]["memswap_limit"]


def test_the_sides_know_each_other_by_number() -> None:
    worker = parse_worker_options(SERVICES["worker"]["command"])
    _, bound, _ = app.parse_args(["serve", *SERVICES["server"]["command"]], exit_on_error=False, print_error=False)
    run = bound.arguments["run"]
    assert run.worker.addresses == (worker.listen,)
    assert of("worker", "USER") == [f"{run.worker.user}:{run.worker.user}"]
    assert of("server", "USER") == [f"{worker.allow_user[0]}:{worker.allow_user[0]}"]
    assert run.protection == "masked"
    for service in SERVICES.values():
        assert any(volume.startswith("line:/run/tsqp-worker") for volume in service["volumes"])


def test_metrics_can_be_read_from_this_machine_and_from_nowhere_else() -> None:
    server = SERVICES["server"]
    published = [port for port in server["ports"] if port.endswith(":9100")]
    assert published == ["127.0.0.1:9100:9100"]
    assert {"--metrics-port=9100", "--metrics-host=0.0.0.0"} <= set(server["command"]), "not on a container's loopback"
