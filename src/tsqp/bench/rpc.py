"""``bench rpc``: what the line alone costs, without a model.

A null call is a message of one byte answered by one byte. A null call of a decode step, over shm, is the message of a
product, answered as a worker answers it, by the compiled code of both sides, without multiplying. A full call writes N
fresh bytes where the transport wants them, the server reads each and writes N bytes back in one pass, and this side
reads each byte of the reply once, where it lies. The peer is two copies of N bytes inside this process: what there and
back cost if the line were free.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tsqp.api.arena import arena_for
from tsqp.bench import echo
from tsqp.bench.ceilings import ceilings, print_ceilings, seconds_of
from tsqp.bench.child import Child
from tsqp.bench.machine import machine
from tsqp.bench.names import TransportName
from tsqp.bench.null_steps import null_steps
from tsqp.bench.progress import watched
from tsqp.cores import cores
from tsqp.errors import OptionError, ProtocolError
from tsqp.model.accelerator import TorchCuda, why_none
from tsqp.wire import exchange
from tsqp.wire.channel import Channel, DirectLine, Frames
from tsqp.wire.codec import encode
from tsqp.wire.direct import done_start, put_line
from tsqp.wire.messages import Product
from tsqp.wire.transport import connect, listen, new_cuda_address, new_ipc_address, new_shm_address

NULL = b"?"
DEADLINE_S = 60.0
WARM_UP_CALLS = 200
FULL_CALLS = 20  # of each run, and as many local copies, in alternation
IDLE_SAMPLE_S = 1.0


def bench_rpc(transport: TransportName, nbytes: int, calls: int, runs: int, console: Console) -> dict[str, Any]:
    """Measure one transport. Raises OptionError and any ChannelError."""
    if nbytes < 8 or nbytes % 8:
        raise OptionError(f"--bytes must be a multiple of 8 and at least 8, not {nbytes}")
    if calls < 1:
        raise OptionError(f"--calls must be at least 1, not {calls}")
    if transport == "cuda" and (why := why_none(TorchCuda())) is not None:
        raise OptionError(f"--transport cuda needs a GPU: {why}")
    torch.set_num_threads(cores())
    rates = ceilings("float32")
    print_ceilings(rates, console)
    null_s: list[list[float]] = []
    step_s: list[list[float]] = []
    full_s: list[float] = []
    copies_s: list[float] = []
    with (
        server(transport) as (address, pid),
        closing(connect(address, arena_bytes=arena_for(address, worker=pid))) as channel,
    ):
        work = FullCall(channel, nbytes)
        for _ in range(min(calls, WARM_UP_CALLS)):
            null_call(channel)
        work.run()
        line = channel.direct()
        steps = None if line is None else NullStep(channel, line)
        for _ in watched(range(runs), console, f"calls over {transport}"):
            null_s.append(sorted(seconds_of(lambda: null_call(channel)) for _ in range(calls)))
            if steps is not None:
                step_s.append(sorted(steps.run(calls)))
            for _ in range(FULL_CALLS):
                copies_s.append(seconds_of(work.two_copies))
                full_s.append(seconds_of(work.run))
        idle = _idle_share(pid)
    seconds, peer_s = statistics.median(full_s), statistics.median(copies_s)
    return {
        "benchmark": "rpc",
        "transport": transport,
        "server": "a process of its own" if pid is not None else "a thread of this process",
        "bytes": nbytes,
        "calls": calls,
        "runs": runs,
        "p50_us": statistics.median(_quantile(times, 0.50) for times in null_s) * 1e6,
        "p99_us": statistics.median(_quantile(times, 0.99) for times in null_s) * 1e6,
        "step_p50_us": statistics.median(_quantile(times, 0.50) for times in step_s) * 1e6 if step_s else None,
        "step_p99_us": statistics.median(_quantile(times, 0.99) for times in step_s) * 1e6 if step_s else None,
        "seconds": seconds,
        "peer": {"name": f"two local copies of {nbytes} bytes", "seconds": peer_s},
        "ratio": seconds / peer_s,
        "idle_cpu_share": idle,
        "ceilings": rates,
        "machine": machine(),
    }


class FullCall:
    """N bytes there and N bytes back, checked; and the same number of bytes moved without a line."""

    def __init__(self, channel: Channel, nbytes: int) -> None:
        self._channel = channel
        self._nbytes = nbytes
        self._source = torch.randint(-(2**62), 2**62, (nbytes // 8,), generator=torch.Generator().manual_seed(0))
        self._there, self._back = torch.zeros_like(self._source), torch.zeros_like(self._source)
        # Inverting w gives -w - 1, so the words of a true reply add up to this, modulo 2^64.
        self._expected = -self._source.sum() - len(self._source)

    def run(self) -> None:
        """One call. Raises ProtocolError when the reply is not the inverse of what was sent."""
        payload = self._channel.reserve(self._nbytes)
        torch.frombuffer(payload, dtype=torch.int64).copy_(self._source)
        self._channel.send(Frames(NULL, (payload,)), self._nbytes)
        (reply,) = self._channel.receive(DEADLINE_S).tensors
        if torch.frombuffer(reply, dtype=torch.int64).sum() != self._expected:
            raise ProtocolError("the reply is not the inverse of what was sent")

    def two_copies(self) -> None:
        """The peer: there and back inside this process, with the same threads."""
        self._there.copy_(self._source)
        self._back.copy_(self._there)


class NullStep:
    """Calls as a decode step makes them: see ``trusted/step_loops.py`` and ``untrusted/call_loops.py``."""

    def __init__(self, channel: Channel, line: DirectLine) -> None:
        self._line = line
        self._slot = channel.slot(64, 64)
        control = encode(Product(2**61, "qkv", 0, 1, 4))  # its id has 8 bytes, as those of a step have
        packet, _ = line.packet(self._slot, control)
        self._packet = np.frombuffer(packet, np.uint8).copy()
        self._number_at = packet.index((2**61).to_bytes(8, "big"))
        numbers = np.zeros(exchange.LINE_NUMBERS, np.int64)
        put_line(numbers, line)
        answer, slow, clock = np.zeros(line.packet_bytes, np.uint8), np.zeros(1, np.uint8), np.zeros(2, np.int64)
        self._answer, self._exchange = answer, (numbers, done_start(), answer, slow, clock)

    def run(self, calls: int) -> list[float]:
        """So many calls, one after another: the seconds of each. Raises ProtocolError where one is not answered."""
        first, times, done = self._line.numbers(calls), np.zeros(calls + 1, np.int64), 0
        while True:
            done, verdict, size = null_steps(self._packet, self._number_at, first, done, times, self._exchange)
            if done == calls:
                return (np.diff(times) * 1e-9).tolist()  # type: ignore[no-any-return]
            unsent = self._packet.tobytes() if verdict == exchange.UNSENT else b""
            came = self._answer[:size].tobytes() if verdict == exchange.UNUSUAL else b""
            self._line.settle(self._slot, first + done, DEADLINE_S, unsent=unsent, came=came)
            done += 1


def null_call(channel: Channel) -> None:
    """One byte there, one byte back."""
    channel.send(Frames(NULL))
    channel.receive(DEADLINE_S)


@contextmanager
def server(transport: TransportName) -> Iterator[tuple[str, int | None]]:
    """An echo server: its address and its process id, None for ``mem``, which lives in one process."""
    with ExitStack() as stack:
        if transport == "mem":
            listener = stack.enter_context(closing(listen(f"mem:bench-{threading.get_ident()}")))
            thread = threading.Thread(target=echo.serve, args=(listener,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.interrupt)
            yield listener.address, None
        else:
            child = stack.enter_context(Child("tsqp.bench.echo", fresh_address(transport)))
            yield child.address, child.pid


def fresh_address(transport: TransportName) -> str:
    """An address for a server that is started here, which nobody else uses."""
    if transport == "tcp":
        return "tcp://127.0.0.1:0"
    fresh = {"ipc": new_ipc_address, "shm": new_shm_address, "cuda": new_cuda_address}
    return fresh[transport]()


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _idle_share(pid: int | None) -> dict[str, float] | None:
    """Share of one core that each side uses while connected and idle; None where the sides share a process."""
    if pid is None:
        return None
    start, client, worker = time.perf_counter(), time.process_time(), cpu_seconds(pid)
    time.sleep(IDLE_SAMPLE_S)
    wall_s = time.perf_counter() - start
    return {"client": (time.process_time() - client) / wall_s, "worker": (cpu_seconds(pid) - worker) / wall_s}


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process, from the kernel's count in nanoseconds."""
    stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in stats) * 1e-9
