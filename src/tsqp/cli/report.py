"""What a run prints besides its answer: the mode line, the statistics tables, the JSON object."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tsqp.api.answer import Completion
from tsqp.api.describe import handshake_line
from tsqp.api.llm import LLM
from tsqp.api.trace_file import communication_share
from tsqp.bench.tables import new_table
from tsqp.model.meter import CallKind, OperatorKind
from tsqp.trusted.stats import CallStats, Stats, total

CALL_TITLES = {
    "embedding": "embedding",
    "linear": "linear",
    "matmul": "matmul",
    "layer": "whole layers",
    "lm_head": "LM head",
}
OPERATOR_TITLES: dict[OperatorKind, str] = {
    "rms_norm": "RMSNorm",
    "rotary": "rotary",
    "softmax": "softmax",
    "silu": "SiLU",
    "lora": "LoRA",
    "mask": "mask",
    "pads": "pads",  # made on the spot
    "check": "check",
}


def announce(llm: LLM, console: Console) -> None:
    """State what the handshake has shown."""
    line = handshake_line(llm)
    if line is not None:
        console.print(line, style="dim", soft_wrap=True, markup=False)


def as_json(llm: LLM, completion: Completion, lora: str | None = None) -> dict[str, object]:
    """The object of ``--json``. ``lora``: the adapter that has answered."""
    plan, session = llm.plan, llm.session
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "protection": plan.protection.name,
        "partition": None if plan.partition is None else plan.partition.name,
        "transport": None if session is None else session.transport,
        "address": None if session is None else session.address,
        "dtype": plan.linear_dtype,
        "wire_dtype": plan.crossing,
        "device": "cpu" if session is None else session.welcome.device,
        **_pad_maker(llm),
        "lora": None if lora is None else {"name": lora, "sha256": llm.adapters[lora]},
        "stats": llm.stats.as_dict(),
    }


def _pad_maker(llm: LLM) -> dict[str, object]:
    """Of a masked run: the dealer's address, and whether its line is closed to the worker's host; else None."""
    if not llm.plan.protection.masked:
        return {}
    if llm.dealer is None:
        return {"dealer": None, "dealer_separation": None}
    return {"dealer": str(llm.dealer.address), "dealer_separation": llm.dealer.separated}


def print_stats(llm: LLM, console: Console) -> None:
    """What was read; the calls to the worker, if any, and where the time went, as tables; the guard's figures."""
    stats = llm.stats
    console.print(llm.read_line, highlight=False, soft_wrap=True)
    if stats.rpc_calls:
        console.print(_call_table(stats))
    console.print(_operator_table(stats))
    speed = stats.decode_tokens / stats.decode_s if stats.decode_s else 0.0
    console.print(
        f"{stats.forward_passes} forward passes, {stats.rpc_calls} calls; prefill {stats.prompt_tokens} tokens in "
        f"{stats.prefill_s:.3f} s, decode {stats.decode_tokens} in {stats.decode_s:.3f} s ({speed:.1f} tokens/s)",
        highlight=False,
        soft_wrap=True,
    )
    share = None if stats.trace is None else communication_share(stats.trace)
    if share is not None:
        console.print(f"communication: {share:.1%} of the time, neither side computing", highlight=False)
    for line in guard_lines(stats.as_dict()):
        console.print(line, highlight=False, soft_wrap=True)


def guard_lines(found: dict[str, object]) -> list[str]:
    """The figures of a private mode, from the ``stats`` object; nothing where there is no guard."""
    if "products_checked" not in found:
        return []
    passes = f"2^-{found['soundness_bits']:.0f}"
    lines = [f"{found['products_checked']} products checked; a wrong one passes with probability {passes}"]
    if "pads_used" in found:
        drained = found["pads_drained_s"]
        left = f" ({drained:.1f} s at this speed)" if isinstance(drained, float) else ""
        prompt = f"{found['pads_ready_prompt']} tokens of a prompt ({found['pads_ahead']} are wanted)"
        ready = f"{prompt} or {found['pads_ready']} of an answer"
        made = f"{found['pads_missed']} of them made on the spot"
        lines.append(f"pads: {found['pads_used']} rows used, {made}; ready for {ready}{left}")
    return [*lines, f"model digest {found['model_digest']}"]


def _call_table(stats: Stats) -> Table:
    columns = ["calls", "RPC", "encode", "decode", "worker", "MB sent", "MB back"]
    table = new_table("calls to the worker, times in ms", columns)
    made = {CALL_TITLES[kind]: call for kind, call in stats.calls.items() if call.count}
    for title, c in {**made, "all": total(stats.calls.values())}.items():
        times = (f"{seconds * 1e3:.1f}" for seconds in (c.rpc_s, c.serialise_s, c.deserialise_s, c.worker_s))
        table.add_row(title, f"{c.count}", *times, f"{c.bytes_sent / 1e6:.2f}", f"{c.bytes_received / 1e6:.2f}")
    return table


def _operator_table(stats: Stats) -> Table:
    """Every operator's share of the forward passes; a product includes its way to the worker and back."""
    table = new_table("operators", ["side", "ms", "share"])
    whole = stats.prefill_s + stats.decode_s
    rows = [
        *((CALL_TITLES[k], _side(k, c), c.held_s) for k, c in stats.calls.items() if c.count or k != "layer"),
        *((OPERATOR_TITLES[kind], "trusted", seconds) for kind, seconds in stats.operator_s.items()),
        ("other", "trusted", stats.other_s),
        ("all", "", whole),
    ]
    for title, side, seconds in rows:
        table.add_row(title, side, f"{seconds * 1e3:.1f}", f"{seconds / whole:.1%}" if whole else "")
    return table


def _side(kind: CallKind, call: CallStats) -> str:
    if kind == "matmul" and not call.count:
        return "in softmax"  # the trusted side's fused attention does not hand out its products
    return "worker" if call.count else "trusted"
