"""Writes the results of both READMEs and of docs/offload.md, and the pictures of docs/plots, from benchmarks/results/.

    python -m benchmarks.readme [--check]

The files are those of `tsqp bench all` and of `python -m benchmarks.startup`. With --check nothing is written; the
exit code is 1 when a page does not say what the files say. A result of a tree that no commit names is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.words import CHINESE, ENGLISH, Words
from tsqp.bench.plot import Chart, draw
from tsqp.bench.show import WHOLE, chart, rpc_chart, split_chart
from tsqp.bench.tree import DIRTY, UNKNOWN

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHINESE_README = ROOT / "README.zh.md"
OFFLOAD = ROOT / "docs" / "offload.md"
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- results: written by python -m benchmarks.readme -->", "<!-- end of results -->"
MODELS = {"llama-3.2-1b": "Llama-3.2-1B shape", "default": "SmolLM2-135M"}
OFFLOADED = {
    "synthetic:llama-3.2-1b": "Llama-3.2-1B shape",
    "synthetic:llama-3.1-8b": "Llama-3.1-8B shape",
    "default": "SmolLM2-135M",
}
WAYS = {"": "", "-layer": ", `layer`"}  # suffixes of the files, and what the rows say
TRANSPORTS = ("ipc", "tcp", "shm")
SHORT = 1025  # tokens of a case, with what it decodes
QUALITY = ("float32", "bfloat16", "int8", "verified", "masked")

LANGUAGES = {README: ENGLISH, CHINESE_README: CHINESE}


def main() -> int:
    """Write or check. Returns the exit code."""
    if unnamed := unnamed_results():
        raise SystemExit(f"measured from a tree that no commit names, measure again: {', '.join(unnamed)}")
    old = {path: path.read_text(encoding="utf-8") for path in (*LANGUAGES, OFFLOAD)}
    new = {path: with_results(text, results_of(path)) for path, text in old.items()}
    if "--check" in sys.argv[1:]:
        return int(old != new)
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
    PLOTS.mkdir(parents=True, exist_ok=True)
    for name, picture in charts().items():
        draw(picture, PLOTS / f"{name}.png")
    return 0


def unnamed_results() -> list[str]:
    """Files whose code had changes, or no commit at all: nobody could measure them again."""
    unnamed = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = result.get("machine", result)["commit"]  # that of gpu_field.py has it at its top
        if name in (None, UNKNOWN) or DIRTY in name:
            unnamed.append(path.name)
    return unnamed


def with_results(page: str, results: str) -> str:
    """A page with its results replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def results_of(path: Path) -> str:
    """What a page says of the files, as Markdown."""
    return "\n".join(all_offload_lines()).rstrip() if path == OFFLOAD else table(LANGUAGES[path])


def table(words: Words = ENGLISH) -> str:
    """The results as Markdown."""
    first = load("prefill-llama-3.2-1b")
    if first is None:
        raise SystemExit("no results: run tsqp bench all first")
    where = first["machine"]
    lines = [
        words["setting"].format(**{**first, **where, "peer": first["peer"]["name"]}),
        "",
        words["split columns"],
        "|---|---|---|---|---|",
        *(row for model in MODELS for way in WAYS for row in split_rows(model, way, words)),
        *startup_rows(words),
        "",
        *origin_lines(words),
        *offload_lines(words),
        *(line for model in MODELS for line in private_lines(model, words)),
        *server_lines(words),
        *quality_lines(words),
        *int8_lines(words),
        *rpc_lines(words),
    ]
    return "\n".join(lines).rstrip()


def split_rows(model: str, way: str, words: Words) -> list[str]:
    """Prefill and decode of one model, as far as they were measured."""
    rows = []
    for phase, scale, form in (("prefill", 1, ".2f"), ("decode", 1000, ".0f")):
        result = load(f"{phase}-{model}{way}")
        if result is not None:
            unit = "s" if scale == 1 else "ms"
            ours, peer, limit = (
                f"{seconds * scale:{form}} {unit}"
                for seconds in (result["seconds"], result["peer"]["seconds"], result["limit_seconds"])
            )
            title = f"{words[MODELS[model]]}{WAYS[way]}, {words[phase]}"
            rows.append(f"| {title} | {ours} | {peer} | **{result['ratio']:.2f}** | {limit} |")
    return rows


def startup_rows(words: Words) -> list[str]:
    """The wait for the first token of a fresh command."""
    startup = load("startup")
    if startup is None:
        return []
    mode = f" ({startup['protection']})" if "protection" in startup else ""
    warm, cold = startup["first_token_s"], startup["first_token_cold_s"]
    return [words["startup"].format(mode=mode, warm=warm, cold=cold)]


def origin_lines(words: Words) -> list[str]:
    """Before and after."""
    result = load("origin")
    if result is None:
        return []
    moved = (result["origin"]["sent_mb"] + result["origin"]["received_mb"]) / 1024
    return [words["origin"].format(moved=moved, **result), ""]


def offload_lines(words: Words) -> list[str]:
    """What the split saves the trusted side: the cases of one sequence that is not long, of each model."""
    result = load("offload")
    if result is None:
        return []
    cases = [case for case in result["cases"] if case["sequences"] == 1 and case["tokens"] + case["context"] <= SHORT]
    commits = dict.fromkeys(case.get("commit", result["machine"]["commit"]) for case in cases)
    runs = sorted({case.get("runs", result["runs"]) for case in cases})
    about = {"commit": ", ".join(commits), "runs": "–".join(map(str, dict.fromkeys((runs[0], runs[-1]))))}
    setting = words["offload"].format(**{**result["machine"], **about})
    return [setting, "", *offload_table(cases, words), ""]


