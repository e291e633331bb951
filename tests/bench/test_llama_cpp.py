"""The peer llama.cpp has our weights, computes the same model, and does the work that its times are said to be of."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from rich.console import Console

from tests.bench.results import QUICK, TINY, is_measured, is_picture
from tests.commands import Result
from tests.families import FAMILIES, random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import RunConfig
from tsqp.bench import gguf_copy as copies
from tsqp.bench import llama_cpp, llama_server
from tsqp.bench.gguf_copy import gguf_copy, write_gguf
from tsqp.bench.installed_peers import llama_cpp_peers, transformers_peer
from tsqp.bench.latency import Answer, rate_together
from tsqp.bench.llama_cpp import LlamaCppPeer
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.model import RopeConfig
from tsqp.errors import UnsupportedModel, WorkerFailed

pytestmark = pytest.mark.slow  # two minutes in all: each opens models, and measures them

Command = Callable[..., Result]

WITHOUT_WINDOWS = [family for family in FAMILIES if "window" not in family]
WORK = Workload(tokens=40, steps=32, runs=1)
PAUSE_S = 0.02


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(copies, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "llama.cpp"


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def tiny_peer(quiet: Console) -> Iterator[LlamaCppPeer]:
    with LlamaCppPeer(TINY, "float32", WORK, 1, quiet) as peer:
        yield peer


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_the_file_is_the_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny_model(family).directory))
    write_gguf(original, GGMLQuantizationType[kind], tmp_path / "copy.gguf")
    copy = open_checkpoint(str(tmp_path / "copy.gguf"))
    assert copy.config == original.config
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    for name, shape in original.shapes.items():
        expected = original.tensor(name).to(torch.float32 if len(shape) == 1 else dtype)
        assert copy.tensor(name).dtype == expected.dtype, name
        assert torch.equal(copy.tensor(name), expected), name


def test_numbers_that_have_defaults_are_written(tmp_path: Path) -> None:
    original = open_checkpoint(TINY)
    rope = RopeConfig(500_000.0, "llama3", factor=32.0, original_max_positions=4096)
    original.config = replace(original.config, rope=rope, rms_norm_eps=1e-3, max_positions=777)
    write_gguf(original, GGMLQuantizationType.F32, tmp_path / "copy.gguf")
    assert open_checkpoint(str(tmp_path / "copy.gguf")).config == original.config


def test_8_bit_blocks_are_those_of_each_row(tmp_path: Path) -> None:
    original = open_checkpoint(TINY)
    write_gguf(original, GGMLQuantizationType.Q8_0, tmp_path / "copy.gguf")
    copy = open_checkpoint(str(tmp_path / "copy.gguf"))
    for name, shape in original.shapes.items():
        values = original.tensor(name).float()
        if len(shape) == 1:
            assert torch.equal(copy.tensor(name), values)
            continue
        blocks = gguf.quantize(values.numpy(), GGMLQuantizationType.Q8_0)
        assert torch.equal(copy.tensor(name), torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType.Q8_0)))


def test_rows_that_blocks_do_not_divide_stay_in_16_bits() -> None:
    assert copies._kind((64, 96), GGMLQuantizationType.Q8_0) == GGMLQuantizationType.Q8_0
    assert copies._kind((96, 80), GGMLQuantizationType.Q8_0) == GGMLQuantizationType.F16


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_llama_cpp_computes_the_model(family: str, quiet: Console) -> None:
    """Each of its tokens is transformers' likeliest after the same ones: by 0.002 at most, for its cache has 16 bits.

    Q and K in the wrong order of rows miss by 0.1 and more, of logits that spread by 0.4.
    """
    model = tiny_model(family)
    with LlamaCppPeer(str(model.directory), "float32", WORK, 1, quiet) as peer:
        for seed in range(3):
            prompt = random_tokens(WORK.tokens, seed)
            answer = peer.complete(prompt, WORK.steps)["tokens"]
            logits = model.logits(prompt + answer)[len(prompt) - 1 : -1]
            missed_by = logits.amax(dim=1) - logits[range(len(answer)), answer]
            assert len(answer) == WORK.steps
            assert missed_by.max() < 2e-3


@pytest.mark.slow
def test_llama_cpp_answers_as_the_default_model_does(quiet: Console) -> None:
    prompts = ["What is the capital of France?", "def fibonacci(n):", "Once upon a time"]
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    with (
        LLM("default", protection="local", compute=ComputeConfig(dtype="float32", threads=1)) as llm,
        LlamaCppPeer(locate("default"), "float32", Workload(96, 32, 1), 1, quiet) as peer,
    ):
        for ours in llm.generate(prompts, params):
            assert peer.complete(list(ours.prompt_token_ids), 32)["tokens"] == list(ours.token_ids)


def test_sliding_windows_are_refused(cache: Path, quiet: Console) -> None:
    """llama.cpp would compute these models without them."""
    with pytest.raises(UnsupportedModel, match="sliding windows"):
        gguf_copy(open_checkpoint(str(tiny_model("qwen2-window").directory)), "bfloat16", quiet)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_file_is_written_once(cache: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(TINY)
    first = gguf_copy(checkpoint, "bfloat16", quiet)
    eight_bits = gguf_copy(checkpoint, "int8", quiet)
    assert first != eight_bits
    monkeypatch.setattr(copies, "write_gguf", pytest.fail)
    assert gguf_copy(checkpoint, "bfloat16", quiet) == first
    assert {path.name for path in cache.iterdir()} == {"lock", first.name, eight_bits.name}


def test_a_file_half_written_is_not_used(cache: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(TINY)
    whole = gguf_copy(checkpoint, "bfloat16", quiet)
    expected = whole.read_bytes()
    whole.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "quantize", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf_copy(checkpoint, "bfloat16", quiet)
    assert [path.name for path in cache.iterdir()] == ["lock"]  # gigabytes, for a model of some size
    assert gguf_copy(checkpoint, "bfloat16", quiet).read_bytes() == expected


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("decode", "--steps", 3), "BF16"),
        (("prefill", "--dtype", "int8"), "Q8_0"),
        (("decode", "--steps", 3, "--protection", "masked"), "Q8_0"),
    ],
)
def test_bench(options: tuple[object, ...], kind: str, tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    run = ("bench", *options, "-m", TINY, "--peer", "llama.cpp", "--tokens", 20)
    result = tsqp(*run, *QUICK, "--plot", plot).json
    assert result["peer"]["name"].startswith(f"llama.cpp {kind}, xllamacpp ")
    assert result["peer"]["seconds"] > 0
    assert result["ratio"] == pytest.approx(result["seconds"] / result["peer"]["seconds"])
    assert is_measured(result)
    assert is_picture(plot)


def test_the_server_has_our_threads_and_waits_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passive waits, which our own processes have, would double its times."""
    settings = SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())
    policies = []

    def server(_: SimpleNamespace) -> SimpleNamespace:
        policies.append(os.environ.get("OMP_WAIT_POLICY"))
        return SimpleNamespace(listening_address="http://127.0.0.1:1")

    library: Any = SimpleNamespace(CommonParams=lambda: settings, Server=server)
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr("sys.argv", ["", "copy.gguf", "57", "3", "4"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO()))
    llama_server.main()
    assert policies == [None]
    assert (settings.model.path, settings.n_ctx, settings.n_parallel) == ("copy.gguf", 4 * 57, 4)
    assert settings.cpuparams.n_threads == settings.cpuparams_batch.n_threads == 3


