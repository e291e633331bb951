"""``make gpu-check``: every CUDA test, then every CUDA benchmark, in at most 8 minutes on one machine.

Tests and the compilation of loops for the benchmarks run together, since neither is timed; what looks at the memory of
the whole device, and then the benchmarks, follow one after the other. Each part has a budget, and of those that follow
each has what the ones before it have left of theirs too. One that outlasts it is ended with all that it started, tests
shortly after an interrupt that has them say how far they came; then the next one begins. Files go into ``--output``:
``gpu-NAME.json`` of each benchmark with the device and the commit (with the device's ceilings too, but for ``rpc`` and
``use``), ``gpu-check.json`` with how each part ended, and ``gpu-check.log`` with all that was written.

The exit code is 0 when every part passed, 1 otherwise or without a CUDA device, 2 for wrong options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from benchmarks.machine import RESULTS

TOTAL_S = 480.0
LAST_WORDS_S = 5.0  # of their budget, for tests that outlast the rest of it
MODEL = "synthetic:llama-3.2-1b"
TSQP = (sys.executable, "-c", "import sys; from tsqp.cli.main import main; sys.exit(main())")
BENCH = (*TSQP, "bench")
# Without the plugins that a machine happens to have: one that does not fit would end every test.
PYTEST = (sys.executable, "-m", "pytest", "-v", "--disable-plugin-autoload", "-p", "pytest_timeout", "-m", "gpu")
WORKER = "tests/gpu/test_worker.py"
MASKED = (*BENCH, "private", "--mode", "masked")
OPEN = (sys.executable, "-m", "benchmarks.gpu_open", "--model", MODEL)

Outcome = Literal["passed", "failed", "over its budget", "no time left", "no result"]


@dataclass(frozen=True)
class Part:
    """One command. ``measures``: its last line of standard output is the JSON of its result.

    ``alone``: nothing runs beside it.
    """

    name: str
    command: tuple[str, ...]
    budget_s: float
    measures: bool = True
    alone: bool = True


PARTS = (
    Part("products", (*PYTEST, "tests/gpu/test_field.py"), 130, measures=False, alone=False),
    Part("ipc", (*PYTEST, "tests/gpu/test_cuda_ipc.py", "tests/gpu/test_many.py"), 130, measures=False, alone=False),
    Part("captures", (*PYTEST, WORKER, "-k", "not answers"), 130, measures=False, alone=False),
    Part("private_answers", (*PYTEST, WORKER, "-k", "test_answers"), 130, measures=False, alone=False),
    Part("open_answers", (*PYTEST, WORKER, "-k", "answers and not test_answers"), 130, measures=False, alone=False),
    Part(
        "loops",
        (*MASKED, "--model", "synthetic:tiny", "--tokens", "8", "--steps", "2", "--runs", "1"),
        130,
        measures=False,
        alone=False,
    ),
    Part("memory", (*PYTEST, "tests/gpu/test_memory.py"), 45, measures=False),
    Part("field", (sys.executable, "-m", "benchmarks.gpu_field", "--candidates"), 65),
    Part("rpc", (*BENCH, "rpc", "--calls", "1000", "--runs", "3", "--json"), 25),
    Part(
        "private",
        (*MASKED, "--model", MODEL, "--device", "cuda", "--micro-batches", "1", "--runs", "2", "--json"),
        85,
    ),
    Part("use", (sys.executable, "-m", "benchmarks.gpu_use", "--model", MODEL, "--tokens", "4096", "1024"), 35),
    Part("linear", (*OPEN, "--partition", "linear", "--micro-batches", "1", "2"), 55),
    Part("layer", (*OPEN, "--partition", "layer"), 40),
)


@dataclass(frozen=True)
class Ended:
    """How one part ended. ``code`` is None where it was ended here, or never begun."""

    name: str
    outcome: Outcome
    seconds: float
    budget_s: float
    code: int | None
    command: tuple[str, ...]


class Check:
    """Runs parts and keeps what they say. ``gpu`` describes the device in every result."""

    def __init__(
        self, output: Path, gpu: dict[str, Any], *, total_s: float = TOTAL_S, kernels: Path | None = None
    ) -> None:
        self._output = output
        self._gpu = gpu
        self._total_s = total_s
        self._environment = _environment(kernels)
        self._begun = time.monotonic()
        self._budgets_s = 0.0  # of all parts that have begun: by then, counted from the beginning, they have ended
        self._log_lock = threading.Lock()
        output.mkdir(parents=True, exist_ok=True)
        self._log = output / "gpu-check.log"
        self._log.write_text("", encoding="utf-8")

    def run(self, parts: Sequence[Part]) -> list[Ended]:
        """Those that need not be alone together, then the others in turn; ``gpu-check.json`` is written after each."""
        together = [part for part in parts if not part.alone]
        ended: list[Ended] = []
        if together:
            self._budgets_s += max(part.budget_s for part in together)
            with ThreadPoolExecutor(len(together)) as pool:
                ended += pool.map(self._run, together)
        self._summary(ended)
        for part in parts:
            if part.alone:
                self._budgets_s += part.budget_s
                ended.append(self._run(part))
                self._summary(ended)
        return ended

    def _run(self, part: Part) -> Ended:
        began = time.monotonic()
        since_s = began - self._begun
        own_s = self._budgets_s - since_s if part.alone else part.budget_s  # alone: with what those before it have left
        budget = min(own_s, self._total_s - since_s)
        if budget <= 1:
            return self._say(Ended(part.name, "no time left", 0.0, part.budget_s, None, part.command), "")
        with _file() as out, _file() as errors:
            # A benchmark says nothing before its end: it has all of its time.
            last_words = 0.0 if part.measures else min(LAST_WORDS_S, budget / 4)
            code = run_for(part.command, budget, last_words, out, errors, self._environment)
            said, complaints = _read(out), _read(errors)
        outcome: Outcome = "over its budget" if code is None else "failed" if code else "passed"
        if outcome == "passed" and part.measures and not self._keep(part, said):
            outcome = "no result"
        seconds = time.monotonic() - began
        return self._say(Ended(part.name, outcome, seconds, part.budget_s, code, part.command), complaints + said)

    def _keep(self, part: Part, said: str) -> bool:
        """Write the result of a part, if there is one."""
        try:
            result = json.loads(said.strip().rpartition("\n")[2])
        except ValueError:
            return False
        if not isinstance(result, dict):
            return False
        whole = {**result, "gpu": self._gpu, "commit": self._gpu["commit"]}
        if isinstance(whole.get("machine"), dict):  # where the tree has travelled without its history
            whole["machine"] = {**whole["machine"], "commit": self._gpu["commit"]}
        _write(self._output / f"gpu-{part.name}.json", whole)
        return True

    def _say(self, ended: Ended, said: str) -> Ended:
        line = f"{ended.name}: {ended.outcome} after {ended.seconds:.1f} s of {ended.budget_s:.0f} s"
        with self._log_lock, self._log.open("a", encoding="utf-8") as log:
            log.write(f"=== {line}\n{said.rstrip()}\n")
        print(line, flush=True)
        return ended

    def _summary(self, ended: Sequence[Ended]) -> None:
        about = {"gpu": self._gpu, "commit": self._gpu["commit"]}
        seconds = time.monotonic() - self._begun
        _write(self._output / "gpu-check.json", {**about, "seconds": seconds, "parts": [asdict(one) for one in ended]})


def run_for(
    command: Sequence[str],
    seconds: float,
    last_words_s: float,
    out: IO[str],
    errors: IO[str],
    environment: dict[str, str],
) -> int | None:
    """The exit code, or None for a command that was ended after its seconds, with all that it had started.

    ``last_words_s`` before that it is interrupted: pytest then says what has failed so far.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True, env=environment
    )
    apart = set[int]()  # in sessions of their own, as workers are
    try:
        return process.wait(seconds - last_words_s)
    except subprocess.TimeoutExpired:
        apart = below(process.pid)
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(last_words_s)
        apart |= below(process.pid)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for other in apart:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        process.wait()


