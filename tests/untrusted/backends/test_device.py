"""Names of devices: what is there is taken, and what is not there is refused with its reason."""

from __future__ import annotations

import pytest
import torch

from tsqp.errors import OptionError
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.backends.device import backend_for, pick_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="use cpu, cuda or cuda:n"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda:0,cuda:1", "cuda:0,1", "cpu,cuda"])
def test_several_devices_are_refused_as_such(name: str) -> None:
    with pytest.raises(OptionError, match=r"one device, not on '.*,.*': start a worker for each"):
        pick_device(name)


def test_a_device_that_is_not_there_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("tsqp.untrusted.backends.device.why_none", lambda _: "the driver is too old")
    with pytest.raises(OptionError, match=r"no device 'cuda' here: 0 CUDA devices found; the driver is too old"):
        pick_device("cuda")


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(OptionError, match="'cuda:2' here: 2 CUDA devices"):
        pick_device("cuda:2")


def test_the_cpu_has_its_backend() -> None:
    assert isinstance(backend_for(pick_device("cpu")), CpuBackend)
