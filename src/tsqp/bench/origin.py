"""``bench origin``: the configuration this project began with, and ours, side by side.

The origin's leg is float32, ``batched`` partition, ZeroMQ REQ/REP over ipc, tensors inside MessagePack with all their
copies (``origin_wire``), no causal mask, no KV cache, no fused operator. A pass makes 6·L + 2 calls: embedding; QKV,
Q·Kᵀ, attention·V, O, gate+up and down in each layer; LM head.

What it sent is not written down anywhere but in its totals, 3,328 MB out and 3,657 MB back for 1,024 tokens at the
Llama-3.2-1B shape. Of all combinations one gives exactly these: **K and V expanded to all 32 query heads before they
are sent, the LM head on the last row alone, and MB meaning 2²⁰ bytes.** Out, in MiB for a layer: 8 (x) + 8 + 8 (q, k)
+ 128 + 8 (probabilities, v) + 8 + 8 + 32 = 208, 16 times: 3,328. Back: 12 + 128 + 8 + 8 + 64 + 8 = 228, 16 times, with
8 of the embedding and 0.5 of the head: 3,656.5. ``origin_traffic`` is that sum for any shape.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import zmq
from rich.console import Console

from tsqp.api.config import ComputeConfig
from tsqp.api.llm import LLM
from tsqp.bench.ceilings import ceilings, higher, limits, print_ceilings
from tsqp.bench.child import Child
from tsqp.bench.machine import machine
from tsqp.bench.origin_wire import pack, unpack
from tsqp.bench.progress import watched
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.dtype import DtypeName
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.model.rotary import inverse_frequencies
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import total
from tsqp.wire.transport import new_ipc_address

MIB = 2**20


def origin_traffic(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """Bytes of the tensors sent and received in one pass over ``tokens``, without the messages around them."""
    hidden, inner, heads = tokens * config.hidden_size, tokens * config.intermediate_size, tokens * config.q_size
    scores = config.num_heads * tokens * tokens
    sent = hidden + 2 * heads + (scores + heads) + heads + hidden + inner
    received = (heads + 2 * tokens * config.kv_size) + scores + heads + hidden + 2 * inner + hidden
    token_ids_bytes = 8 * tokens
    return (
        4 * (config.num_layers * sent + config.hidden_size) + token_ids_bytes,
        4 * (config.num_layers * received + hidden + config.vocab_size),
    )


class OriginClient:
    """The origin's trusted side: everything that is not a product, plainly, in float32."""

    def __init__(self, model: str, path: str) -> None:
        checkpoint = open_checkpoint(model)
        self.config = checkpoint.config
        names = ("input_layernorm", "post_attention_layernorm")
        self._norms = [
            [checkpoint.tensor(f"model.layers.{layer}.{name}.weight").float() for name in names]
            for layer in range(self.config.num_layers)
        ]
        self._final_norm = checkpoint.tensor("model.norm.weight").float()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(f"ipc://{path}")
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.calls = self.bytes_sent = self.bytes_received = 0
        self.serialise_s = self.deserialise_s = self.rpc_s = 0.0

    def close(self) -> None:
        """Leave the worker."""
        self._context.destroy()

    def prefill(
        self, tokens: list[int], watch: Callable[[Iterable[int]], Iterable[int]] = lambda layers: layers
    ) -> torch.Tensor:
        """Logits (vocab_size,) after the last token. ``watch`` is handed the layers, to show how far it is."""
        config = self.config
        with torch.inference_mode():
            hidden = self._call("embedding", x=torch.tensor(tokens))  # (T, hidden)
            angles = torch.outer(torch.arange(len(tokens)).float(), inverse_frequencies(config.rope, config.head_dim))
            angles = torch.cat((angles, angles), dim=-1)  # (T, D)
            for layer in watch(range(config.num_layers)):
                hidden = hidden + self._attention(layer, self._norm(hidden, self._norms[layer][0]), angles)
                gate_up = self._call("gate_up", layer=layer, x=self._norm(hidden, self._norms[layer][1]))
                gate, up = gate_up.chunk(2, dim=-1)
                hidden = hidden + self._call("down", layer=layer, x=F.silu(gate) * up)
            last = self._norm(hidden[-1:], self._final_norm)
            return self._call("lm_head", layer=None, x=last)[0]

    def _attention(self, layer: int, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        config = self.config
        qkv = self._call("qkv", layer=layer, x=x)
        q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), dim=-1)
        q = _rotated(q.view(len(x), config.num_heads, config.head_dim).transpose(0, 1), angles)  # (H, T, D)
        k = _rotated(k.view(len(x), config.num_kv_heads, config.head_dim).transpose(0, 1), angles)
        v = v.view(len(x), config.num_kv_heads, config.head_dim).transpose(0, 1)
        share = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(share, dim=0), v.repeat_interleave(share, dim=0)
        scores = self._call("matmul", a=q, b=k.transpose(1, 2)) / math.sqrt(config.head_dim)  # (H, T, T), no mask
        mixed = self._call("matmul", a=scores.softmax(dim=-1), b=v)
        return self._call("o", layer=layer, x=mixed.transpose(0, 1).reshape(len(x), config.q_size))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps))

    def _call(self, op: str, **fields: Any) -> torch.Tensor:
        began = time.perf_counter()
        request = pack({"op": op, **fields})
        packed = time.perf_counter()
        self._socket.send(request)
        reply = self._socket.recv()
        arrived = time.perf_counter()
        product: torch.Tensor = unpack(reply)["y"]
        end = time.perf_counter()
        self.calls += 1
        self.bytes_sent += len(request)
        self.bytes_received += len(reply)
        self.serialise_s += packed - began
        self.deserialise_s += end - arrived
        self.rpc_s += end - began
        return product


