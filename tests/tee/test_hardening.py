"""What a hardened process is safe from, seen from real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import LIMIT_S
from tests.families import tiny_model
from tsqp.tee.hardening import hardening_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")

HARDEN = "from tsqp.tee.hardening import current_hardening, harden_process; "

# Root may read everything. Without CAP_SYS_PTRACE it is a user like any other, and so are its children.
AS_A_USER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 19, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_PTRACE: fails for users, who have none
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""

# Starts a victim, tries to open its memory and says what came of it.
ATTACKER = """
import subprocess, sys
capabilities = next(line for line in open("/proc/self/status") if line.startswith("CapEff"))
if int(capabilities.split()[1], 16) >> 19 & 1:
    sys.exit("privileged")
script = sys.argv[1] + "print(flush=True); input()"
with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
    victim.stdout.readline()
    try:
        open(f"/proc/{victim.pid}/mem", "rb").close()
        print("opened")
    except PermissionError:
        print("refused")
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def attack(victim: str) -> str:
    """What a process of the same user comes to that tries to open the memory of one that runs ``victim``."""
    result = python(AS_A_USER, ATTACKER, victim)
    if "privileged" in result.stderr:
        pytest.skip("this machine does not let root give up CAP_SYS_PTRACE")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_memory_cannot_be_opened_by_another_process_of_the_user() -> None:
    if attack("") == "refused":
        pytest.skip("this machine lets no process open another's memory, hardened or not")
    assert attack(HARDEN + "harden_process(); ") == "refused"


def test_it_says_what_holds() -> None:
    result = python(HARDEN + "print(current_hardening().undumpable, harden_process() == current_hardening())")
    assert result.stdout.split() == ["False", "True"]
    result = python(HARDEN + "print(harden_process())")
    assert result.stdout.strip() == "Hardening(undumpable=True, no_core=True)"


def test_the_core_limit_is_zero_whatever_it_was() -> None:
    raised = "import resource as r; r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2); "
    result = python(raised + HARDEN + "harden_process(); print(r.getrlimit(r.RLIMIT_CORE))")
    assert result.stdout.strip() == "(0, 0)"


def test_a_process_started_from_it_is_an_ordinary_one() -> None:
    child = "import sys; " + HARDEN + "print(current_hardening())"
    result = python(
        "import subprocess, sys; " + HARDEN + "harden_process(); subprocess.run([sys.executable, '-c', sys.argv[1]])",
        child,
    )
    assert result.stdout.strip() == "Hardening(undumpable=False, no_core=True)"


def test_a_worker_started_from_it_works() -> None:
    run = """
from tsqp import LLM, ComputeConfig
with LLM(sys.argv[1], protection="open", compute=ComputeConfig(dtype="float32", threads=1)) as llm:
    print(llm.generate([[1, 2, 3]])[0].finish_reason, llm.worker_pid is not None)
"""
    result = python("import sys; " + HARDEN + "harden_process()\n" + run, str(tiny_model("llama").directory))
    assert (result.returncode, result.stdout.split()) == (0, ["length", "True"]), result.stderr


@pytest.mark.parametrize(
    ("scope", "who"), [("0", "every process"), ("1", "its ancestors"), ("2", "administrators"), ("3", "nobody")]
)
def test_the_state_names_who_may_attach(tmp_path: Path, scope: str, who: str) -> None:
    (tmp_path / "scope").write_text(scope + "\n")
    state = hardening_state(tmp_path / "scope")
    assert who in state
    assert f"ptrace_scope {scope}" in state
    assert "not isolation" in state
    assert "\n" not in state


def test_the_state_of_a_hardened_process() -> None:
    result = python("from tsqp.tee.hardening import *; harden_process(); print(hardening_state())")
    assert result.stdout.startswith("this process cannot be dumped or attached to, except by root")
    assert "no Yama" in hardening_state(Path("/nonexistent"))
