"""Locked memory, as Linux tells of it, in processes of their own: a lock stays for a process's life."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import LIMIT_S
from tsqp.errors import OptionError
from tsqp.tee.memory import lock_memory, mapping_flags, may_lock_all, memory_is_locked, swap_bytes, swap_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mlockall and /proc are Linux's")

LOCK = """
import ctypes
from tsqp.tee.memory import lock_memory, mapping_flags, memory_is_locked
early = ctypes.create_string_buffer(1 << 20)
assert not memory_is_locked()
lock_memory()
late = ctypes.create_string_buffer(1 << 20)
for held in (early, late):
    assert "lo" in mapping_flags(ctypes.addressof(held) + (1 << 19)), "not locked"
print(memory_is_locked())
"""

# A limit that would do for the moment is refused too: the process would end at a later request for memory.
LIMITED = """
import ctypes, resource
ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK: fails for users, who have none
most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
most = 1 << 33 if most == resource.RLIM_INFINITY else min(most, 1 << 33)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
import os, sys
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def status(path: Path, capabilities: int) -> Path:
    path.write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\n")
    return path


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, most))


@pytest.mark.skipif(not may_lock_all(), reason="this process may not lock all of its memory")
def test_memory_taken_before_and_after_is_locked() -> None:
    result = python(LOCK)
    assert (result.returncode, result.stdout.split()) == (0, ["True"]), result.stderr


def test_a_limit_is_refused_in_one_line_that_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 8 << 20)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("it was tried all the same"))
    with pytest.raises(OptionError) as refused:
        lock_memory(status(tmp_path / "status", 0))
    text = str(refused.value)
    assert "8192 KiB" in text
    assert "LimitMEMLOCK=infinity" in text
    assert "\n" not in text
    assert refused.value.fields == ("compute.lock_memory",)


def test_a_limit_that_would_do_for_now_is_refused_of_a_real_process() -> None:
    script = "from tsqp.tee.memory import lock_memory; lock_memory()"
    result = python(LIMITED, script)
    assert result.returncode != 0
    assert "OptionError" in result.stderr
    assert "ulimit -l unlimited" in result.stderr


def test_an_unlimited_limit_or_the_capability_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, resource.RLIM_INFINITY)
    assert may_lock_all(status(tmp_path / "none", 0))
    limited(monkeypatch, 1 << 20)
    assert may_lock_all(status(tmp_path / "ipc_lock", 1 << 14))
    assert not may_lock_all(status(tmp_path / "others", 0xFFFF & ~(1 << 14)))
    assert not may_lock_all(tmp_path / "missing")


def test_this_process_is_not_locked_and_a_page_of_it_has_flags() -> None:
    assert not memory_is_locked()
    assert mapping_flags(0) == set()


def test_flags_are_those_of_the_mapping_that_has_the_address(tmp_path: Path) -> None:
    maps = tmp_path / "smaps"
    maps.write_text(
        "1000-2000 rw-p 00000000 00:00 0 \nSize:   4 kB\nVmFlags: rd wr lo \n"
        "2000-3000 rw-p 00000000 00:00 0 /a-b\nSize:   4 kB\nVmFlags: rd dd wf \n"
    )
    assert mapping_flags(0x1FFF, maps) == {"rd", "wr", "lo"}
    assert mapping_flags(0x2000, maps) == {"rd", "dd", "wf"}
    assert mapping_flags(0x3000, maps) == set()
    assert mapping_flags(0x1000, tmp_path / "missing") == set()
    assert not memory_is_locked(tmp_path / "missing")


def test_swap_is_summed_and_said(tmp_path: Path) -> None:
    swaps, none = tmp_path / "swaps", tmp_path / "none"
    heading = "Filename\tType\tSize\tUsed\tPriority\n"
    swaps.write_text(heading + "/dev/a partition 1000000 0 -2\n/dev/b partition 1000000 0 -3\n")
    none.write_text(heading)
    assert swap_bytes(swaps) == 2_000_000 << 10
    assert swap_bytes(none) == 0
    assert swap_bytes(tmp_path / "missing") is None
    assert swap_state(none)[0]
    safe, line = swap_state(swaps, status(tmp_path / "status", 0))
    assert not safe
    assert line.startswith("swap: 2.0 GB is on; --lock-memory is")
    assert not swap_state(tmp_path / "missing")[0]
