"""``tsqp bench``: every kind runs and says what it must. Nothing here judges a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.bench.results import QUICK, TINY, is_measured, is_picture
from tests.commands import Result
from tsqp import LLM, ComputeConfig
from tsqp.bench.origin import MIB, OriginClient, origin_traffic
from tsqp.bench.pads import PadsReady
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.synthetic import SHAPES

pytestmark = pytest.mark.slow  # two minutes in all: each opens models, and measures them

Command = Callable[..., Result]


@pytest.mark.parametrize("transport", ["mem", "ipc", "tcp", "shm"])
def test_rpc(transport: str, tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "rpc.png"
    shape = ("--bytes", 4096, "--calls", 20, "--runs", 1)
    result = tsqp("bench", "rpc", "--transport", transport, *shape, "--json", "--plot", plot).json
    assert result["benchmark"] == "rpc"
    assert (result["transport"], result["bytes"]) == (transport, 4096)
    assert 0 < result["p50_us"] <= result["p99_us"]
    if transport == "shm":
        assert 0 < result["step_p50_us"] <= result["step_p99_us"]
    else:
        assert result["step_p50_us"] is result["step_p99_us"] is None
    assert result["ratio"] == pytest.approx(result["seconds"] / result["peer"]["seconds"])
    assert (result["idle_cpu_share"] is None) == (transport == "mem")  # one process has one share
    assert is_measured(result)
    assert is_picture(plot)


WITH_THREADS = ("prefill", "decode", "pipeline", "origin", "private", "guard", "offload", "serve", "load", "all")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_split(phase: str, tsqp: Command, tmp_path: Path) -> None:
    plot, trace = tmp_path / "plot.png", tmp_path / "trace.json"
    steps = ("--steps", 3) if phase == "decode" else ()
    run = tsqp("bench", phase, "-m", TINY, "--tokens", 20, *steps, *QUICK, "--plot", plot, "--trace", trace)
    result = run.json
    assert run.out.count("\n") == 1  # the table is on standard error
    assert "transformers" in result["peer"]["name"]
    assert "TFLOP/s" in run.err.split("transformers")[0]  # the limits come before the result
    assert (result["benchmark"], result["model"], result["runs"]) == (phase, TINY, 1)
    assert result["ratio"] == pytest.approx(result["seconds"] / result["peer"]["seconds"])
    assert result["limit_seconds"] > 0
    assert 0 <= result["communication_share"] <= 1
    assert result["traffic_of_last_run"]["forward_passes"] == (4 if phase == "decode" else 1)
    assert is_measured(result)
    assert is_picture(plot)
    assert json.loads(trace.read_text())["traceEvents"]


def test_what_is_measured_has_no_trace(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would turn compiled steps off."""
    traced: list[bool] = []
    run = PadsReady.run

    def noting(self: PadsReady, prompt: list[int], steps: int) -> tuple[float, float]:
        traced.append(self._llm.stats.trace is not None)
        return run(self, prompt, steps)

    monkeypatch.setattr(PadsReady, "run", noting)
    options = ("--protection", "masked", "--peer", "none", "--tokens", 5, "--steps", 2, "--runs", 2, "--threads", 1)
    found = tsqp("bench", "decode", "-m", TINY, *options, "--json")
    assert found.code == 0, found.err
    assert traced == [False, False, False, True]
    assert 0 < found.json["communication_share"] < 1


def test_split_without_a_peer_or_a_worker(tsqp: Command) -> None:
    run = tsqp("bench", "prefill", "-m", TINY, "--protection", "local", "--peer", "none", "--tokens", 5, *QUICK)
    assert run.json["peer"] is None
    assert run.json["ratio"] is None
    assert run.json["transport"] is None
    assert run.json["communication_share"] == 0


