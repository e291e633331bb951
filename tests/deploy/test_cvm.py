"""The recipe for a confidential VM: the configuration is measured or nothing starts; units say what they should."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.systemd import MOST_EXPOSED, analyzed, exposure, needs_systemd
from tests.deploy.unit_files import COMMAND, DEPLOY, environment_of, settings_of
from tests.tee.fake_tsm import FakeTsm
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.intel import intel_forge
from tsqp.cli.commands import app
from tsqp.tee.providers import TSM_REPORTS, ConfigfsTsm

CVM = DEPLOY / "cvm"
SYSTEMD = DEPLOY / "systemd"
DROP_IN = CVM / "tsqp-server-cvm.conf"
CONFIGURATION = b"TSQP_PROTECTION=masked\n"
NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_config", CVM / "measure_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_config"] = module
    spec.loader.exec_module(module)
    return module


MEASURE = script()


@pytest.fixture
def swaps(tmp_path: Path) -> Path:
    path = tmp_path / "swaps"
    path.write_text(NO_SWAP)
    return path


class Register:
    """RTMR 3 as sysfs has it, for whoever opens files by pathlib: a write of 48 bytes extends it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.value = bytes(48)
        path.touch()
        read: Callable[[Path], bytes] = Path.read_bytes

        def read_bytes(found: Path) -> bytes:
            if found != path:
                return read(found)
            if written := read(path):
                assert len(written) == 48
                self.value = hashlib.sha384(self.value + written).digest()
                path.write_bytes(b"")
            return self.value

        monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    return Register(tmp_path / "rtmr3", monkeypatch)


def tdx() -> ConfigfsTsm:
    tsm = FakeTsm("tdx_guest", lambda data: intel_forge().tdx(report_data=data))
    return ConfigfsTsm(tsm.root, tsm)


def snp(host_data: bytes) -> ConfigfsTsm:
    tsm = FakeTsm("sev_guest", lambda data: amd_forge().report(report_data=data, host_data=host_data))
    return ConfigfsTsm(tsm.root, tsm)


def test_what_is_shown_is_what_the_register_holds_afterwards(register: Register, swaps: Path) -> None:
    MEASURE.measure(CONFIGURATION, tdx(), register=register.path, swaps=swaps)
    assert f'rtmr3 = ["{register.value.hex()}"]' in MEASURE.shown(CONFIGURATION)
    assert register.value == hashlib.sha384(bytes(48) + hashlib.sha384(CONFIGURATION).digest()).digest()


def test_a_second_start_extends_nothing(register: Register, swaps: Path) -> None:
    MEASURE.measure(CONFIGURATION, tdx(), register=register.path, swaps=swaps)
    once = register.value
    MEASURE.measure(CONFIGURATION, tdx(), register=register.path, swaps=swaps)
    assert register.value == once


def test_a_configuration_that_was_changed_after_the_boot_is_refused(register: Register, swaps: Path) -> None:
    MEASURE.measure(CONFIGURATION, tdx(), register=register.path, swaps=swaps)
    with pytest.raises(MEASURE.NotMeasured, match="something else was measured"):
        MEASURE.measure(CONFIGURATION + b"#", tdx(), register=register.path, swaps=swaps)


def test_a_kernel_without_the_register_is_refused(tmp_path: Path, swaps: Path) -> None:
    with pytest.raises(MEASURE.NotMeasured, match=r"Linux 6\.16"):
        MEASURE.measure(CONFIGURATION, tdx(), register=tmp_path / "none", swaps=swaps)


def test_host_data_has_to_be_of_this_configuration(swaps: Path) -> None:
    digest = hashlib.sha256(CONFIGURATION)
    assert f'host-data = ["{digest.hexdigest()}"]' in MEASURE.shown(CONFIGURATION)
    MEASURE.measure(CONFIGURATION, snp(digest.digest()), swaps=swaps)
    with pytest.raises(MEASURE.NotMeasured, match="for another configuration"):
        MEASURE.measure(CONFIGURATION + b"#", snp(digest.digest()), swaps=swaps)


