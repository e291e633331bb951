"""Names of devices: what is there is taken, and what is not there is refused with its reason."""

from __future__ import annotations

import pytest
import torch

from tsqp.errors import OptionError
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.backends.device import backend_for, pick_device, pick_devices
from tsqp.untrusted.backends.torch_driver import cuda_runtime


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="use cpu, cuda or cuda:n"):
        pick_device(name)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("cpu,cuda:0", "the CPU or on CUDA devices, not on 'cpu,cuda:0'"),
        ("cpu,cpu", "the CPU or on CUDA devices"),
        ("cuda:0,1", "unknown device '1': use cpu, cuda or cuda:n, or cuda:0,cuda:1"),
        ("cuda:0,", "unknown device ''"),
        ("cuda:1,cuda,cuda:0", "device 'cuda:0' is named twice in 'cuda:1,cuda,cuda:0'"),
        ("cuda:0,cuda:3", "no device 'cuda:3' here: 3 CUDA devices"),
    ],
)
def test_devices_that_cannot_be_together_are_refused(names: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(OptionError, match=why):
        pick_devices(names)


def test_several_devices_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pick_devices("cuda:2,cuda:0") == [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert pick_devices("cpu") == [torch.device("cpu")]


def test_a_torch_without_the_cuda_runtime_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "7.5")
    cuda_runtime.cache_clear()
    with pytest.raises(
        OptionError, match=r"several devices in one worker need libcudart\.so\.7, and it cannot be used"
    ):
        cuda_runtime()


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
