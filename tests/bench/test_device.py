"""Benchmarks on a device, with none here: it arrives in worker and peer, names the result, and is refused early."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.bench.results import QUICK, TINY
from tests.commands import Result
from tsqp import LLM
from tsqp.api.config import RunConfig, WorkerConfig
from tsqp.bench import ceilings, device, everything, installed_peers, load_targets, offload, private, serve, split
from tsqp.bench.everything import Everything, bench_all
from tsqp.bench.load_setup import Load, server_options
from tsqp.bench.offload import MODELS, Case, Effort, bench_offload
from tsqp.bench.opened import opened
from tsqp.bench.workload import Workload
from tsqp.launch.local import LocalWorker

Command = Callable[..., Result]
ON = "cuda:1"
FIGURES = {"devices": [ON], "gpu": {"device": "a fake"}, "gpu_ceilings": {"copy_bytes_per_s": 1}}


class Seen:
    """What was asked for on a device, while all of it was done on the CPU."""

    def __init__(self) -> None:
        self.workers: list[tuple[str, str]] = []  # protection and device
        self.peers: list[tuple[str, str]] = []
        self.rates: list[str] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A machine with two devices, which are the CPU."""
    found, rates = Seen(), ceilings.ceilings
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("tsqp.bench.gpu.described", lambda _: FIGURES["gpu"])
    monkeypatch.setattr("tsqp.bench.gpu_ceilings.ceilings", lambda _: FIGURES["gpu_ceilings"])

    def open_here(run: RunConfig, console: Console) -> LLM:
        found.workers.append((run.protection, run.worker.device))
        return opened(replace(run, worker=replace(run.worker, device="cpu")), console)

    def rates_here(dtype: str, name: str = "cpu", threads: int | None = None) -> dict[str, Any]:
        found.rates.append(name)
        return {**rates(dtype, "cpu", threads), "device": name}

    class PeerHere:
        """One that takes no time."""

        name = "transformers"

        def __init__(self, model: str, dtype: str, where: str, threads: int) -> None:
            found.peers.append((where, dtype))

        def __enter__(self) -> PeerHere:
            return self

        def __exit__(self, *_: object) -> None:
            """There is nothing to end."""

        def run_together(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
            return 1.0, 1.0 * steps

        def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
            return self.run_together([tokens], steps)

    class WorkerHere(LocalWorker):
        def __init__(self, model: str, *, device: str, **more: Any) -> None:
            found.workers.append(("a worker", device))
            super().__init__(model, device="cpu", **more)

    for module in (split, private, offload, serve):
        monkeypatch.setattr(module, "opened", open_here)
    for module in (split, private, offload):
        monkeypatch.setattr(module, "ceilings", rates_here)
    for module in (split, installed_peers):
        monkeypatch.setattr(module, "TransformersPeer", PeerHere)
    monkeypatch.setattr(private, "LocalWorker", WorkerHere)
    return found


def test_names_of_devices() -> None:
    assert [device.first_device(names) for names in ("cpu", "cuda", "cuda:1,cuda:0")] == ["cpu", "cuda", "cuda:1"]
    assert [device.prefix(names) for names in ("cpu", "cuda", "cuda:1,cuda:0")] == ["", "gpu-", "gpu-"]
    assert device.device_figures("cpu") == {}


@pytest.mark.parametrize("kind", ["prefill", "decode", "private", "offload", "serve", "load", "all"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(
    kind: str, tsqp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("tsqp.untrusted.backends.device.why_none", lambda _: "the driver is too old")
    result = tsqp("bench", kind, "--device", "cuda")
    assert result.code == 2
    assert result.out == ""
    assert result.err.strip().splitlines() == [
        "tsqp: error: there is no device 'cuda' here: 0 CUDA devices found; the driver is too old"
    ]


@pytest.mark.slow
def test_worker_and_peer_are_on_the_device(seen: Seen, tsqp: Command) -> None:
    options = ("-m", TINY, "--tokens", 8, "--device", ON, *QUICK)
    result = tsqp("bench", "prefill", *options, "--peer", "transformers").json
    assert seen.workers == [("open", ON)]
    assert seen.peers == [(ON, "bfloat16")]
    assert set(seen.rates) == {ON}
    assert {name: result[name] for name in FIGURES} == FIGURES


def test_of_several_devices_the_peer_has_the_first(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(run: RunConfig, _: Console) -> None:
        seen.workers.append((run.protection, run.worker.device))
        raise Stopped

    monkeypatch.setattr(split, "opened", stop)
    run = RunConfig(TINY, "open", WorkerConfig(device="cuda:1,cuda:0"))
    with pytest.raises(Stopped):
        split.bench_split(run, Workload(8, 0, 1), "transformers", None, Console(quiet=True))
    assert (seen.workers, seen.rates) == ([("open", "cuda:1,cuda:0")], [ON])


@pytest.mark.slow
def test_a_worker_elsewhere_says_nothing_of_this_machine(
    seen: Seen, tsqp: Command, start_worker: Callable[..., str]
) -> None:
    address = start_worker(TINY, "ipc")
    options = ("-m", TINY, "--tokens", 8, "--worker", address, "--dtype", "float32", "--peer", "none", *QUICK)
    result = tsqp("bench", "prefill", *options).json
    assert "gpu" not in result
    assert set(seen.rates) == {"cpu"}


@pytest.mark.slow
def test_private_modes_are_on_the_device_and_the_file_says_so(seen: Seen, tsqp: Command, tmp_path: Path) -> None:
    options = ("-m", TINY, "--tokens", 8, "--steps", 1, "--mode", "verified", "--device", ON, *QUICK)
    run = tsqp("bench", "private", *options, "--results", tmp_path, "--dirty-ok")
    assert run.code == 0, run.err
    assert seen.workers[:2] == [("open", ON), ("a worker", ON)]
    assert set(seen.rates) == {ON}
    (path,) = tmp_path.iterdir()
    assert path.name == "gpu-private-tiny-open-verified.json"
    result = json.loads(path.read_text())
    assert (result["device"], result["gpu"], result["gpu_ceilings"]) == (ON, FIGURES["gpu"], FIGURES["gpu_ceilings"])


@pytest.mark.slow
def test_offload_has_its_worker_on_the_device_and_its_trusted_side_on_the_cpu(
    seen: Seen, tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(offload, "_open_peer", lambda *_: None)
    case = Case("prefill-tiny", "tiny", 1, 8, 0)
    result = bench_offload([case], Effort(1, 1, 1, ON), Console(quiet=True))
    assert dict(seen.workers) == {"local": "cpu", "masked": ON}
    assert set(seen.rates) == {"cpu"}
    assert result["device"] == ON
    monkeypatch.setattr(offload, "CASES", (case,))
    run = tsqp("bench", "offload", "--case", case.name, "--device", ON, "--results", tmp_path, "--dirty-ok", *QUICK)
    assert run.code == 0, run.err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-offload.json"]
    assert run.json["gpu"] == FIGURES["gpu"]


def test_a_server_and_its_peer_are_on_the_device(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    run, load = RunConfig(TINY, "open", WorkerConfig(device=ON)), Load(pads=2560)
    for mode in ("open", "masked"):
        options = server_options(run, mode, load)
        assert options[options.index("--device") + 1] == ON
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(installed_peers, "LlamaCppPeer", None)  # its package is for the CPU: it is not asked for
    with ExitStack() as stack:
        console = Console(quiet=True)
        assert [one.name for one in load_targets.peers(run, load, stack, console)] == [
            "transformers, one batch, no server"
        ]
        assert serve._peers(run, serve.Traffic(), stack, console).keys() == {"transformers"}
    assert seen.peers == [(ON, "bfloat16")] * 2


@pytest.mark.parametrize(("devices", "layer"), [("cpu", True), (ON, True), ("cuda:0,cuda:1", False)])
def test_all_measures_what_the_device_computes(
    devices: str, layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    asked: list[tuple[str, str, str]] = []

    def measured(kind: str) -> Any:
        return lambda *_: {"benchmark": kind}

    def split_of(run: RunConfig, *_: object) -> dict[str, Any]:
        asked.append((run.worker.device, run.compute.partition, run.compute.dtype))
        return {"prefill": {"benchmark": "prefill"}, "decode": {"benchmark": "decode"}}

    def private_of(run: RunConfig, *_: object) -> dict[str, Any]:
        asked.append((run.worker.device, "", "private"))
        return {"benchmark": "private"}

    for name in ("rpc", "guard", "pipeline", "origin"):
        monkeypatch.setattr(everything, f"bench_{name}", measured(name))
    monkeypatch.setattr(everything, "bench_split", split_of)
    monkeypatch.setattr(everything, "bench_private", private_of)
    monkeypatch.setattr(everything, "table", lambda _: "")
    monkeypatch.setattr(everything, "check_tree", lambda **_: None)
    run, prefix = RunConfig(protection="open", worker=WorkerConfig(device=devices)), device.prefix(devices)
    setup = Everything((TINY,), run, Workload(8, 1, 1), 8, 1, tmp_path, prefix, dirty_ok=True)
    results = bench_all(setup, Console(quiet=True))
    assert {one for one, _, _ in asked} == {devices}
    assert [partition for _, partition, _ in asked].count("layer") == int(layer)
    names = {path.stem for path in tmp_path.iterdir()}
    assert {f"{prefix}rpc-shm", f"{prefix}prefill-tiny", f"{prefix}private-tiny", f"{prefix}guard-tiny"} <= names
    assert all(name.startswith(prefix) for name in names)
    assert {"pipeline", "origin"} <= {result["benchmark"] for result in results} if devices == "cpu" else True
    assert (f"{prefix}origin" in names) == (devices == "cpu")
    assert all(("gpu" in result) == (devices != "cpu") for result in results)