def test_swap_is_refused_before_anything_is_measured(register: Register, swaps: Path) -> None:
    swaps.write_text(f"{NO_SWAP}/dev/vdb partition 1 0 -2\n")
    with pytest.raises(MEASURE.NotMeasured, match="swap is on"):
        MEASURE.measure(CONFIGURATION, tdx(), register=register.path, swaps=swaps)
    assert register.value == bytes(48)


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A configuration, and where its copy shall be, as the unit calls the script."""
    file, copy = tmp_path / "server.env", tmp_path / "copy"
    file.write_bytes(CONFIGURATION)
    monkeypatch.setattr(sys, "argv", ["measure_config.py", "measure", str(file), str(copy)])
    return file, copy


def test_the_copy_is_what_was_measured_whatever_the_file_is_by_then(
    configured: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, copy = configured
    measured = []

    def measure(configuration: bytes, _provider: ConfigfsTsm) -> None:
        measured.append(configuration)
        file.write_bytes(b"LD_PRELOAD=/host/evil.so\n")

    monkeypatch.setattr(MEASURE, "measure", measure)
    MEASURE.main()
    assert copy.read_bytes() == CONFIGURATION == measured[0]


def test_what_was_not_measured_has_no_copy(configured: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_configuration: bytes, _provider: ConfigfsTsm) -> None:
        raise MEASURE.NotMeasured("swap is on")

    monkeypatch.setattr(MEASURE, "measure", measure)
    with pytest.raises(SystemExit, match="not measured: swap is on"):
        MEASURE.main()
    assert not configured[1].exists()


# --- Units ---


def test_the_server_needs_what_measures_and_has_a_report_of_its_own() -> None:
    found = settings_of(DROP_IN)
    assert found["Requires"] == ["tsqp-measure.service"]
    assert "tsqp-measure.service" in found["After"]
    (line,) = found["Environment"]
    given = dict(word.split("=", 1) for word in line.split())
    known = {name for one in app["serve"].assemble_argument_collection() for name in one.parameter.env_var or ()}
    assert set(given) <= known
    entry = Path(given["TSQP_EVIDENCE_ENTRY"])
    assert entry.parent == TSM_REPORTS
    user = settings_of(SYSTEMD / "tsqp-server.service")["User"][0]
    assert found["ExecStartPre"] == [f"+/bin/mkdir -p {entry}", f"+/bin/chown -R {user}:{user} {entry}"]
    assert found["ExecStopPost"] == [f"-+/bin/rmdir {entry}"]
    assert found["ReadWritePaths"] == [str(entry)]


def test_what_is_measured_is_what_the_server_reads() -> None:
    """A file of the host's may be another one each time that it is read, so it is read once."""
    measuring = settings_of(CVM / "tsqp-measure.service")
    (directory,) = measuring["RuntimeDirectory"]
    assert (measuring["RemainAfterExit"], measuring["UMask"]) == (["yes"], ["0077"])  # the directory stays
    (file,) = settings_of(SYSTEMD / "tsqp-server.service")["EnvironmentFile"]
    copy = f"/run/{directory}/{Path(file).name}"
    assert measuring["ExecStart"][0].split()[-3:] == ["measure", file, copy]
    assert settings_of(DROP_IN)["EnvironmentFile"] == ["", copy]  # the first resets the list of the unit
    # Its certificate is made inside, and evidence refuses another.
    assert not {"TSQP_TLS_CERT", "TSQP_TLS_KEY"} & environment_of(SYSTEMD / "server.env").keys()


@needs_systemd
def test_systemd_understands_the_measuring_unit(tmp_path: Path) -> None:
    unit = tmp_path / "tsqp-measure.service"
    text = (CVM / "tsqp-measure.service").read_text()
    unit.write_text(text.replace("/opt/tsqp/bin/python", shutil.which("true") or "/bin/true"))
    found = analyzed("verify", "--man=no", unit)
    assert (found.returncode, found.stderr) == (0, "")
    assert exposure(unit) <= MOST_EXPOSED


@needs_systemd
def test_systemd_understands_the_server_with_the_drop_in(tmp_path: Path) -> None:
    command = tmp_path / "tsqp"
    command.touch(0o755)
    shutil.copy(CVM / "tsqp-measure.service", tmp_path)
    measuring = tmp_path / "tsqp-measure.service"
    measuring.write_text(measuring.read_text().replace("/opt/tsqp/bin/python", str(command)))
    unit = tmp_path / "tsqp-server.service"
    whole = (SYSTEMD / "tsqp-server.service").read_text().replace(COMMAND, str(command))
    unit.write_text(f"{whole}\n{DROP_IN.read_text()}")
    found = analyzed("verify", "--man=no", unit, measuring)
    assert (found.returncode, found.stderr) == (0, "")
    assert exposure(unit) <= MOST_EXPOSED
