"""A result as a table and as a chart. Knows the JSON objects only, so that kept results can be shown again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from tsqp.app.bench.plot import LIMIT, OURS, PEER, Bar, Chart, Panel

Result = dict[str, Any]


def table(result: Result) -> Table:
    """The table that a command prints."""
    match result["benchmark"]:
        case "rpc":
            return _rpc_table(result)
        case "origin":
            return _origin_table(result)
        case "pipeline":
            return _comparison_table(result, _pipeline_title(result), 1.0, "s")
        case "decode":
            return _comparison_table(result, f"decode, a token: {_what(result)}", 1e3, "ms")
        case _:
            return _comparison_table(result, f"prefill: {_what(result)}", 1.0, "s")


def chart(result: Result) -> Chart:
    """The picture of ``--plot``."""
    match result["benchmark"]:
        case "rpc":
            return rpc_chart([result])
        case "origin":
            return _origin_chart(result)
        case "pipeline":
            return Chart(_pipeline_title(result), [_comparison_panel(result, "one prefill", 1.0, "seconds")])
        case "decode":
            return Chart(_what(result), [_comparison_panel(result, "decode, one token", 1e3, "milliseconds")])
        case _:
            return Chart(_what(result), [_comparison_panel(result, "prefill", 1.0, "seconds")])


def split_chart(title: str, prefill: Result, decode: Result) -> Chart:
    """Both phases of one model in one picture."""
    panels = [
        _comparison_panel(prefill, f"prefill, {prefill['tokens']} tokens", 1.0, "seconds"),
        _comparison_panel(decode, "decode, one token", 1e3, "milliseconds"),
    ]
    return Chart(title, panels)


def rpc_chart(results: Sequence[Result]) -> Chart:
    """Null calls, and full calls beside local copies, of one or more transports."""
    null = [
        Bar(f"{r['transport']}, {name}", r[key], colour)
        for r in results
        for name, key, colour in (("median", "p50_us", OURS), ("99th percentile", "p99_us", PEER))
    ]
    full = [
        bar
        for r in results
        for bar in (
            Bar(r["transport"], r["seconds"] * 1e3, OURS),
            Bar("two local copies", r["peer"]["seconds"] * 1e3, PEER),
        )
    ]
    size = results[0]["bytes"] / 2**20
    return Chart(
        f"The line without a model, {results[0]['machine']['cpu']}",
        [
            Panel("null call, round trip", "microseconds", null),
            Panel(f"{size:.3g} MiB there and back, every byte read and written", "milliseconds", full),
        ],
    )


def _comparison_table(result: Result, title: str, scale: float, unit: str) -> Table:
    """Ours, the peer, the limit."""
    found = _table(title, (unit, "ratio to peer"))
    peer = result["peer"]
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}"
    found.add_row(_ours(result), f"{result['seconds'] * scale:.4g}", ratio)
    if peer is not None:
        found.add_row(peer["name"], f"{peer['seconds'] * scale:.4g}", "1")
    found.add_row(f"limit: {_limit(result)}", f"{result['limit_seconds'] * scale:.4g}", "")
    share = result.get("communication_share")
    if share is not None:
        found.add_row("communication, neither side computing", "", f"{share:.1%} of the time")
    return found


def _comparison_panel(result: Result, title: str, scale: float, unit: str) -> Panel:
    samples = result["all_seconds"]
    bars = [Bar(_ours(result), result["seconds"] * scale, OURS, [s * scale for s in samples["ours"]])]
    if result["peer"] is not None:
        peer_samples = [s * scale for s in samples["peer"]]
        bars.append(Bar(result["peer"]["name"], result["peer"]["seconds"] * scale, PEER, peer_samples))
    bars.append(Bar("limit", result["limit_seconds"] * scale, LIMIT))
    return Panel(title, f"{unit} (bars: medians, dots: single runs)", bars)


def _rpc_table(result: Result) -> Table:
    found = _table(f"{result['transport']}, {result['server']}; times in µs", ("µs", "ratio to peer"))
    found.add_row("null call, median", f"{result['p50_us']:.1f}", "")
    found.add_row("null call, 99th percentile", f"{result['p99_us']:.1f}", "")
    found.add_row(f"{result['bytes']} bytes there and back", f"{result['seconds'] * 1e6:.1f}", f"{result['ratio']:.2f}")
    found.add_row(result["peer"]["name"], f"{result['peer']['seconds'] * 1e6:.1f}", "1")
    for side, share in (result["idle_cpu_share"] or {}).items():
        found.add_row(f"{side}, idle", "", f"{share:.2%} of a core")
    return found


def _origin_table(result: Result) -> Table:
    title = f"prefill of {result['tokens']} tokens, {result['model']}, {result['machine']['cpu']}"
    found = _table(title, ("s", "limit, s", "calls", "sent MB", "received MB", "speed-up"))
    for leg in ("origin", "best_float32", "best"):
        row = result[leg]
        found.add_row(
            row["name"],
            f"{row['seconds']:.3g}",
            f"{row['limit_seconds']:.3g}",
            f"{row['calls']}",
            f"{row['sent_mb']:.2f}",
            f"{row['received_mb']:.2f}",
            f"{result['origin']['seconds'] / row['seconds']:.1f}×",
        )
    found.caption = f"the origin: {result['origin']['configuration']}; MB: 2²⁰ bytes, as it counted"
    return found


def _origin_chart(result: Result) -> Chart:
    legs = [(result[leg], colour) for leg, colour in (("origin", PEER), ("best_float32", OURS), ("best", OURS))]
    times = [Bar(row["name"], row["seconds"], colour, row.get("all_seconds", ())) for row, colour in legs]
    bytes_moved = [Bar(row["name"], row["sent_mb"] + row["received_mb"], colour) for row, colour in legs]
    title = f"{result['model']}, prefill of {result['tokens']} tokens, {result['machine']['cpu']}"
    return Chart(title, [Panel("time", "seconds", times), Panel("sent and received", "MB (2²⁰ bytes)", bytes_moved)])


def _what(result: Result) -> str:
    return f"{result['model']}, {result['tokens']} tokens, {result['machine']['cpu']}"


def _pipeline_title(result: Result) -> str:
    return (
        f"{result['micro_batches']} micro-batches, {result['model']}, {result['tokens']} tokens: a worker that waits "
        f"{result['worker_ms']:.2f} ms a call"
    )


def _ours(result: Result) -> str:
    if result["benchmark"] == "pipeline":
        return f"{result['micro_batches']} micro-batches, interleaved"
    if result["partition"] is None:
        return f"TSQP {result['protection']}, {result['dtype']}"
    return f"TSQP {result['partition']}, {result['transport']}, {result['dtype']}"


def _limit(result: Result) -> str:
    return (
        "the busier side alone"
        if result["benchmark"] == "pipeline"
        else "the linear layers at the best rates of this run"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("")
    for column in columns:
        found.add_column(column, justify="right")
    return found
