"""A result as a table and as a chart. Knows the JSON objects only, so that kept results can be shown again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tsqp.bench.plot import LIMIT, OURS, PEER, Bar, Chart, Panel
from tsqp.bench.show_load import load_chart, load_tables
from tsqp.bench.tables import new_table

Result = dict[str, Any]
WHOLE = ("local", "local_int8", "llama_cpp")  # what bench offload measures beside a split


def table(result: Result) -> RenderableType:
    """What a command prints: a table, or several."""
    match result["benchmark"]:
        case "rpc":
            return _rpc_table(result)
        case "origin":
            return _origin_table(result)
        case "private":
            return _private_table(result)
        case "guard":
            return _guard_table(result)
        case "constants":
            return _constants_table(result)
        case "offload":
            return _offload_table(result)
        case "serve":
            server = result.get("server")
            return _serve_table(result) if server is None else Group(_serve_table(result), load_tables(server))
        case "load":
            return load_tables(result)
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
        case "private":
            return _private_chart(result)
        case "guard":
            return _guard_chart(result)
        case "offload":
            return _offload_chart(result)
        case "serve":
            server, chart = result.get("server"), _serve_chart(result)
            return chart if server is None else Chart(chart.title, [*chart.panels, *load_chart(server).panels])
        case "load":
            return load_chart(result)
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


NUMBERS = {
    "few": "a number of few rows",
    "once": "a number of few rows, once a call",
    "many": "a number of many rows",
    "row": "a row of many",
}  # of a plan's constants


def _constants_table(result: Result) -> Table:
    """What a plan is made of, in units that can be read."""
    found = new_table(f"constants of a plan, {result['machine']['cpu']}", ("nanoseconds",))
    trusted, workers = result["trusted"], result["devices"]
    for name, seconds in trusted["call_s"].items():
        found.add_row(f"call, {name}", f"{seconds * 1e9:,.0f}")
    for name, seconds in trusted["further_call_s"].items():
        found.add_row(f"the same to one worker more, {name}", f"{seconds * 1e9:,.0f}")
    for mode, numbers in trusted["number_s"].items():
        for name, what in NUMBERS.items():
            found.add_row(f"{what}, {mode}", f"{numbers[name] * 1e9:.3g}")
    singles = ("dot", "byte", "plain_byte", "team_byte", "flop", "alone_flop", "cache_byte", "pad_weight", "pad_number")
    for name in singles:
        found.add_row(name.replace("_", " "), f"{trusted[f'{name}_s'] * 1e9:.3g}")
    ways = {"here, int8": trusted["alone"]}
    ways |= {f"{device}, {mode}": one for device, of in workers.items() for mode, one in of["products"].items()}
    for title, times in ways.items():
        for name, seconds in times.items():
            found.add_row(f"{title}: {name.removesuffix('_s')}", f"{seconds * 1e9:.3g}")
    return found


def _comparison_table(result: Result, title: str, scale: float, unit: str) -> Table:
    """Ours, the peer, the limit."""
    found = new_table(title, (unit, "ratio to peer"))
    peer = result["peer"]
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}"
    found.add_row(_ours(result), f"{result['seconds'] * scale:.4g}", ratio)
    if "seconds_drained" in result:
        drained = f"{result['ratio_drained']:.2f}" if "ratio_drained" in result else ""
        found.add_row(f"{_ours(result)}, pads drained", f"{result['seconds_drained'] * scale:.4g}", drained)
    if peer is not None:
        found.add_row(peer["name"], f"{peer['seconds'] * scale:.4g}", "1")
    found.add_row(f"limit: {_limit(result)}", f"{result['limit_seconds'] * scale:.4g}", "")
    share = result.get("communication_share")
    if share is not None:
        found.add_row("communication, neither side computing, in a run with a trace", "", f"{share:.1%} of the time")
    return found


def _comparison_panel(result: Result, title: str, scale: float, unit: str) -> Panel:
    samples = result["all_seconds"]
    bars = [Bar(_ours(result), result["seconds"] * scale, OURS, [s * scale for s in samples["ours"]])]
    if "seconds_drained" in result:
        drained = [s * scale for s in samples["drained"]]
        bars.append(Bar(f"{_ours(result)}, pads drained", result["seconds_drained"] * scale, OURS, drained))
    if result["peer"] is not None:
        peer_samples = [s * scale for s in samples["peer"]]
        bars.append(Bar(result["peer"]["name"], result["peer"]["seconds"] * scale, PEER, peer_samples))
    bars.append(Bar("limit", result["limit_seconds"] * scale, LIMIT))
    return Panel(title, f"{unit} (bars: medians, dots: single runs)", bars)


def _rpc_table(result: Result) -> Table:
    found = new_table(f"{result['transport']}, {result['server']}; times in µs", ("µs", "ratio to peer"))
    found.add_row("null call, median", f"{result['p50_us']:.1f}", "")
    found.add_row("null call, 99th percentile", f"{result['p99_us']:.1f}", "")
    if result["step_p50_us"] is not None:
        found.add_row("null call of a decode step, median", f"{result['step_p50_us']:.1f}", "")
        found.add_row("null call of a decode step, 99th percentile", f"{result['step_p99_us']:.1f}", "")
    found.add_row(f"{result['bytes']} bytes there and back", f"{result['seconds'] * 1e6:.1f}", f"{result['ratio']:.2f}")
    found.add_row(result["peer"]["name"], f"{result['peer']['seconds'] * 1e6:.1f}", "1")
    for side, share in (result["idle_cpu_share"] or {}).items():
        found.add_row(f"{side}, idle", "", f"{share:.2%} of a core")
    return found


def _origin_table(result: Result) -> Table:
    title = f"prefill of {result['tokens']} tokens, {result['model']}, {result['machine']['cpu']}"
    found = new_table(title, ("s", "limit, s", "calls", "sent MB", "received MB", "speed-up"))
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


def _private_table(result: Result) -> Table:
    """Each mode's times, and their ratios to ``open``."""
    found = new_table(f"private modes: {_what(result)}", ("prefill, s", "ratio", "decode, ms", "ratio"))
    for row in result["modes"].values():
        decode = (f"{row['decode_s'] * 1e3:.1f}", f"{row['decode_ratio']:.2f}") if "decode_s" in row else ("", "")
        found.add_row(row["name"], f"{row['prefill_s']:.3f}", f"{row['prefill_ratio']:.2f}", *decode)
    return found