def test_the_times_are_those_of_the_work(tiny_peer: LlamaCppPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], int]] = []

    def answer(tokens: list[int], count: int) -> dict[str, Any]:
        asked.append((tokens, count))
        counts = {"cache_n": 0, "prompt_n": len(tokens), "predicted_n": count}
        return {"timings": {**counts, "prompt_ms": 1500.0, "predicted_ms": 250.0}}

    monkeypatch.setattr(tiny_peer, "complete", answer)
    assert tiny_peer.run([1, 2, 3], 4) == (1.5, 0.25)
    assert asked == [([1, 2, 3], 5)]  # the first token ends the prompt's time; the others are the steps


@pytest.mark.parametrize("wrong", [{"cache_n": 2}, {"prompt_n": 1}, {"predicted_n": 4}])
def test_other_work_is_no_measurement(
    wrong: dict[str, int], tiny_peer: LlamaCppPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = {"cache_n": 0, "prompt_n": 3, "predicted_n": 5, "prompt_ms": 1.0, "predicted_ms": 1.0}
    monkeypatch.setattr(tiny_peer, "complete", lambda *_: {"timings": {**timings, **wrong}})
    with pytest.raises(WorkerFailed, match="other work"):
        tiny_peer.run([1, 2, 3], 4)


class Staggered(BaseHTTPRequestHandler):
    """A server whose answer to prompt [2, ...] begins after two tokens of the other one; each is of five tokens."""

    protocol_version = "HTTP/1.1"
    two_came, other_began = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        late = asked["prompt"][0] == 2
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if late:
            self.two_came.wait(60)
        for token in range(5):
            self._say(tokens=[token])
            time.sleep(PAUSE_S)
            if token == (0 if late else 1):
                (self.other_began if late else self.two_came).set()
                self.other_began.wait(60)
        timings = {"cache_n": 0, "prompt_n": len(asked["prompt"]), "predicted_n": asked["n_predict"]}
        self._say(tokens=[], timings={**timings, "predicted_ms": 1e9})
        self.wfile.write(b"0\r\n\r\n")

    def _say(self, **event: Any) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_rate_leaves_out_the_prompts_of_other_slots(monkeypatch: pytest.MonkeyPatch, quiet: Console) -> None:
    seen: list[Answer] = []

    def rate(answers: list[Answer]) -> float:
        seen.extend(answers)
        return rate_together(answers)

    monkeypatch.setattr(llama_cpp, "rate_together", rate)
    with ThreadingHTTPServer(("127.0.0.1", 0), Staggered) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(llama_cpp, "gguf_copy", lambda *_: None)
        monkeypatch.setattr(llama_cpp, "Child", lambda *_: SimpleNamespace(address=address, close=lambda: None))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            with LlamaCppPeer(TINY, "float32", WORK, 1, quiet, slots=2) as peer:
                assert peer.rate([[1, 1], [2, 2]], 4) > 0
        finally:
            server.shutdown()
    early, late = (answer.arrived_s for answer in seen)
    assert len(early) == len(late) == 5
    assert early[1] < late[0] < early[-1]


def test_an_error_in_mid_stream_is_one_of_the_peer(monkeypatch: pytest.MonkeyPatch, tiny_peer: LlamaCppPeer) -> None:
    reply = Mock(iter_lines=lambda: [b'data: {"tokens": [1]}', b'data: {"error": {"message": "no room"}}'])
    monkeypatch.setattr(tiny_peer, "_posted", lambda *_, **__: nullcontext(reply))
    with pytest.raises(WorkerFailed, match="no room"):
        tiny_peer.stream([1, 2, 3], 4)


def test_a_rate_is_of_all_tokens_of_all_streams(monkeypatch: pytest.MonkeyPatch, quiet: Console) -> None:
    """By the real server. Whether such short answers go on at the same time is not for a test to say."""
    seen: list[Answer] = []

    def rate(answers: list[Answer]) -> float:
        seen.extend(answers)
        return 7.0

    monkeypatch.setattr(llama_cpp, "rate_together", rate)
    with LlamaCppPeer(TINY, "float32", WORK, 1, quiet, slots=3) as peer:
        assert peer.rate([random_tokens(WORK.tokens, seed) for seed in range(3)], WORK.steps) == 7.0
    assert [len(answer.arrived_s) for answer in seen] == [WORK.steps + 1] * 3
    for answer in seen:
        assert [answer.asked_s, *answer.arrived_s] == sorted([answer.asked_s, *answer.arrived_s])


def test_the_same_prompt_again_is_computed_again(tiny_peer: LlamaCppPeer) -> None:
    for _ in range(2):
        tiny_peer.run(WORK.prompt(), WORK.steps)


def test_what_it_refuses_is_told(tiny_peer: LlamaCppPeer) -> None:
    with pytest.raises(WorkerFailed, match="context"):
        tiny_peer.run([1] * 4000, 1)


def test_a_server_that_goes_away(tiny_peer: LlamaCppPeer) -> None:
    tiny_peer.close()
    with pytest.raises(WorkerFailed, match="went away"):
        tiny_peer.run([1], 1)


@pytest.mark.parametrize(("peer", "package"), [("llama.cpp", "xllamacpp"), ("transformers", "transformers")])
def test_a_missing_package_is_named(peer: str, package: str, tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = tsqp("bench", "prefill", "-m", TINY, "--peer", peer, *QUICK)
    assert result.code == 2
    assert f"needs {package}: pip install 'tsqp[bench]'" in result.error


def test_a_measurement_without_a_peer_says_what_would_add_it(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = ("transformers", "xllamacpp")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in missing else find(name, *more))
    result = tsqp("bench", "prefill", "-m", TINY, "--tokens", 5, *QUICK)
    assert (result.code, result.json["peer"]) == (0, None)
    assert "without transformers: pip install 'tsqp[bench]' adds it\n" in result.err
    with ExitStack() as stack:
        told = io.StringIO()
        console = Console(file=told)
        run, work = RunConfig(TINY), Workload(5, 0, 1)
        assert transformers_peer(run, stack, console) is None
        assert llama_cpp_peers(run, work, 1, stack, console) == []
        assert told.getvalue().count("adds it") == 2
