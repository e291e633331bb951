"""How long a user waits: `tsqp --help`, and the first token of `tsqp generate` with the default model.

    python -m benchmarks.startup [--runs 5]

Warm is the median of several runs. Cold is one run after the interpreter's libraries and the model's files were
dropped from the page cache, as after a restart of the machine. The model itself has been fetched before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.checkpoint import locate

HELP = [sys.executable, "-m", "tsqp", "--help"]
GENERATE = [sys.executable, "-m", "tsqp", "generate", "What is the capital of France?", "--protection", "masked"]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console = Console()
    model = Path(locate("default"))
    drop_from_page_cache([Path(sys.prefix), model])
    cold_s = first_output_s(GENERATE)
    help_s = [first_output_s(HELP) for _ in range(options.runs)]
    warm_s = [first_output_s(GENERATE) for _ in track(range(options.runs), console=console, description="starting")]
    result = {
        "benchmark": "startup",
        "model": "default",
        "protection": "masked",
        "runs": options.runs,
        "help_s": statistics.median(help_s),
        "first_token_s": statistics.median(warm_s),
        "first_token_cold_s": cold_s,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(
        f"--help {result['help_s']:.2f} s; first token {result['first_token_s']:.2f} s warm, {cold_s:.2f} s cold; "
        f"written to {options.output}"
    )


def first_output_s(command: list[str]) -> float:
    """Seconds from the start of a command to the first byte on its standard output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if process.stdout is None or not os.read(process.stdout.fileno(), 1):
            raise SystemExit(f"{' '.join(command)} printed nothing")
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def drop_from_page_cache(directories: list[Path]) -> None:
    """Ask the system to forget every file below these directories."""
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