def _private_chart(result: Result) -> Chart:
    panels = []
    for phase, scale, unit in (("prefill", 1.0, "seconds"), ("decode", 1e3, "milliseconds")):
        rows = [row for row in result["modes"].values() if f"{phase}_s" in row]
        samples = [[seconds * scale for seconds in row[f"all_{phase}_s"]] for row in rows]
        bars = [Bar(r["name"], r[f"{phase}_s"] * scale, OURS, s) for r, s in zip(rows, samples, strict=True)]
        panels += [Panel(phase if phase == "prefill" else "decode, one token", unit, bars)] if bars else []
    return Chart(_what(result), panels)


def _guard_times(result: Result) -> dict[str, float]:
    """The times of ``bench guard`` in milliseconds, by what they are of."""
    rows = result["tokens"]
    return {
        f"quantise, mask, x'·Ws of {rows} rows, pads expanded": result["mask_s"] * 1e3,
        "the same and expand the pads": result["with_expansion_s"] * 1e3,
        **{f"dot products of the check, one {name}": s * 1e3 for name, s in result["check_dots_s"].items()},
        "all dot products of the checks of a prefill": result["check_dots_s_per_prefill"] * 1e3,
        "a masked prefill, pads ready": result["masked_prefill_s"] * 1e3,
    }


def _guard_table(result: Result) -> Table:
    found = new_table(f"the guard: {_what(result)}", ("ms", ""))
    for title, milliseconds in _guard_times(result).items():
        found.add_row(title, f"{milliseconds:.4g}", "")
    found.add_row("the checks' share of the prefill", "", f"{result['check_share_of_prefill']:.1%}")
    for name, product in result["field_product"].items():
        rows = name.removeprefix("rows_")
        ratio = f"{product['ratio']:.2f} × bfloat16"
        found.add_row(f"product mod p, gate_up, rows: {rows}", f"{product['field_s'] * 1e3:.4g}", ratio)
    for phase, size in result["pad_row_bytes"].items():
        found.add_row(f"pads of one token, {phase}", "", f"{size / 1e6:.2f} MB")
    return found


