"""``open`` beside transformers, as a GPU is measured; here with a worker on the CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks import gpu_open


def result(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    run = ("--model", "synthetic:tiny", "--device", "cpu", "--tokens", "20", "--steps", "2", "--runs", "1")
    assert gpu_open.main([*run, *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_both_phases_are_measured_beside_the_peer_at_each_partition(capsys: pytest.CaptureFixture[str]) -> None:
    linear = result(capsys, "--partition", "linear", "--micro-batches", "1", "2")
    layer = result(capsys, "--partition", "layer")
    for found in (linear, layer):
        assert {found[phase]["partition"] for phase in ("prefill", "decode")} == {found["partition"]}
        assert all(found[phase]["ratio"] > 0 for phase in ("prefill", "decode"))
    assert [one["partition"] for one in (linear, layer)] == ["linear", "layer"]
    assert linear["micro_batches"] == linear["prefill"]["traffic_of_last_run"]["micro_batches"] == 1
    (other,) = linear["prefill_in_others"]
    assert other["micro_batches"] == other["prefill"]["traffic_of_last_run"]["micro_batches"] == 2
    assert (layer["micro_batches"], layer["prefill_in_others"]) == (None, [])


def test_without_a_device_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_open.main(["--partition", "layer"]) == 1
    assert capsys.readouterr() == ("", "gpu-open: there is no CUDA device here\n")
