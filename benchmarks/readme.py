"""Writes the README's results table and the pictures of docs/plots from the files under benchmarks/results/.

    python -m benchmarks.readme [--check]

The files are those of `tsqp bench all` and of `python -m benchmarks.startup`. With --check nothing is written; the
exit code is 1 when the README does not say what the files say. A result of a tree that no commit names is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from tsqp.bench.plot import Chart, draw
from tsqp.bench.show import chart, rpc_chart, split_chart
from tsqp.bench.tree import DIRTY, UNKNOWN

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- results: written by python -m benchmarks.readme -->", "<!-- end of results -->"
MODELS = {"llama-3.2-1b": "Llama-3.2-1B shape", "default": "SmolLM2-135M"}
WAYS = {"": "", "-layer": ", `layer`"}  # suffixes of the files, and what the rows say
TRANSPORTS = ("ipc", "tcp", "shm")
QUALITY = ("float32", "bfloat16", "int8", "verified", "masked")


def main() -> int:
    """Write or check. Returns the exit code."""
    if unnamed := unnamed_results():
        raise SystemExit(f"measured from a tree that no commit names, measure again: {', '.join(unnamed)}")
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    PLOTS.mkdir(parents=True, exist_ok=True)
    for name, picture in charts().items():
        draw(picture, PLOTS / f"{name}.png")
    return 0


def unnamed_results() -> list[str]:
    """Files whose code had changes, or no commit at all: nobody could measure them again."""
    return [
        path.name
        for path in sorted(RESULTS.glob("*.json"))
        if (name := json.loads(path.read_text(encoding="utf-8"))["machine"]["commit"]) == UNKNOWN or DIRTY in name
    ]


def with_table(readme: str) -> str:
    """The README with its results replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """The results as Markdown."""
    first = load("prefill-llama-3.2-1b")
    if first is None:
        raise SystemExit("no results: run tsqp bench all first")
    where = first["machine"]
    lines = [
        f"`{first['partition']}` over `{first['transport']}`, {first['dtype']}, {first['tokens']}-token prompt, "
        f"{where['cpu']} shared by both sides; medians of {first['runs']} runs, in alternation with "
        f"{first['peer']['name']} (torch {where['torch']}, commit {where['commit']}). At `open`, which hides nothing: "
        "what the split itself costs.",
        "",
        "| | TSQP | transformers | ratio | limit |",
        "|---|---|---|---|---|",
        *(row for model in MODELS for way in WAYS for row in split_rows(model, way)),
        *startup_rows(),
        "",
        *origin_lines(),
        *(line for model in MODELS for line in private_lines(model)),
        *quality_lines(),
        *int8_lines(),
        *rpc_lines(),
    ]
    return "\n".join(lines).rstrip()


def split_rows(model: str, way: str) -> list[str]:
    """Prefill and decode of one model, as far as they were measured."""
    rows = []
    for phase, label, scale, form in (("prefill", "prefill", 1, ".2f"), ("decode", "decode, a token", 1000, ".0f")):
        result = load(f"{phase}-{model}{way}")
        if result is not None:
            unit = "s" if scale == 1 else "ms"
            ours, peer, limit = (
                f"{seconds * scale:{form}} {unit}"
                for seconds in (result["seconds"], result["peer"]["seconds"], result["limit_seconds"])
            )
            title = f"{MODELS[model]}{WAYS[way]}, {label}"
            rows.append(f"| {title} | {ours} | {peer} | **{result['ratio']:.2f}** | {limit} |")
    return rows


def startup_rows() -> list[str]:
    """The wait for the first token of a fresh command."""
    startup = load("startup")
    if startup is None:
        return []
    warm, cold = startup["first_token_s"], startup["first_token_cold_s"]
    mode = f" ({startup['protection']})" if "protection" in startup else ""
    return [f"| `tsqp generate`, start to first token{mode} | {warm:.1f} s warm, {cold:.1f} s cold | | | |"]


