"""The units: systemd understands them, they give up what they can, and their command lines are ones that we have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.systemd import MOST_EXPOSED, analyzed, exposure, needs_systemd
from tests.deploy.unit_files import COMMAND, DEPLOY, UNITS, arguments_of, environment_of, settings_of
from tsqp.cli.commands import app
from tsqp.cli.options import RunOptions
from tsqp.cli.serve import ServeOptions
from tsqp.config.worker_options import arguments_of as worker_arguments
from tsqp.config.worker_options import parse_worker_options
from tsqp.errors import InputError
from tsqp.server.api_keys import KeyFile
from tsqp.untrusted.backends.device import pick_device
from tsqp.wire.transport.users import user_id

SYSTEMD = DEPLOY / "systemd"
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)


@pytest.fixture
def installed(unit: Path, tmp_path: Path) -> Path:
    """The unit as if its command were installed, with every drop-in that belongs to it."""
    command = tmp_path / "tsqp"
    command.touch(0o755)
    path = tmp_path / unit.name
    path.write_text(unit.read_text().replace(COMMAND, str(command)))
    return path


def test_there_is_a_unit_for_each_side() -> None:
    assert [unit.stem for unit in UNITS] == ["tsqp-dealer", "tsqp-server", "tsqp-worker"]


@needs_systemd
@each_unit
def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    found = analyzed("verify", "--man=no", installed)
    assert (found.returncode, found.stderr, found.stdout) == (0, "", "")


@needs_systemd
@each_unit
def test_each_unit_is_little_exposed(installed: Path) -> None:
    assert exposure(installed) <= MOST_EXPOSED


@needs_systemd
@pytest.mark.parametrize("drop_in", sorted(SYSTEMD.glob("*.conf")), ids=lambda path: path.stem)
def test_a_worker_with_a_drop_in_is_understood_and_little_exposed(drop_in: Path, tmp_path: Path) -> None:
    """As one file: what comes later wins, as it does for a drop-in."""
    command = tmp_path / "tsqp"
    command.touch(0o755)
    unit = tmp_path / "tsqp-worker.service"
    whole = (SYSTEMD / "tsqp-worker.service").read_text().replace(COMMAND, str(command))
    unit.write_text(f"{whole}\n{drop_in.read_text()}")
    found = analyzed("verify", "--man=no", unit)
    assert (found.returncode, found.stderr) == (0, "")
    assert exposure(unit) <= MOST_EXPOSED


@each_unit
def test_what_every_unit_holds_to(unit: Path) -> None:
    found = settings_of(unit)
    for name, value in {
        "Type": "notify",
        "NoNewPrivileges": "yes",
        "LimitCORE": "0",
        "PrivateTmp": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
        "RestrictNamespaces": "yes",
        "UMask": "0077",
    }.items():
        assert found[name] == [value], name


def test_the_sides_are_different_users_with_different_files() -> None:
    users = [settings_of(unit)["User"][0] for unit in UNITS]
    assert len(set(users)) == len(UNITS)
    lines = (SYSTEMD / "tsqp.sysusers").read_text().splitlines()
    assert sorted(line.split()[1] for line in lines if line.startswith("u ")) == sorted(users)
    for name in ("StateDirectory", "CacheDirectory"):
        assert len({settings_of(unit)[name][0] for unit in UNITS}) == len(UNITS)


def test_there_are_places_for_keys_before_a_unit_ran() -> None:
    """A unit makes its directory when it starts, and does not start without its keys."""
    wanted = []
    for unit in UNITS:
        (user,), (group,), (state,) = (settings_of(unit)[name] for name in ("User", "Group", "StateDirectory"))
        wanted.append(f"d /var/lib/{state} {settings_of(unit)['StateDirectoryMode'][0]} {user} {group}".split())
    lines = (SYSTEMD / "tsqp.tmpfiles").read_text("utf-8").splitlines()
    assert sorted(line.split() for line in lines if not line.startswith("#")) == sorted(wanted)
    told = (DEPLOY.parent / "docs" / "operations.md").read_text("utf-8")
    assert "deploy/systemd/tsqp.tmpfiles /etc/tmpfiles.d/tsqp.conf && systemd-tmpfiles --create" in told


def test_the_worker_beside_the_server_has_no_network_and_cannot_see_the_servers_files() -> None:
    worker, server = (settings_of(SYSTEMD / f"tsqp-{side}.service") for side in ("worker", "server"))
    assert worker["PrivateNetwork"] == ["yes"]
    assert worker["RestrictAddressFamilies"] == ["AF_UNIX"]
    hidden = worker["InaccessiblePaths"][0].split()
    assert {f"-/var/lib/{server['StateDirectory'][0]}", f"-/var/cache/{server['CacheDirectory'][0]}"} <= set(hidden)


def test_prompts_are_not_swapped() -> None:
    for side in ("server", "dealer"):
        assert settings_of(SYSTEMD / f"tsqp-{side}.service")["MemorySwapMax"] == ["0"]


def test_the_server_alone_may_lock_all_of_its_memory() -> None:
    """A finite limit is refused by ``--lock-memory``, however large it is."""
    limits = {unit.stem: settings_of(unit).get("LimitMEMLOCK") for unit in UNITS}
    assert limits == {"tsqp-dealer": None, "tsqp-server": ["infinity"], "tsqp-worker": None}


def test_there_is_time_for_answers_under_way() -> None:
    stop_s = int(settings_of(SYSTEMD / "tsqp-server.service")["TimeoutStopSec"][0])
    assert stop_s > ServeOptions().drain_s + 15
    assert settings_of(SYSTEMD / "tsqp-server.service")["KillMode"] == ["mixed"]  # the signal is not for a worker


@each_unit
def test_a_start_that_fails_is_tried_again_for_as_long_as_it_takes(unit: Path) -> None:
    """The other side's machine may be there an hour later, and what looks like a wrong option may pass, too."""
    found = settings_of(unit)
    assert found["StartLimitIntervalSec"] == ["0"]
    assert "StartLimitBurst" not in found
    assert 5 <= int(found["RestartSec"][0]) <= 10
    assert found["Restart"] in (["always"], ["on-failure"])
    assert "RestartPreventExitStatus" not in found