def all_offload_lines() -> list[str]:
    """Every case, for the page that explains them."""
    result = load("offload")
    return [] if result is None else offload_table(result["cases"], ENGLISH)


def offload_table(cases: list[dict[str, Any]], words: Words) -> list[str]:
    """A row for each case."""
    rows = [words["offload columns"], f"|{'---|' * 9}"]
    for case in cases:
        kind = "prefill" if case["tokens"] > 1 else "decodes" if case["sequences"] > 1 else "decode"
        title = words[f"offload {kind}"].format(**{**case, "model": words[OFFLOADED[case["model"]]]})
        times = [seconds_text(case.get(f"{name}_s")) for name in (*WHOLE, "trusted")]
        gains = f"**{case['gain']:.1f}** | {case['gain_int8']:.1f} | {case['gain_tee']:.1f}"
        rows.append(f"| {title} | {' | '.join(times)} | {gains} | {seconds_text(case['limit_s'])} |")
    return rows


def seconds_text(seconds: float | None) -> str:
    """Seconds or milliseconds, whichever reads better; a dash for what was not measured."""
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def private_lines(model: str, words: Words) -> list[str]:
    """What the guard costs one model, beside our own ``open``."""
    result = load(f"private-{model}")
    if result is None:
        return []
    rows = [
        f"| {words[row['name']]} | {row['prefill_s']:.2f} s | **{row['prefill_ratio']:.2f}** "
        f"| {row['decode_s'] * 1e3:.0f} ms | **{row['decode_ratio']:.2f}** |"
        for row in result["modes"].values()
    ]
    return [
        words["private"].format(
            model=words[MODELS[model]], tokens=result["tokens"], commit=result["machine"]["commit"]
        ),
        "",
        words["private columns"],
        "|---|---|---|---|---|",
        *rows,
        "",
        *empty_pool_lines(model, words),
    ]


def empty_pool_lines(model: str, words: Words) -> list[str]:
    """A long answer that begins without pads."""
    result = load(f"private-{model}-open-masked_drained")
    if result is None:
        return []
    row = result["modes"]["masked_drained"]
    return [
        words["empty pool"].format(
            steps=result["decode_steps"], milliseconds=row["decode_s"] * 1e3, ratio=row["decode_ratio"]
        ),
        "",
    ]


def server_lines(words: Words) -> list[str]:
    """Many clients of a server, beside other servers; and what those wait for who share it."""
    result, engine = load("load-default"), load("serve-default")
    if result is None or engine is None:
        return []
    rows = [
        f"| {words.get(name, name)} | {' | '.join(_rates(points))} | {seconds_text(points[-1]['first']['p95_s'])} |"
        for name, points in result["sweep"].items()
    ]
    commit, first = result["machine"]["commit"], words["first token"].format(most=result["streams"][-1])
    fields = {"http": result["http"], "gaps": engine["gaps"], "turns": engine["turns"]}
    return [
        words["server"].format(**{**result, "commit": commit, "answers": result["steps"] + 1}),
        "",
        f"| {words['clients']} | {' | '.join(map(str, result['streams']))} | {first} |",
        f"|{'---|' * (len(result['streams']) + 2)}",
        *rows,
        "",
        *peers_lines(result, words),
        words["sharing"].format(**fields, commit=engine["machine"]["commit"], long=engine["long"], turn=engine["turn"]),
        "",
    ]


def peers_lines(result: dict[str, Any], words: Words) -> list[str]:
    """Where llama.cpp is the faster one, and what bounds a masked server that is never idle."""
    sweep, ours = result["sweep"], result["sweep"]["masked"]
    theirs = [points[0]["tokens_per_s"] for name, points in sweep.items() if name.startswith("llama.cpp")]
    if not theirs:
        return []
    one = max(theirs) / ours[0]["tokens_per_s"]
    return [words["peers"].format(one=one, made=result["made_pads"]["masked"]["made_per_s"]), ""]


def _rates(points: list[dict[str, Any]]) -> Iterator[str]:
    return (f"{point['tokens_per_s']:.0f}" for point in points)


def quality_lines(words: Words) -> list[str]:
    """Perplexities of a real text."""
    result = load("quality")
    if result is None:
        return []
    modes = [(name, result["modes"][name]) for name in QUALITY if name in result["modes"]]
    model = words[MODELS[result["model"]]] if result["model"] in MODELS else result["model"]
    figures = [f"{mode['perplexity']:.3f} ({mode['ratio']:.4f}×)" for _, mode in modes]
    return [
        words["quality"].format(tokens=modes[0][1]["tokens"], model=model),
        "",
        f"| {' | '.join(name for name, _ in modes)} |",
        f"|{'---|' * len(modes)}",
        f"| {' | '.join(figures)} |",
        "",
    ]


def int8_lines(words: Words) -> list[str]:
    """Integer weights beside our own bfloat16."""
    result = load("decode-llama-3.2-1b-int8")
    if result is None:
        return []
    return [words["int8"].format(milliseconds=result["seconds"] * 1e3, ratio=result["ratio"]), ""]


def rpc_lines(words: Words) -> list[str]:
    """The line without a model."""
    each = [
        words["transport"].format(size=result["bytes"] / 2**20, milliseconds=result["seconds"] * 1e3, **result)
        for result in (load(f"rpc-{transport}") for transport in TRANSPORTS)
        if result is not None
    ]
    return [words["transports"].format(each=words["between transports"].join(each))] if each else []


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
    for name in ("pipeline", "origin", "offload", "load-default", *(f"private-{model}" for model in MODELS)):
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