def below(pid: int) -> set[int]:
    """The processes that one has started, and that those have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found = set[int]()
    while more := {one for one, parent in parents.items() if parent in (pid, *found)} - found:
        found |= more
    return found


def _environment(kernels: Path | None) -> dict[str, str]:
    """Ours, without what would interpret kernels. Output is not held back: an ended part has said what it did.

    ``kernels``: where Triton keeps them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept = {} if kernels is None else {"TRITON_CACHE_DIR": str(kernels)}
    return {**environment, **kept, "PYTHONUNBUFFERED": "1"}


def workers_kernels() -> Path | None:
    """Where workers have Triton keep kernels: what one part compiles no other has to. Raises PathRefused."""
    from tsqp.arith.jit import cache_name
    from tsqp.checkpoint.cache import code_directory

    own = code_directory("worker-kernels", cache_name())
    return None if own is None else own / "triton"


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory (default: benchmarks/results)")
    parser.add_argument("--only", action="append", choices=names, help="run this part; may be given again")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all parts (default: {TOTAL_S:.0f})")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= TOTAL_S:
        parser.error(f"--seconds must be more than 0 and at most {TOTAL_S:.0f}")
    return options


def gpu() -> dict[str, Any] | None:
    """The first CUDA device, or None."""
    import torch

    from benchmarks.gpu_device import described

    return described(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    found = gpu()
    if found is None:
        print("gpu-check: there is no CUDA device here, so nothing was run", file=sys.stderr)
        return 1
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    ended = Check(options.output, found, total_s=options.seconds, kernels=workers_kernels()).run(parts)
    bad = [one.name for one in ended if one.outcome != "passed"]
    print(
        f"gpu-check: {len(ended) - len(bad)} of {len(ended)} parts passed" + (f"; not {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