def bench_origin(model: str, work: Workload, threads: int | None, console: Console) -> dict[str, Any]:
    """One prefill of the origin's, ``work.runs`` of ours in each dtype. Raises OptionError and every error of LLM."""
    work.check()
    threads = threads or cores()
    rates = {dtype: ceilings(dtype, "cpu", threads) for dtype in ("float32", "bfloat16")}
    for rate in rates.values():
        print_ceilings(rate, console)
    config = open_checkpoint(locate(model)).config
    origin = _run_origin(model, work, threads, console)
    float32, bfloat16 = (_run_ours(model, work, dtype, threads, console) for dtype in ("float32", "bfloat16"))
    rates = {dtype: higher(rate, ceilings(dtype, "cpu", threads)) for dtype, rate in rates.items()}
    return {
        "benchmark": "origin",
        "model": model,
        "tokens": work.tokens,
        "threads": threads,
        "runs": work.runs,
        "origin": {**origin, "limit_seconds": limits(config, work.tokens, rates["float32"])["prefill"]},
        "best": {**bfloat16, "limit_seconds": limits(config, work.tokens, rates["bfloat16"])["prefill"]},
        "best_float32": {**float32, "limit_seconds": limits(config, work.tokens, rates["float32"])["prefill"]},
        "speedup": origin["seconds"] / bfloat16["seconds"],
        "speedup_float32": origin["seconds"] / float32["seconds"],
        "ceilings": rates,
        "machine": machine(),
    }


def _run_origin(model: str, work: Workload, threads: int, console: Console) -> dict[str, Any]:
    """The origin's leg, once: its figures are seconds and MB of 2²⁰ bytes."""
    torch.set_num_threads(threads)
    path = new_ipc_address().removeprefix("ipc://")
    try:
        with Child("tsqp.bench.origin_worker", locate(model), path, str(threads)) as child:
            client = OriginClient(locate(model), child.address)
            try:
                client.prefill(work.prompt()[:8])  # the first products of a process are slower; they do not count
                client.reset()
                start = time.perf_counter()
                client.prefill(work.prompt(), lambda layers: watched(layers, console, "the origin, once"))
                seconds = time.perf_counter() - start
            finally:
                client.close()
    finally:
        Path(path).unlink(missing_ok=True)
    return {
        "name": "the origin, float32",
        "configuration": "batched, tensors inside MessagePack, ZeroMQ ipc, no mask, no cache",
        "seconds": seconds,
        "calls": client.calls,
        "bytes_sent": client.bytes_sent,
        "bytes_received": client.bytes_received,
        "sent_mb": client.bytes_sent / MIB,
        "received_mb": client.bytes_received / MIB,
        "rpc_s": client.rpc_s,
        "serialise_s": client.serialise_s,
        "deserialise_s": client.deserialise_s,
        "ms_per_call": client.rpc_s / client.calls * 1e3,
    }


def _run_ours(model: str, work: Workload, dtype: DtypeName, threads: int, console: Console) -> dict[str, Any]:
    """Our best for one dtype: ``linear`` over the transport of a worker that is started here."""
    seconds = []
    with LLM(model, protection="open", compute=ComputeConfig(dtype=dtype, threads=threads)) as llm:
        transport = "none" if llm.session is None else llm.session.transport
        for warm in watched(range(-1, work.runs), console, f"ours, {dtype}"):
            llm.stats.reset()
            llm.generate(work.prompt(), SamplingParams(max_tokens=1, ignore_eos=True))
            if warm >= 0:
                seconds.append(llm.stats.prefill_s)
        moved = total(llm.stats.calls.values())
    return {
        "name": f"ours, {dtype}, {transport}",
        "configuration": f"linear, {transport}",
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "calls": moved.count,
        "bytes_sent": moved.bytes_sent,
        "bytes_received": moved.bytes_received,
        "sent_mb": moved.bytes_sent / MIB,
        "received_mb": moved.bytes_received / MIB,
    }


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (heads, T, D) by angles (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