def test_pipeline(tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "pipeline.png"
    options = ("--transport", "ipc", "--tokens", 12, "--micro-batches", 3, "--worker-ms", 0.5)
    result = tsqp("bench", "pipeline", "--model", TINY, *options, *QUICK, "--plot", plot).json
    assert (result["micro_batches"], result["worker_ms"]) == (3, 0.5)
    assert result["calls"] == {"sequential": 25, "pipelined": 25}  # 4 calls, 2 layers, 3 parts, and the head
    assert result["ratio"] == pytest.approx(result["seconds"] / result["peer"]["seconds"])
    assert is_measured(result)
    assert is_picture(plot)


def test_origin(tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "origin.png"
    result = tsqp("bench", "origin", "--model", TINY, "--tokens", 24, *QUICK, "--plot", plot).json
    config = open_checkpoint(TINY).config
    origin = result["origin"]
    sent, received = origin_traffic(config, 24)
    assert origin["calls"] == 6 * config.num_layers + 2
    # The tensors, and for each call a message around them of at most 200 bytes.
    assert sent < origin["bytes_sent"] <= sent + 200 * origin["calls"]
    assert received < origin["bytes_received"] <= received + 200 * origin["calls"]
    assert result["speedup"] == pytest.approx(origin["seconds"] / result["best"]["seconds"])
    assert result["best"]["calls"] == result["best_float32"]["calls"] == 4 * config.num_layers + 1
    assert is_measured(result)
    assert is_picture(plot)


def test_the_origin_at_the_1b_shape_moves_what_its_reports_say() -> None:
    config = SHAPES["llama-3.2-1b"]
    sent, received = origin_traffic(config, 1024)
    assert sent / MIB == pytest.approx(3328, rel=0.01)
    assert received / MIB == pytest.approx(3657, rel=0.01)


def test_the_origin_computes_the_model() -> None:
    """Without a causal mask its last row is right only where nothing lies behind a row: for one token."""
    from tsqp.bench.child import Child
    from tsqp.wire.transport import new_ipc_address

    path = new_ipc_address().removeprefix("ipc://")
    with Child("tsqp.bench.origin_worker", TINY, path, "1") as child:
        client = OriginClient(TINY, child.address)
        logits = client.prefill([7])
        client.close()
    Path(path).unlink()
    with LLM(TINY, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        torch.testing.assert_close(logits, llm.logits([7])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_writes_what_the_readme_reads(tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import readme
    from benchmarks.words import CHINESE, ENGLISH

    from tsqp.bench import everything

    monkeypatch.setattr(everything, "RPC_TRANSPORTS", ("ipc",))
    monkeypatch.setattr(everything, "_variants", lambda run, first: [("", run)])
    shape = ("--tokens", 8, "--steps", 2, "--bytes", 4096, "--calls", 10)
    run = tsqp("bench", "all", "--models", TINY, "--results", tmp_path, *shape, *QUICK)
    kinds = ["rpc", "prefill", "decode", "private", "guard", "pipeline", "origin"]
    assert [result["benchmark"] for result in run.json["results"]] == kinds
    names = {"rpc-ipc", "prefill-tiny", "decode-tiny", "private-tiny", "guard-tiny", "pipeline", "origin"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "MODELS", {"tiny": "Tiny"})
    assert set(readme.charts()) == {"split-tiny", "private-tiny", "rpc", "pipeline", "origin"}
    for language, calls in ((ENGLISH, "calls"), (CHINESE, "次调用")):
        words = {**language, "Tiny": "Tiny"}
        private = readme.private_lines("tiny", words)
        assert sum(name in line for name in ("open", "verified", "masked") for line in private) >= 5
        assert len(readme.split_rows("tiny", "", words)) == 2
        assert f"98 {calls}" not in readme.origin_lines(words)[0]
        assert f"14 {calls}" in readme.origin_lines(words)[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rpc", "--transport", "pigeon"), "pigeon"),
        (("rpc", "--transport", "ipc", "--bytes", 7), "--bytes"),
        (("rpc", "--transport", "ipc", "--calls", 0), "--calls"),
        (("rpc", "--runs", 0), "--runs"),
        (("rpc", "--plot", "result.pdf"), "--plot"),
        (("prefill", "--tokens", 0), "--tokens"),
        (("prefill", "--plot", "/no/such/directory/x.png"), "--plot"),
        (("prefill", "--trace", "/no/such/directory/x.json"), "--trace"),
        (("prefill", "--peer", "nobody"), "nobody"),
        (("decode", "--steps", 0), "--steps"),
        (("pipeline", "--transport", "mem"), "process of its own"),
        (("pipeline", "--micro-batches", 1), "--micro-batches"),
        (("pipeline", "--worker-ms", -1), "--worker-ms"),
        (("origin", "--tokens", 0), "--tokens"),
        (("all", "--results", "/no/such/directory"), "--results"),
        (("all", "--plot", "x.png"), "plot"),
        (("all", "--model", TINY, "--plot", "x.png"), "--models in place of --model"),
        *(((kind, "--threads", -1), "--threads must be 1 or more") for kind in WITH_THREADS),
        *(((kind, "--threads", 0), "--threads must be 1 or more") for kind in WITH_THREADS),
        *(
            ((kind, "--checks", count), "--checks must be 1 to 16")
            for kind in ("guard", "private")
            for count in (-1, 0, 17)
        ),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[object, ...], words: str, tsqp: Command) -> None:
    result = tsqp("bench", *arguments)
    assert result.code == 2
    assert words in result.error
    assert len(result.err.splitlines()) == 1  # nothing has been measured


@pytest.mark.parametrize(("missing", "option"), [("matplotlib", "--plot"), ("transformers", "--peer")])
def test_a_missing_library_is_one_line(
    missing: str, option: str, tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    value = tmp_path / "x.png" if option == "--plot" else missing
    result = tsqp("bench", "prefill", "-m", TINY, option, value)
    assert result.code == 2
    assert f"{option}" in result.error
    assert "tsqp[bench]" in result.error
