"""How long a user waits: `tsqp --help`, and the first token of `tsqp generate` with the default model.

    python -m benchmarks.startup [--runs 5]

Warm is the median of several runs. Cold is one run after the interpreter's libraries, the compiled loops and the
model's files were dropped from the page cache, as after a restart of the machine; nothing is measured where they stay
there. The model itself has been fetched before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.checkpoint import locate
from tsqp.checkpoint.cache import cache_directory

MOST_LEFT = 0.05  # of the bytes that a cold start reads: what this process itself has mapped is less
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
    read = [Path(sys.prefix), Path(sysconfig.get_path("stdlib")), cache_directory() / "kernels"]
    left = dropped_from_page_cache([*read, Path(locate("default"))])
    if left > MOST_LEFT:
        raise SystemExit(f"no start would be cold: {left:.0%} of the files stay in memory; end what uses them")
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
        "cold_left_share": left,
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


def dropped_from_page_cache(directories: Sequence[Path]) -> float:
    """Ask the system to forget every file below these directories; the share of their bytes that stays in memory."""
    os.sync()  # what is not written yet is not forgotten
    left = size = 0
    for path in files_below(directories):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += pages_in_memory(file.fileno()) * mmap.PAGESIZE
            size += os.fstat(file.fileno()).st_size
    return left / size


def files_below(directories: Sequence[Path]) -> Iterator[Path]:
    """Those that have something in them; each once, whatever links lead there."""
    found = {path.resolve() for directory in directories for path in directory.rglob("*") if path.is_file()}
    return (path for path in found if path.stat().st_size)


def pages_in_memory(descriptor: int) -> int:
    """Pages of a file that the page cache has, by mincore(2): mapping a file reads none of it."""
    library = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = ctypes.c_char.from_buffer(mapped)
        try:
            failed = library.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), pages)
        finally:
            del view  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages)


if __name__ == "__main__":
    main()
