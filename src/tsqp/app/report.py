"""What a run prints besides its answer: the mode line, the statistics tables, the JSON object."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tsqp.app.llm import LLM, Completion
from tsqp.app.trace import communication_share
from tsqp.model.meter import CallKind
from tsqp.trusted.stats import CallStats, Stats, total

CALL_TITLES = {
    "embedding": "embedding",
    "linear": "linear",
    "matmul": "matmul",
    "layer": "whole layers",
    "lm_head": "LM head",
}
OPERATOR_TITLES = {"rms_norm": "RMSNorm", "rotary": "rotary", "softmax": "softmax", "silu": "SiLU"}


def announce(llm: LLM, console: Console) -> None:
    """State what the handshake has shown: the worker's device, the transport and the address in use."""
    plan, session = llm.plan, llm.session
    if session is None or plan.partition is None:
        return
    console.print(
        f"partition {plan.partition.name}, {plan.dtype}, wire {plan.wire_dtype}; worker on {session.welcome.device} in "
        f"{session.welcome.dtype} over {session.channel.transport}, {session.channel.address}",
        style="dim",
        soft_wrap=True,
        markup=False,
    )


def as_json(llm: LLM, completion: Completion) -> dict[str, object]:
    """The object of ``--json``."""
    plan, session = llm.plan, llm.session
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "protection": plan.protection.name,
        "partition": None if plan.partition is None else plan.partition.name,
        "transport": None if session is None else session.channel.transport,
        "address": None if session is None else session.channel.address,
        "dtype": plan.worker_dtype,
        "wire_dtype": None if session is None else plan.wire_dtype,
        "device": "cpu" if session is None else session.welcome.device,
        "stats": llm.stats.as_dict(),
    }


def print_stats(stats: Stats, console: Console) -> None:
    """The two tables: calls to the worker, and where the time of the forward passes went."""
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


def _call_table(stats: Stats) -> Table:
    columns = ["calls", "RPC", "serialise", "deserialise", "worker", "MB sent", "MB back"]
    table = _table("calls to the worker, times in ms", columns)
    made = {CALL_TITLES[kind]: call for kind, call in stats.calls.items() if call.count}
    for title, c in {**made, "all": total(stats.calls.values())}.items():
        times = (f"{seconds * 1e3:.1f}" for seconds in (c.rpc_s, c.serialise_s, c.deserialise_s, c.worker_s))
        table.add_row(title, f"{c.count}", *times, f"{c.bytes_sent / 1e6:.2f}", f"{c.bytes_received / 1e6:.2f}")
    return table


def _operator_table(stats: Stats) -> Table:
    """Every operator's share of the forward passes; a product includes its way to the worker and back."""
    table = _table("operators", ["side", "ms", "share"])
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


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
