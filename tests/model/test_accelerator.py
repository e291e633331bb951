"""What there is of CUDA is named, and what is missing as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tsqp.model.accelerator import CudaDevice, TorchCuda, described, driver_version, why_none


@dataclass
class FakeCuda:
    built_for: str | None = "13.0"
    why: str | None = None
    found: list[CudaDevice] = field(default_factory=lambda: [CudaDevice("NVIDIA H200", (9, 0), 139 << 30)])

    def trouble(self) -> str | None:
        return self.why

    def driver(self) -> str:
        return "580.65.06"

    def devices(self) -> list[CudaDevice]:
        return self.found

    def exact_kernel(self, index: int) -> str:
        return "SomeKernel"


def test_driver_device_capability_and_kernel_are_named() -> None:
    assert why_none(FakeCuda()) is None
    text = described(FakeCuda())
    for words in ("580.65.06", "CUDA 13.0", "cuda:0 NVIDIA H200", "capability 9.0", "139 GiB", "by SomeKernel"):
        assert words in text
    assert "older" not in text


def test_several_devices_are_listed_and_can_be_one_workers() -> None:
    text = described(FakeCuda(found=[CudaDevice("A", (9, 0), 1), CudaDevice("B", (9, 0), 1)]))
    assert "cuda:0 A" in text
    assert "cuda:1 B" in text
    assert text.endswith("a worker uses --device cuda:n, or all of them: cuda:0,cuda:1")
    assert described(FakeCuda()).endswith("a worker uses --device cuda:n")


def test_an_old_device_is_said_to_be_one() -> None:
    text = described(FakeCuda(found=[CudaDevice("A", (9, 0), 1), CudaDevice("B", (7, 5), 1)]))
    assert "older" not in text.split("cuda:1")[0]
    assert "older" in text.split("cuda:1")[1]


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize("why", [TOO_OLD, "Found no NVIDIA driver on your system."])
def test_a_driver_that_is_missing_or_too_old_is_named(why: str) -> None:
    assert why_none(FakeCuda(why=why)) == why


def test_a_torch_without_cuda_is_named_whatever_the_driver() -> None:
    assert why_none(FakeCuda(built_for=None)) == "this torch is built without CUDA"


@pytest.mark.parametrize("error", [RuntimeError(f"{TOO_OLD}\nPlease update"), AssertionError(TOO_OLD)])
def test_what_torch_says_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert TorchCuda().trouble() == TOO_OLD


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", "unknown"),
    ],
)
def test_the_drivers_version_is_that_of_its_module(tmp_path: Path, text: str, version: str) -> None:
    path = tmp_path / "version"
    assert driver_version(path) == "unknown"
    path.write_text(text)
    assert driver_version(path) == version
