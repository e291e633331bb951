from __future__ import annotations

import resource

import pytest

from tsqp.api import memory_limits


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files and the limit that are found; this process has mapped 1 GiB, and nothing else is known."""
    found = {"/proc/self/status": f"VmSize:\t{1 << 20} kB", "/proc/self/cgroup": "0::/a/b", "limit": "-1"}
    monkeypatch.setattr(memory_limits, "_lines", lambda path: found.get(str(path), "").splitlines())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (int(found["limit"]), -1))
    return found