def origin_lines() -> list[str]:
    """Before and after."""
    result = load("origin")
    if result is None:
        return []
    origin, best = result["origin"], result["best"]
    return [
        f"Against the configuration this project began with, on the same machine (`tsqp bench origin`): "
        f"{origin['seconds']:.1f} s for a {result['tokens']}-token prefill in {origin['calls']} calls that move "
        f"{(origin['sent_mb'] + origin['received_mb']) / 1024:.1f} GiB, now {best['seconds']:.2f} s in {best['calls']} "
        f"calls: **{result['speedup']:.0f}×** ({result['speedup_float32']:.1f}× in float32).",
        "",
    ]


def private_lines(model: str) -> list[str]:
    """What the guard costs one model, beside our own ``open``."""
    result = load(f"private-{model}")
    if result is None:
        return []
    rows = [
        f"| {row['name']} | {row['prefill_s']:.2f} s | **{row['prefill_ratio']:.2f}** | {row['decode_s'] * 1e3:.0f} ms "
        f"| **{row['decode_ratio']:.2f}** |"
        for row in result["modes"].values()
    ]
    return [
        f"What protection costs, {MODELS[model]}, {result['tokens']}-token prompt, in alternation "
        f"(`tsqp bench private`, commit {result['machine']['commit']}):",
        "",
        "| | prefill | ratio to `open` | decode, a token | ratio |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *empty_pool_lines(model),
    ]


def empty_pool_lines(model: str) -> list[str]:
    """A long answer that begins without pads."""
    result = load(f"private-{model}-open-masked_drained")
    if result is None:
        return []
    row = result["modes"]["masked_drained"]
    return [
        f"An answer of {result['decode_steps']} tokens from an empty pool, which is filled meanwhile: "
        f"{row['decode_s'] * 1e3:.0f} ms a token, **{row['decode_ratio']:.2f}** of `open`.",
        "",
    ]


def quality_lines() -> list[str]:
    """Perplexities of a real text."""
    result = load("quality")
    if result is None:
        return []
    modes = [(name, result["modes"][name]) for name in QUALITY if name in result["modes"]]
    model = MODELS.get(result["model"], result["model"])
    figures = [f"{mode['perplexity']:.3f} ({mode['ratio']:.4f}×)" for _, mode in modes]
    return [
        f"Quality, perplexity of {modes[0][1]['tokens']} tokens of prose, {model} (`python -m benchmarks.quality`):",
        "",
        f"| {' | '.join(name for name, _ in modes)} |",
        f"|{'---|' * len(modes)}",
        f"| {' | '.join(figures)} |",
        "",
    ]


def int8_lines() -> list[str]:
    """Integer weights beside our own bfloat16."""
    result = load("decode-llama-3.2-1b-int8")
    if result is None:
        return []
    milliseconds = result["seconds"] * 1e3
    return [
        f"`--dtype int8` decodes a token of the 1B shape in {milliseconds:.0f} ms, **{result['ratio']:.2f}** of our "
        f"own bfloat16 in the same run.",
        "",
    ]


def rpc_lines() -> list[str]:
    """The line without a model."""
    rows = [
        f"`{result['transport']}` {result['p50_us']:.0f} µs (99th percentile {result['p99_us']:.0f} µs; "
        f"{result['bytes'] / 2**20:.0f} MiB there and back {result['seconds'] * 1e3:.1f} ms, "
        f"{result['ratio']:.1f}× two local copies)"
        for result in (load(f"rpc-{transport}") for transport in TRANSPORTS)
        if result is not None
    ]
    return [f"A null call, there and back: {'; '.join(rows)}."] if rows else []


def charts() -> dict[str, Chart]:
    """Every picture that the files allow, by name."""
    found = {}
    for model, title in MODELS.items():
        prefill, decode = load(f"prefill-{model}"), load(f"decode-{model}")
        if prefill is not None and decode is not None:
            found[f"split-{model}"] = split_chart(f"{title}, {prefill['machine']['cpu']}", prefill, decode)
    rpc = [result for result in (load(f"rpc-{transport}") for transport in TRANSPORTS) if result is not None]
    if rpc:
        found["rpc"] = rpc_chart(rpc)
    for name in ("pipeline", "origin", *(f"private-{model}" for model in MODELS)):
        result = load(name)
        if result is not None:
            found[name] = chart(result)
    return found


def load(name: str) -> dict[str, Any] | None:
    """One result; None where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
