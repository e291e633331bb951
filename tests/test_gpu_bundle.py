"""What travels to a machine with a GPU: each package once, by its hash, for that machine, and a command that fits."""

from __future__ import annotations

import base64
import hashlib
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from scripts import gpu_bundle
from scripts.gpu_bundle import HAVE, MOST_BYTES, TESTED_WITH, blocks, download, report, wanted

ROOT = Path(__file__).parents[1]
HASH = f"    --hash=sha256:{'0' * 64}\n"
RUN = f"# A comment\nmsgspec==1.0 \\\n{HASH}torch==9 \\\n{HASH}Old.Name==2 ; python_version < '3.12' \\\n{HASH}"
DEV = f"{RUN}ruff==3 \\\n{HASH}" + "".join(f"{name}==1 \\\n{HASH}" for name in TESTED_WITH)


def text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")


def test_what_a_run_and_the_tests_need_and_the_machine_lacks() -> None:
    found = blocks(wanted(RUN, DEV, have=["Pytest_Timeout"]))
    assert found.keys() == {"msgspec", *TESTED_WITH} - {"pytest-timeout"}
    assert found["msgspec"] == f"msgspec==1.0 \\\n{HASH}"


def test_a_package_without_a_hash_cannot_be_asked_for() -> None:
    with pytest.raises(SystemExit, match=r"not in dev\.lock: pytest"):
        wanted(RUN, DEV.replace("pytest==1", "another==1"), have=[])


def test_of_the_locks_of_this_tree() -> None:
    found = blocks(wanted(text("run"), text("dev"), have=[]))
    assert {"msgspec", "pyzmq", "cryptography", "pytest", "hypothesis"} <= found.keys()
    assert not found.keys() & set(HAVE)
    assert all("--hash=sha256:" in block for block in found.values())


def wheel(folder: Path, name: str, tag: str) -> str:
    """An empty wheel; returns its SHA-256."""
    path = folder / f"{name}-1.0-{tag}.whl"
    about = f"{name}-1.0.dist-info"
    files = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in {**files, f"{about}/RECORD": record + f"{about}/RECORD,,\n"}.items():
            archive.writestr(file, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def test_wheels_are_for_that_machine_and_no_other(index: Path, tmp_path: Path) -> None:
    right = "cp312-cp312-manylinux_2_28_x86_64"
    digests = [wheel(index, "compiled", tag) for tag in (right, "cp311-cp311-manylinux_2_28_x86_64")]
    digests.append(wheel(index, "compiled", "cp312-cp312-manylinux_2_28_aarch64"))
    pure = wheel(index, "pure", "py3-none-any")
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in digests)
    download(f"compiled==1.0 {hashes}\npure==1.0 --hash=sha256:{pure}\n", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"compiled-1.0-{right}.whl",
        "pure-1.0-py3-none-any.whl",
    }


def test_a_wheel_of_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    wheel(index, "pure", "py3-none-any")
    with pytest.raises(subprocess.CalledProcessError):
        download(f"pure==1.0 --hash=sha256:{'0' * 64}\n", tmp_path / "out")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / ".gitignore").write_text("ignored\n")
    (root / "kept").write_bytes(bytes(1 << 20))
    (root / "ignored").write_bytes(bytes(MOST_BYTES))
    return root


def test_the_report_names_sizes_and_one_command(tmp_path: Path, tree: Path) -> None:
    wheels = tmp_path / ".gpu-wheels"
    wheels.mkdir()
    (wheels / "a-1.0-py3-none-any.whl").write_bytes(bytes(2 << 20))
    said = report(wheels, tree, "0123abc")
    assert said.startswith("1 wheels of 2.0 MiB beside 1.0 MiB of the tree.\n")
    line = said.splitlines()[-1]
    assert len(line) <= 2_000
    assert "TSQP_COMMIT=0123abc" in line
    assert "-m benchmarks.gpu_check" in line
    assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0


def test_what_is_compiled_there_is_kept_in_a_directory_of_ones_own(tmp_path: Path) -> None:
    """The home of a machine that was set up by others may be one in which others can write: no code is kept there."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$TSQP_CACHE"\n')
    python.chmod(0o700)
    line = gpu_bundle.command(Path(".gpu-wheels"), "0123abc").replace("/tmp/tsqp", str(tmp_path / "own"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for _ in range(2):  # a second time as well
        run = subprocess.run(
            ["bash", "-c", f"umask 0; {line}"], env=environment, capture_output=True, text=True, check=True
        )
        kept = Path(run.stdout.splitlines()[-1])
        assert kept.is_relative_to(tmp_path)
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_too_much_to_travel_is_refused_with_the_largest_wheels(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bundle, "MOST_BYTES", 2 << 20)
    (tmp_path / "large-1.0-py3-none-any.whl").write_bytes(bytes(3 << 19))
    with pytest.raises(SystemExit, match=r"2\.5 MiB of 2 that may travel; the largest: large-1\.0.*\(1\.5 MiB\)"):
        report(tmp_path, tree, "0123abc")
