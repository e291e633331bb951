"""The peer ``llama.cpp``: the same weights in what many would run instead, on the CPU, in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from types import TracebackType
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from rich.console import Console

from tsqp.bench.child import Child
from tsqp.bench.gguf_copy import MATRICES, gguf_copy
from tsqp.bench.latency import Answer, rate_together
from tsqp.bench.workload import Workload
from tsqp.checkpoint import open_checkpoint
from tsqp.config.dtype import PlainDtype
from tsqp.errors import WorkerFailed

DATA = b"data: "


class LlamaCppPeer:
    """llama.cpp's server with a checkpoint's weights, and ``slots`` for prompts at the same time.

    Raises UnsupportedModel, OSError, WorkerUnreachable.
    """

    def __init__(
        self, model: str, dtype: PlainDtype, work: Workload, threads: int, console: Console, *, slots: int = 1
    ) -> None:
        file = gguf_copy(open_checkpoint(model), dtype, console)
        self.name = f"llama.cpp {MATRICES[dtype].name}, xllamacpp {version('xllamacpp')}"
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy lies between us and a process of ours
        self._session.mount("http://", HTTPAdapter(pool_maxsize=slots))
        context = work.tokens + work.steps + 1
        self._server = Child("tsqp.bench.llama_server", str(file), str(context), str(threads), str(slots))

    @property
    def address(self) -> str:
        """Where it listens, without a path."""
        return self._server.address

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run. The server's own times: ours and its messages are in neither.

        Raises WorkerFailed where it has computed another number of tokens than it was asked for.
        """
        timings = _of_this_work(self.complete(tokens, steps + 1)["timings"], tokens, steps + 1)
        # The clock of the answer starts when its first token is there, which ends the prompt's.
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3

    def rate(self, prompts: list[list[int]], steps: int) -> float:
        """Tokens a second of as many prompts as slots, or fewer, at the same time: ``steps`` of each after its first.

        Its own times would not do: an answer's has the prompts of other slots in it. Raises as ``run``.
        """
        with ThreadPoolExecutor(len(prompts)) as threads:
            return rate_together(list(threads.map(lambda prompt: self.stream(prompt, steps + 1), prompts)))

    def stream(self, tokens: list[int], count: int) -> Answer:
        """When each token of its answer came, by this process's clock. Raises as ``run``."""
        asked_s, arrived = time.perf_counter(), list[float]()
        timings: dict[str, Any] = {}
        with self._posted(tokens, count, stream=True) as reply:
            for line in reply.iter_lines():
                if line.startswith(DATA):
                    event = json.loads(line.removeprefix(DATA))
                    if "error" in event:
                        raise WorkerFailed(f"llama.cpp failed: {event['error']}")
                    arrived += [time.perf_counter()] * len(event["tokens"])
                    timings = event.get("timings", timings)
        _of_this_work(timings, tokens, count)
        return Answer(asked_s, arrived_s=tuple(arrived), tokens=count)

    def complete(self, tokens: list[int], count: int) -> dict[str, Any]:
        """Its answer to a prompt: ``count`` tokens, the likeliest each time, and how long they took."""
        with self._posted(tokens, count, stream=False) as reply:
            answer: dict[str, Any] = reply.json()
            return answer

    @contextmanager
    def _posted(self, tokens: list[int], count: int, *, stream: bool) -> Iterator[requests.Response]:
        """The reply to a prompt, while it is read. Raises WorkerFailed."""
        asked: dict[str, Any] = {
            "prompt": tokens,
            "n_predict": count,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": stream,
        }
        try:
            with self._session.post(f"{self._server.address}/completion", json=asked, stream=stream) as reply:
                if not reply.ok:
                    raise WorkerFailed(f"llama.cpp refused a prompt: {reply.text}")
                yield reply
        except requests.RequestException as error:
            raise WorkerFailed("llama.cpp's server went away; what it said is above") from error

    def close(self) -> None:
        """End its process."""
        self._session.close()
        self._server.close()

    def __enter__(self) -> LlamaCppPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _of_this_work(timings: dict[str, Any], tokens: list[int], count: int) -> dict[str, Any]:
    """Timings of ``count`` tokens after a whole prompt. Raises WorkerFailed for others."""
    if [timings.get(name) for name in ("cache_n", "prompt_n", "predicted_n")] != [0, len(tokens), count]:
        raise WorkerFailed(f"llama.cpp did other work than it was asked for: {timings}")
    return timings
