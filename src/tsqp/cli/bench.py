"""``tsqp bench``. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.kernel_cache import keep_loops
from tsqp.api.rules import check
from tsqp.api.trace_file import check_output
from tsqp.bench.files import check_directory, file_name, save
from tsqp.bench.names import PeerName, TransportName
from tsqp.cli.bench_options import BenchOptions
from tsqp.cli.one_adapter import no_adapter
from tsqp.cli.options import BenchRunOptions, Device, MicroBatches, Model, Threads
from tsqp.config.dtype import DtypeName
from tsqp.cores import cores
from tsqp.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console

MODEL_1B = "synthetic:llama-3.2-1b"
MIB = 2**20
BY_DEFAULT = RunConfig()

bench_app = App(
    name="bench",
    help="Measure, beside a peer in the same run and the limit of the machine. Medians; units are in the names.",
)

Tokens = Annotated[int, Parameter(help="The length of the prompt.")]
Peer = Annotated[
    PeerName | None,
    Parameter(
        help="What to compare with: transformers (the default where it is installed), llama.cpp (on the CPU; Q8_0 for "
        "int8 and the private modes), ours (linear, bfloat16) or none."
    ),
]
ModeAlone = Annotated[str | None, Parameter(help="Measure open or masked alone, without peers.")]
Checks = Annotated[int, Parameter(help="Check vectors.")]
Results = Annotated[Path | None, Parameter(help="Also write the result to a file in this directory.")]
DirtyOk = Annotated[
    bool, Parameter(help="Write results although files were changed since the last commit; they say so.", negative="")
]
TraceFile = Annotated[Path | None, Parameter(help="Write the last run to this file, for https://ui.perfetto.dev.")]


@bench_app.command
def rpc(
    *,
    transport: Annotated[TransportName, Parameter(help="mem (one process), ipc, tcp, shm, or cuda on a GPU.")] = "shm",
    nbytes: Annotated[int, Parameter(name="--bytes", help="The size of the tensor, each way.")] = 8 * MIB,
    calls: Annotated[int, Parameter(help="Null calls in one run.")] = 2000,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure the line without a model: a null call, and a tensor there and back against two local copies."""
    console = _prepare(options)
    from tsqp.bench.rpc import bench_rpc

    _finish(bench_rpc(transport, nbytes, calls, options.runs, console), options, console)


