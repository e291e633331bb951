"""Writes the README's results table from the files under benchmarks/results/.

    python -m benchmarks.readme [--check]

With --check nothing is written; the exit code is 1 when the README does not say what the files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: written by python -m benchmarks.readme -->", "<!-- end of results -->"


def main() -> int:
    """Write or check. Returns the exit code."""
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


def with_table(readme: str) -> str:
    """The README with its results replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """The results as Markdown."""
    large, small, startup = (load(name) for name in ("split-llama-3.2-1b", "split-default", "startup"))
    where = large["machine"]
    lines = [
        f"`linear` over `ipc`, {large['dtype']}, {large['tokens']}-token prompt, {where['cpu']} shared by both sides; "
        f"medians of {large['runs']} runs, in alternation with {large['prefill']['peer']['name']} "
        f"(torch {where['torch']}, commit {where['commit']}). `open`: no privacy yet.",
        "",
        "| | TSQP | transformers | ratio | limit |",
        "|---|---|---|---|---|",
        *rows("Llama-3.2-1B shape", large),
        *rows("SmolLM2-135M", small),
        f"| `tsqp generate`, start to first token | {startup['first_token_s']:.1f} s warm, "
        f"{startup['first_token_cold_s']:.1f} s cold | | | |",
        "",
        f"The research script this project began as needs {large['origin_prefill_s']:.1f} s for the same "
        f"{large['tokens']}-token prefill in float32 on a 2-core machine.",
    ]
    return "\n".join(lines)


def rows(title: str, result: dict[str, Any]) -> list[str]:
    """Prefill and decode of one model. The limit is what the machine's own GEMM and memory rates allow."""
    prefill, decode, limit = result["prefill"], result["decode"], result["limit"]
    return [
        f"| {title}, prefill | {prefill['seconds']:.2f} s | {prefill['peer']['seconds']:.2f} s | "
        f"**{prefill['ratio']:.2f}** | {limit['prefill_s']:.2f} s |",
        f"| {title}, decode, a token | {decode['seconds'] * 1e3:.0f} ms | {decode['peer']['seconds'] * 1e3:.0f} ms | "
        f"**{decode['ratio']:.2f}** | {limit['decode_s'] * 1e3:.0f} ms |",
    ]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
