from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are measured with matrices that take no time."""
    from tsqp.bench import ceilings

    monkeypatch.setattr(ceilings, "OUT", 64)
    monkeypatch.setattr(ceilings, "WEIGHTS_BYTES", 2**18)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "TRY_FOR_S", 0.0)
    monkeypatch.setattr("tsqp.bench.guard.WEIGHTS_BYTES", 2**16)