@bench_app.command
def prefill(
    *,
    tokens: Tokens = 1024,
    peer: Peer = None,
    trace: TraceFile = None,
    run: BenchRunOptions = BenchRunOptions(),
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure the pass over a prompt against the same model unsplit."""
    check_output("--trace", trace)
    no_adapter(run)
    console = _prepare(options, run, by_flags=True)
    from tsqp.bench.split import bench_split
    from tsqp.bench.workload import Workload

    work = Workload(tokens, 0, options.runs)
    result = bench_split(run, work, peer, trace, console)["prefill"]
    _finish(result, options, console, device=_device_here(run))


@bench_app.command
def decode(
    *,
    tokens: Tokens = 1024,
    steps: Annotated[int, Parameter(help="New tokens after the first; the time is that of one.")] = 16,
    peer: Peer = None,
    trace: TraceFile = None,
    run: BenchRunOptions = BenchRunOptions(),
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure one token after a prompt against the same model unsplit."""
    check_output("--trace", trace)
    no_adapter(run)
    if steps < 1:
        raise OptionError(f"--steps must be at least 1, not {steps}")
    console = _prepare(options, run, by_flags=True)
    from tsqp.bench.split import bench_split
    from tsqp.bench.workload import Workload

    work = Workload(tokens, steps, options.runs)
    result = bench_split(run, work, peer, trace, console)["decode"]
    _finish(result, options, console, device=_device_here(run))


@bench_app.command
def pipeline(
    *,
    model: Annotated[str, Parameter(help="As for tsqp generate; its linear layers are not needed.")] = MODEL_1B,
    transport: Annotated[TransportName, Parameter(help="ipc, tcp or shm.")] = "shm",
    dtype: Annotated[DtypeName, Parameter(help="What both sides compute in.")] = "bfloat16",
    tokens: Tokens = 1024,
    micro_batches: Annotated[int, Parameter(help="How many take turns.")] = 8,
    worker_ms: Annotated[
        float | None,
        Parameter(help="How long the worker waits per call, in ms; the trusted side's own time when not given."),
    ] = None,
    threads: Threads = None,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure what micro-batches hide, with a worker that waits instead of computing."""
    console = _prepare(options, RunConfig(model, compute=ComputeConfig(threads=threads)))
    from tsqp.bench.pipeline import PipelineSetup, bench_pipeline
    from tsqp.bench.workload import Workload

    setup = PipelineSetup(model, transport, dtype, micro_batches, worker_ms, threads)
    _finish(bench_pipeline(setup, Workload(tokens, 0, options.runs), console), options, console)


@bench_app.command
def origin(
    *,
    model: Annotated[str, Parameter(help="As for tsqp generate.")] = MODEL_1B,
    tokens: Tokens = 1024,
    threads: Threads = None,
    options: BenchOptions = BenchOptions(runs=3),
) -> None:
    """Measure the configuration this project began with, once, and ours beside it."""
    console = _prepare(options, RunConfig(model, compute=ComputeConfig(threads=threads)))
    from tsqp.bench.origin import bench_origin
    from tsqp.bench.workload import Workload

    _finish(bench_origin(model, Workload(tokens, 0, options.runs), threads, console), options, console)


@bench_app.command
def private(
    *,
    model: Model = MODEL_1B,
    device: Device = "cpu",
    tokens: Tokens = 1024,
    steps: Annotated[int, Parameter(help="Decode steps after the prompt.")] = 16,
    mode: Annotated[
        tuple[str, ...], Parameter(help="Measure this mode beside open, and not all; may be given again.")
    ] = (),
    checks: Checks = 2,
    micro_batches: MicroBatches = None,
    threads: Threads = None,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure verified and masked, with pads ready and without, in alternation with open in bfloat16."""
    compute = ComputeConfig(threads=threads, micro_batches=micro_batches)
    run = RunConfig(model, "masked", WorkerConfig(device=device), GuardConfig(checks), compute)
    console = _prepare(options, run, results, dirty_ok=dirty_ok)
    from tsqp.bench.private import bench_private
    from tsqp.bench.workload import Workload

    result = bench_private(run, Workload(tokens, steps, options.runs), console, mode)
    _finish(result, options, console, results, device)


@bench_app.command
def guard(
    *,
    model: Model = MODEL_1B,
    tokens: Annotated[int, Parameter(help="Rows of a product.")] = 1024,
    checks: Checks = 2,
    threads: Threads = None,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure the trusted side's part of a masked product, piece by piece: quantise, mask, check; and a pad's size."""
    run = RunConfig(model, guard=GuardConfig(checks), compute=ComputeConfig(threads=threads))
    console = _prepare(options, run, results, dirty_ok=dirty_ok)
    from tsqp.bench.guard import bench_guard
    from tsqp.bench.workload import Workload

    result = bench_guard(run, Workload(tokens, 0, options.runs), console)
    _finish(result, options, console, results)


@bench_app.command
def constants(
    *,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure what tsqp plan computes from, on this machine: the least of several times, not the median."""
    if options.plot is not None:
        raise OptionError("bench constants draws no plot")
    console = _prepare(options, results=results, dirty_ok=dirty_ok)
    from tsqp.bench.constants import bench_constants

    _finish(bench_constants(options.runs, console), options, console, results)


@bench_app.command
def offload(
    *,
    case: Annotated[
        tuple[str, ...],
        Parameter(
            help="Measure this case, such as decode-1b, and not all; may be given again. The others stay in the file."
        ),
    ] = (),
    steps: Annotated[int, Parameter(help="Decode steps of one run.")] = 8,
    device: Device = "cpu",
    threads: Threads = None,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure whether the split pays: the whole model on the trusted side over what masked leaves there."""
    run = RunConfig(worker=WorkerConfig(device=device), compute=ComputeConfig(threads=threads))
    console = _prepare(options, run, results, dirty_ok=dirty_ok)
    from tsqp.bench.device import prefix
    from tsqp.bench.earlier import check_goes_together, with_earlier
    from tsqp.bench.machine import machine
    from tsqp.bench.offload import CASES, Effort, bench_offload, chosen

    cases = chosen(case)
    earlier = results / f"{prefix(device)}offload.json" if results is not None and case else None
    if earlier is not None:
        check_goes_together(earlier, str(machine()["cpu"]), threads or cores())
    result = bench_offload(cases, Effort(options.runs, steps, threads, device), console)
    if earlier is not None:
        result = with_earlier(result, earlier, [one.name for one in CASES])
    _finish(result, options, console, results, device)


@bench_app.command
def serve(
    *,
    model: Model = "default",
    device: Device = "cpu",
    streams: Annotated[int, Parameter(help="Answers at once.")] = 16,
    tokens: Annotated[int, Parameter(help="The length of their prompts.")] = 64,
    steps: Annotated[int, Parameter(help="New tokens of each after its first.")] = 32,
    beside: Annotated[int, Parameter(help="Answers that go on while a long prompt arrives.")] = 4,
    long: Annotated[int, Parameter(help="The length of that prompt.")] = 2000,
    turn: Annotated[int, Parameter(help="The length of a conversation's first prompt.")] = 2000,
    mode: ModeAlone = None,
    http: Annotated[
        bool, Parameter(help="Measure also a server over HTTP, as tsqp bench load does.", negative="--no-http")
    ] = True,
    threads: Threads = None,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(runs=3),
) -> None:
    """Measure many streams at once, in the engine and over HTTP: rates beside peers, a long prompt, a second turn."""
    run = RunConfig(model, "open", WorkerConfig(device=device), compute=ComputeConfig(threads=threads))
    console = _prepare(options, run, results, dirty_ok=dirty_ok)
    from tsqp.bench.serve import Traffic, bench_serve

    traffic = Traffic(streams, tokens, steps, beside, long, turn, options.runs)
    if http:
        from tsqp.bench.load import bench_load, check_client
        from tsqp.bench.load_setup import Load

        check_client()
    result = bench_serve(run, traffic, console, mode)
    server = bench_load(run, Load(runs=options.runs), console, mode) if http else None
    _finish({**result, "server": server}, options, console, results, device, mode)


@bench_app.command
def load(
    *,
    model: Model = "default",
    device: Device = "cpu",
    streams: Annotated[
        tuple[int, ...], Parameter(help="Clients at once, each waiting for its answers; may be given again.")
    ] = (1, 2, 4, 8, 16),
    share: Annotated[
        tuple[float, ...],
        Parameter(help="Requests by chance, at this share of the best throughput of those; may be given again."),
    ] = (0.25, 0.5, 0.75, 0.9),
    tokens: Annotated[int, Parameter(help="The length of prompts.")] = 32,
    steps: Annotated[int, Parameter(help="New tokens of each answer after its first.")] = 32,
    seconds: Annotated[
        float, Parameter(help="How long each number of clients asks; requests by chance come three times as long.")
    ] = 6.0,
    pads: Annotated[int, Parameter(help="Tokens whose pads are ready before each of these, at masked.")] = 2560,
    seed: Annotated[int, Parameter(help="Of the prompts, and of when requests come.")] = 0,
    mode: ModeAlone = None,
    threads: Threads = None,
    results: Results = None,
    dirty_ok: DirtyOk = False,
    options: BenchOptions = BenchOptions(runs=3),
) -> None:
    """Measure a real server over HTTP: beside the library, with more and more clients, with requests by chance."""
    run = RunConfig(model, "open", WorkerConfig(device=device), compute=ComputeConfig(threads=threads))
    console = _prepare(options, run, results, dirty_ok=dirty_ok)
    from tsqp.bench.load import bench_load
    from tsqp.bench.load_setup import Load

    asked = Load(streams, share, tokens, steps, seconds, pads, options.runs, seed)
    _finish(bench_load(run, asked, console, mode), options, console, results, device, mode)


@bench_app.command(name="all")
def everything(
    *,
    models: Annotated[
        tuple[str, ...], Parameter(help="May be given again; the origin and the pipeline run at the first.")
    ] = (MODEL_1B, "default"),
    results: Annotated[Path, Parameter(help="The directory that the files are written to.")] = Path(
        "benchmarks/results"
    ),
    dirty_ok: DirtyOk = False,
    prefix: Annotated[
        str | None, Parameter(help="The beginning of each file's name; on a GPU gpu- when not given.")
    ] = None,
    tokens: Tokens = 1024,
    steps: Annotated[int, Parameter(help="Decode steps after the prompt.")] = 16,
    nbytes: Annotated[int, Parameter(name="--bytes", help="The size of the tensor of bench rpc.")] = 8 * MIB,
    calls: Annotated[int, Parameter(help="Null calls in one run of bench rpc.")] = 2000,
    run: BenchRunOptions = BenchRunOptions(),
    options: BenchOptions = BenchOptions(),
) -> None:
    """Measure everything and write one file per result. Takes some minutes at the 1B shape."""
    no_adapter(run)
    if options.plot is not None:
        raise OptionError("bench all draws no plot: python -m benchmarks.readme draws them from the files")
    console = _prepare(options, run, by_flags=True)
    from tsqp.bench.device import prefix as of_device
    from tsqp.bench.everything import Everything, bench_all
    from tsqp.bench.workload import Workload

    work = Workload(tokens, steps, options.runs)
    begin = of_device(run.worker.device) if prefix is None else prefix
    found = bench_all(Everything(models, run, work, nbytes, calls, results, begin, dirty_ok), console)
    if options.json:
        sys.stdout.write(json.dumps({"benchmark": "all", "results": found}) + "\n")


def _prepare(
    options: BenchOptions,
    run: RunConfig = BY_DEFAULT,
    results: Path | None = None,
    *,
    dirty_ok: bool = False,
    by_flags: bool = False,
) -> Console:
    """Refuse what cannot be done before minutes are spent; where progress and limits are printed.

    Loops are kept from here on, before what measures is imported: some of that has loops, or imports them.
    ``by_flags``: the run has the flags of a run, which say where loops are kept; else TSQP_KERNEL_CACHE says.
    """
    from rich.console import Console

    from tsqp.bench.plot import check_plot
    from tsqp.bench.tree import check_tree

    if options.runs < 1:
        raise OptionError(f"--runs must be at least 1, not {options.runs}")
    check(run)
    check_plot(options.plot)
    if results is not None:
        check_directory(results)
        check_tree(dirty_ok=dirty_ok)
    elif dirty_ok:
        raise OptionError("--dirty-ok is for --results: what is only printed needs no clean tree")
    if run.compute.compiled_kernels:
        keep_loops(run.compute.kernel_cache if by_flags else None)
    return Console(stderr=True, force_terminal=False if options.json else None)  # no bars beside --json


def _device_here(run: RunConfig) -> str:
    """What a worker that is started here computes on; another's device may be on another host."""
    return run.worker.device if run.worker.address is None else "cpu"


def _finish(
    result: dict[str, Any],
    options: BenchOptions,
    console: Console,
    results: Path | None = None,
    device: str = "cpu",
    only: str | None = None,
) -> None:
    """The table, the plot, the JSON line, and the file under ``results``.

    ``device`` is that of a worker here; ``only`` the one mode that was measured.
    """
    from rich.console import Console

    from tsqp.bench.device import device_figures, prefix
    from tsqp.bench.plot import draw
    from tsqp.bench.private import MODES
    from tsqp.bench.show import chart, table

    result = {**result, **device_figures(device)}
    (console if options.json else Console()).print(table(result))
    if options.plot is not None:
        draw(chart(result), options.plot)
        console.print(f"drawn into {options.plot}", highlight=False, soft_wrap=True)
    if results is not None:
        some = [only] if only else result["modes"] if len(result.get("modes", MODES)) < len(MODES) else []
        part = "".join(f"-{mode}" for mode in some)
        model = f"-{file_name(result['model'])}" if "model" in result else ""
        save(result, results, f"{prefix(device)}{result['benchmark']}{model}{part}", console)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
