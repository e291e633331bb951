"""The shared memory under limits on addresses: it fits by default, and an error says which option chooses it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands import Home
from tests.families import tiny_model

RUN = ("generate", "hello", "--model", str(tiny_model("llama").directory), "-n", "2", "--threads", "1")
LOADED = """
import torch, tsqp.api.llm, tsqp.api.assemble
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize:")))
"""


@pytest.fixture(scope="module")
def limit() -> list[str]:
    """A shell that leaves 2 GiB beside the libraries: as much as a small run needs, and half of the usual arena."""
    loaded = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    return ["sh", "-c", f'ulimit -v {int(loaded.stdout) + (2 << 20)}; exec "$@"', "limited"]


@pytest.mark.parametrize("protection", ["open", pytest.param("masked", marks=pytest.mark.slow)])
def test_what_fits_is_the_default(home: Home, limit: list[str], protection: str) -> None:
    home.before = limit
    result = home.run(*RUN, "--protection", protection)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_what_does_not_fit_is_named_by_its_option(home: Home, limit: list[str]) -> None:
    home.before = limit
    result = home.run(*RUN, "--protection", "open", "--arena", "4GiB")
    assert result.code == 1
    assert "an arena of 4294967296 bytes" in result.error
    assert "--arena" in result.error
    assert home.leftovers() == []


@pytest.mark.slow
def test_a_limit_of_another_worker_is_not_known_here(home: Home, limit: list[str]) -> None:
    home.before = limit
    with home.worker("--model", RUN[3]) as (_, address):
        home.before = []
        asked = (*RUN, "--protection", "open", "--worker", address)
        refused = home.run(*asked, "--arena", "4G")
        assert refused.code == 1
        assert "the worker refused the shared memory" in refused.error
        assert "--arena" in refused.error
        assert home.run(*asked, TSQP_ARENA="256M").code == 0


@pytest.mark.slow
def test_two_of_them_fit_too(home: Home, limit: list[str]) -> None:
    home.before = limit
    with home.worker("--model", RUN[3], "--dtype", "field", "--threads", "1") as (_, dealer):
        result = home.run(*RUN, "--pad-source", f"dealer={dealer}", "--dealer-no-separation")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_the_doctor_needs_no_large_one(home: Home, limit: list[str]) -> None:
    home.before = limit
    findings = {finding["what"]: finding["state"] for finding in home.run("doctor", "--json").json["findings"]}
    assert findings["transport shm"] == "ok"