def _guard_chart(result: Result) -> Chart:
    bars = [Bar(title, milliseconds) for title, milliseconds in _guard_times(result).items()]
    return Chart(_what(result), [Panel("the guard", "milliseconds", bars)])


def _offload_table(result: Result) -> Table:
    """Times of a pass in milliseconds, and what the split gains."""
    found = new_table("what the split saves the trusted side", ("whole", "split", "limit", "pads", "gain", "with pads"))
    for row in result["cases"]:
        whole = ", ".join(f"{row[f'{way}_s'] * 1e3:.4g}" for way in WHOLE if f"{way}_s" in row)
        times = (f"{row[f'{key}_s'] * 1e3:.4g}" for key in ("trusted", "limit", "pads"))
        gains = (f"{row[key]:.3g}, {row[f'{key}_int8']:.3g}" for key in ("gain", "gain_tee"))
        found.add_row(row["name"], whole, *times, *gains)
    found.caption = (
        "milliseconds of a pass on the trusted side. whole: local in bfloat16, in int8, llama.cpp Q8_0; split: masked, "
        "pads ready, without the worker's kernels; pads: making them; gain: whole over split"
    )
    return found


def _offload_chart(result: Result) -> Chart:
    """How often what is left on the trusted side fits into the whole model there."""
    panels = []
    for key, title in (("gain", "pads ready"), ("gain_tee", "with the trusted side making its own pads")):
        bars = [
            Bar(f"{row['name']}, over {peer}", row[f"{key}{suffix}"], colour)
            for row in result["cases"]
            for peer, suffix, colour in (("bfloat16", "", OURS), ("int8", "_int8", PEER))
        ]
        panels.append(Panel(title, "whole model there / what is left there (below 1 the split costs)", bars))
    return Chart(f"What the split saves the trusted side, {result['machine']['cpu']}", panels)


def _serve_table(result: Result) -> Table:
    """Rates of one stream and of many, then gaps and turns in milliseconds."""
    streams = result["streams"]
    found = new_table(f"many streams: {result['model']}, {result['machine']['cpu']}", ("one", "many", "many / one"))
    for name, row in result["rates"].items():
        found.add_row(f"{name}, 1 and {streams}, tokens/s", f"{row['one']:.4g}", f"{row['many']:.4g}", _times(row))
    for mode, row in result["gaps"].items():
        times = (f"{row[key] * 1e3:.4g}" for key in ("gap_alone_s", "gap_beside_s"))
        found.add_row(f"{mode}, gaps of {result['beside']}, alone and beside {result['long']}, ms", *times, _times(row))
    for mode, row in result["turns"].items():
        times = (f"{row[key] * 1e3:.4g}" for key in ("first_turn_s", "second_turn_s"))
        found.add_row(f"{mode}, to the first token, turns 1 and 2 of {result['turn']}, ms", *times, _times(row))
    found.caption = "gaps: 95 of 100 are no longer"
    return found


def _serve_chart(result: Result) -> Chart:
    rates = [
        Bar(f"{name}, {count}", row[key], OURS if name in result["gaps"] else PEER, row["all"][str(count)])
        for name, row in result["rates"].items()
        for count, key in ((1, "one"), (result["streams"], "many"))
    ]
    gaps = [
        Bar(f"{mode}, {title}", row[key] * 1e3, colour)
        for mode, row in result["gaps"].items()
        for title, key, colour in (("alone", "gap_alone_s", OURS), ("beside a long prompt", "gap_beside_s", PEER))
    ]
    title = f"Many streams: {result['model']}, {result['machine']['cpu']}"
    return Chart(title, [Panel("all streams together", "tokens a second", rates), Panel("gaps", "milliseconds", gaps)])


def _times(row: Result) -> str:
    return f"{row['ratio']:.2f}"


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
    name = result["partition"] if result["protection"] == "open" else result["protection"]
    return f"TSQP {name}, {result['transport']}, {result['dtype']}"


def _limit(result: Result) -> str:
    return (
        "the busier side alone"
        if result["benchmark"] == "pipeline"
        else "the linear layers at the best rates of this run"
    )
