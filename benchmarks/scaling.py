"""The tables and the picture of docs/scaling.md, from constants and results.

    python -m benchmarks.scaling [--check]

Rewrites what stands between the marks of the page, and docs/plots/scaling.png. ``--check`` writes nothing and fails
where the page is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.links import CONDITIONS, PROMPT, predicted_s
from benchmarks.machine import RESULTS
from benchmarks.plan_check import kept_rows
from benchmarks.scaling_ratios import BATCHES, CORES, LINK, MODELS, PLAIN, WORKERS, Plans, follows, short
from tsqp.bench.plot import LIMIT, OURS, PEER, Bar, Chart, Panel, draw
from tsqp.plan.constants import Constants, load
from tsqp.plan.report import WORDS

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "plots" / "scaling.png"
BARE = ", but for products"
LINES = {one.name: one for one in CONDITIONS}
SHORT = {  # of WORDS
    "calls": "calls",
    "numbers": "trusted numbers",
    "attention": "attention",
    "wire": "enciphering",
    "sending": "sending",
    "receiving": "receiving",
    "round_trips": "round trips",
    "losses": "losses",
    "launches": "launches",
    "reading": "reading",
    "multiplying": "multiplying",
    "pads": "pads",
}


def cluster_table(plans: Plans, device: str) -> Iterator[str]:
    """Rates by the number of workers, with keys and without."""
    yield (
        "| model | workers | team: columns, layers, replicas | decode | 16 at once | most of it | prefill | most of it "
        "| decode, 16, prefill, without keys | all in the TEE | a worker holds | the trusted side |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for workers in WORKERS:
            one, many = (plans.of(model, workers, LINK, batch, device) for batch in BATCHES)
            bare, bare_many = (plans.of(model, workers, PLAIN, batch, device) for batch in BATCHES)
            if one is None or many is None or bare is None or bare_many is None:
                yield f"| {model.upper()} | {workers:,} | does not fit |" + " |" * 9
                continue
            rates = [one["decode"], many["decode"], many["prefill"]]
            without = " ".join(short(part["tokens_per_s"]) for part in (bare["decode"], bare_many["decode"]))
            alone = ", ".join(short(part["in_tee_tokens_per_s"]) for part in rates)
            cells = (
                model.upper(),
                f"{workers:,}",
                "; ".join(_team(part) for part in (one, many)),
                short(rates[0]["tokens_per_s"]),
                short(rates[1]["tokens_per_s"]),
                SHORT[rates[1]["largest"]],
                short(rates[2]["tokens_per_s"]),
                SHORT[rates[2]["largest"]],
                f"{without.replace(' ', ', ')}, {short(bare_many['prefill']['tokens_per_s'])}",
                alone,
                f"{one['memory_bytes']['worker'] / 1e9:.3g}; {many['memory_bytes']['worker'] / 1e9:.3g} GB",
                f"{many['memory_bytes']['trusted'] / 1e9:.3g} GB",
            )
            yield "| " + " | ".join(cells) + " |"


def kept_table(constants: Constants) -> Iterator[str]:
    """What was foretold over what was measured."""
    offload = json.loads((RESULTS / "offload.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for one in kept_rows(constants, offload):
        rows.setdefault(one["name"], {})[one["what"]] = one
    titles = list(next(iter(rows.values())))
    yield "| case | " + " | ".join(f"{title}: foretold, measured" for title in titles) + " |"
    yield "|---|" + "---|" * len(titles)
    for name, found in rows.items():
        cells = []
        for title in titles:
            one = found[title]
            cell = times_of(one)
            cells.append(cell if one["near"] else f"{cell} **{one['ratio']:.2f}**")
        yield f"| {name} | " + " | ".join(cells) + " |"


def links_table() -> Iterator[str]:
    """Tokens a second over lines of all kinds."""
    path = RESULTS / "links.json"
    if not path.exists():
        yield "Not measured yet: `python -m benchmarks.links` writes the file that this table is made from."
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    where = f"{found['machine']['cpu']}, load before {found['load_before']:.1f}, commit {found['machine']['commit']}"
    yield f"{found['model']}, {where}."
    yield ""
    names = list(dict.fromkeys(one["what"] for one in found["rows"]))
    yield "| line | " + " | ".join(f"{name}: foretold, measured" for name in names) + " |"
    yield "|---|" + "---|" * len(names)
    lines: dict[str, list[str]] = {}
    for one in found["rows"]:
        foretold = predicted_s(load(), found["model"], LINES[one["condition"]], one["streams"])
        cell = f"{short(max(1, one['streams'] or PROMPT) / foretold)}, {short(one['tokens_per_s'])}"
        lines.setdefault(one["condition"], []).append(cell)
    for condition, cells in lines.items():
        yield f"| {condition} | " + " | ".join(cells) + " |"


def teams_table() -> Iterator[str]:
    """What teams on one machine took."""
    path = RESULTS / "plan.json"
    if not path.exists():
        yield "Not measured yet: `python -m benchmarks.plan_check` writes the file that this table is made from."
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    whole = {(one["name"], one["what"]): one for one in found["measured"] if BARE not in one["what"]}
    bare = {(one["name"], one["what"].removesuffix(BARE)): one for one in found["measured"] if BARE in one["what"]}
    yield f"{found['model']}, {found['machine']['cpu']}, commit {found['machine']['commit']}."
    yield ""
    near, near_bare = (sum(one["near"] for one in rows.values()) for rows in (whole, bare))
    yield f"Within a quarter: {near} of {len(whole)} as a whole, {near_bare} of {len(bare)} but for products."
    yield ""
    yield "| team | what | the whole: foretold, measured | ratio | but for products: foretold, measured | ratio |"
    yield "|---|---|---|---|---|---|"
    for (name, what), one in whole.items():
        cells = (f"{times_of(row)} | {row['ratio']:.2f}" for row in (one, bare[name, what]))
        yield f"| {_short_team(name)} | {what} | {' | '.join(cells)} |"


def times_of(row: dict[str, Any]) -> str:
    """What was foretold and what was measured."""
    return f"{_time(row['predicted_s'])}, {_time(row['measured_s'])}"


def _short_team(name: str) -> str:
    """A team without what it has one of."""
    return re.sub(r"\b1 (columns|sets of layers|replicas)(, )?", "", name).strip(", ") or "one worker"


def picture(plans: Plans) -> Chart:
    """Rates of 70B by the number of workers, beside the trusted side alone."""
    panels = []
    titles = {"decode": "decode, one sequence", "16 at once": "decode, 16", "prefill": "prefill"}
    for kind, title in titles.items():
        bars = []
        for workers in WORKERS:
            for link, word, colour in ((LINK, "with keys", OURS), (PLAIN, "without", LIMIT)):
                rates = plans.rates("70b", workers, link, "cpu")
                if rates is not None:
                    bars.append(Bar(f"{workers:,} workers, {word}", rates[kind], colour))
        alone = plans.rates("70b", 1, LINK, "cpu", of="in_tee_tokens_per_s")
        if alone is not None:
            bars.append(Bar(f"{CORES} trusted cores alone", alone[kind], PEER))
        panels.append(Panel(title, "tokens a second", bars))
    return Chart("Llama 3.1 70B, masked, foretold", panels)


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    constants = load()
    plans = Plans(constants)
    tables = {
        "cpu": cluster_table(plans, "cpu"),
        "h200": cluster_table(plans, "h200"),
        "follows": follows(plans),
        "kept": kept_table(constants),
        "links": links_table(),
        "teams": teams_table(),
    }
    for name, rows in tables.items():
        mark = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        body = "\n".join(rows)
        text, count = re.subn(mark, lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"docs/scaling.md has no place for {name}")
    return text


def _team(found: dict[str, Any]) -> str:
    return f"{found['team']['columns']}, {found['team']['layers']}, {found['team']['replicas']:,}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def main() -> None:
    """Write, or look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    assert SHORT.keys() == WORDS.keys()
    before = PAGE.read_text(encoding="utf-8")
    after = with_tables(before)
    if options.check:
        if after != before:
            raise SystemExit("docs/scaling.md is not what the files say: python -m benchmarks.scaling")
        return
    PAGE.write_text(after, encoding="utf-8")
    draw(picture(Plans(load())), PLOT)


if __name__ == "__main__":
    main()