def test_what_passes_by_itself_ends_as_a_wrong_option_does(tmp_path: Path) -> None:
    """A driver that is not loaded yet, a user of a directory service, a file on a mount: all end with exit code 2."""
    with pytest.raises(InputError, match="there is no device"):
        pick_device("cuda:99")
    with pytest.raises(InputError, match="this machine has no user"):
        user_id("no-such-user", "worker_user")
    with pytest.raises(InputError, match=r"there is no .*not-mounted"):
        KeyFile(tmp_path / "not-mounted")


def uncommented(path: Path) -> str:
    """An environment file with the lines that are there for another machine."""
    return re.sub(r"(?m)^#(?=[A-Z_]+=)", "", path.read_text("utf-8"))


@pytest.mark.parametrize("other_machine", [False, True])
def test_the_server_takes_what_its_environment_says(
    other_machine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.env"
    path.write_text(uncommented(SYSTEMD / "server.env") if other_machine else (SYSTEMD / "server.env").read_text())
    environment = environment_of(path)
    for name in [name for name in environment if name.startswith("TSQP_")]:
        monkeypatch.setenv(name, environment[name])
    words = arguments_of(SYSTEMD / "tsqp-server.service", environment)
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    run, server = bound.arguments.get("run", RunOptions()), bound.arguments.get("server", ServeOptions())
    assert words[0] == "serve"
    assert (run.protection, server.log_format, server.metrics_port) == ("masked", "json", 9100)
    assert run.guard.warm_pads
    if other_machine:
        assert run.worker.addresses == ("tcp://worker.example:7000",)
        assert (server.host, server.allow_host) == ("0.0.0.0", ("llm.example",))
        assert run.compute.lock_memory
        assert all((run.worker.key, run.worker.server_key, server.api_keys, server.tls_cert, server.tls_key))
    else:
        assert (run.worker.addresses, run.worker.user) == (("shm:///run/tsqp-worker/worker.sock",), "tsqp-worker")
        assert server.host == "127.0.0.1"
    assert {name for name in environment if name.startswith("TSQP_")} <= variables()


def variables() -> set[str]:
    """What ``tsqp serve`` reads."""
    found = app["serve"].assemble_argument_collection()
    return {name for argument in found for name in argument.parameter.env_var or ()}


@pytest.mark.parametrize(
    ("side", "other_machine"), [("worker", False), ("worker", True), ("dealer", False)], ids=["shm", "tcp", "dealer"]
)
def test_a_worker_takes_what_its_environment_says(side: str, other_machine: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.env"
    text = (SYSTEMD / f"{side}.env").read_text()
    path.write_text(uncommented(SYSTEMD / f"{side}.env") if other_machine else text)
    environment = environment_of(path)
    command, *words = arguments_of(SYSTEMD / f"tsqp-{side}.service", environment)
    assert command == "worker"
    options = parse_worker_options(worker_arguments(environment, words))
    assert options.dtype == "field"
    if options.listen.startswith("shm:"):
        assert options.allow_user == [settings_of(SYSTEMD / "tsqp-server.service")["User"][0]]
        (directory,) = settings_of(SYSTEMD / "tsqp-worker.service")["RuntimeDirectory"]
        assert options.listen.startswith(f"shm:///run/{directory}/")
    else:
        assert options.key is not None
        assert options.allow


MAKES_CODE = """
import ctypes, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(77)
import numba
numba.njit(lambda x: x + 1)(1)
"""


def test_no_unit_forbids_what_numba_needs() -> None:
    """Once numba compiles without it, the units shall give it up: then this test fails."""
    for unit in UNITS:
        assert settings_of(unit)["MemoryDenyWriteExecute"] == ["no"]
    done = subprocess.run([sys.executable, "-c", MAKES_CODE], capture_output=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode != 0
