"""``tsqp doctor``: what this machine offers, what it isolates, and what would fail."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from tsqp.app.tee import detect_tee
from tsqp.checkpoint.default import default_directory
from tsqp.errors import TsqpError
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect, listen, new_ipc_address
from tsqp.wire.transport.runtime_dir import runtime_directory

State = Literal["ok", "note", "broken"]
VERSIONS = ("tsqp", "torch", "pyzmq", "msgspec", "safetensors", "gguf", "tokenizers")
PROBE_DEADLINE_S = 5.0
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    detail: str


@dataclass(frozen=True)
class Findings:
    """Everything that was looked at."""

    all: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return all(finding.state != "broken" for finding in self.all)

    def as_dict(self) -> dict[str, object]:
        """The object of ``--json``."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.all]}


def examine() -> Findings:
    """Look at everything. Never raises for what it finds."""
    return Findings(
        (
            _tee(),
            _isolation(),
            *_accelerators(),
            _runtime_directory(),
            _transport("mem", lambda: "mem:doctor"),
            _transport("ipc", new_ipc_address),
            _transport("tcp", lambda: "tcp://127.0.0.1:0"),
            _default_model(),
            _cores(),
            Finding("versions", "ok", ", ".join(f"{name} {version(name)}" for name in VERSIONS)),
            Finding("platform", "ok", f"Python {platform.python_version()}, {platform.platform()}"),
        )
    )


def print_findings(findings: Findings) -> None:
    """One row for each finding."""
    table = Table(show_header=False, box=None)
    for finding in findings.all:
        table.add_row(finding.what, f"[{STYLES[finding.state]}]{finding.state}[/]", finding.detail)
    Console().print(table)


def _tee() -> Finding:
    tee = detect_tee()
    if tee is None:
        return Finding("TEE", "note", "none: process isolation only, for demonstration; the host can read everything")
    return Finding("TEE", "ok", tee)


def _isolation() -> Finding:
    user = os.getuid()
    detail = (
        f"a worker started here has the same user id ({user}): demonstration only, it could read this side's memory"
    )
    return Finding("isolation", "note", detail)


def _accelerators() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("accelerator", "note", "no CUDA device: workers compute on the CPU")]
    return [
        Finding("accelerator", "ok", f"cuda:{index} {torch.cuda.get_device_name(index)}")
        for index in range(torch.cuda.device_count())
    ]


def _runtime_directory() -> Finding:
    try:
        return Finding("runtime directory", "ok", f"{runtime_directory()}, for this user alone")
    except (TsqpError, OSError) as error:
        return Finding("runtime directory", "broken", str(error))


def _transport(name: str, address: Callable[[], str]) -> Finding:
    """Really connects and moves one message."""
    try:
        with closing(listen(address())) as listener, closing(connect(listener.address)) as channel:
            channel.send(Frames(b"?", (memoryview(b"probe"),)))
            arrival = listener.receive(PROBE_DEADLINE_S)
            if arrival is None or bytes(arrival.frames.tensors[0]) != b"probe":
                return Finding(f"transport {name}", "broken", "a message did not arrive")
            return Finding(f"transport {name}", "ok", "a message arrived")
    except (TsqpError, OSError) as error:
        return Finding(f"transport {name}", "broken", str(error))


def _default_model() -> Finding:
    directory = default_directory()
    if directory is None:
        return Finding("default model", "note", "not fetched yet: tsqp model fetch")
    return Finding("default model", "ok", str(directory))


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    flags = _cpu_flags()
    fast = [name for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni") if name in flags]
    return Finding("processor", "ok", f"{count} cores; {', '.join(fast) if fast else 'no low-precision instructions'}")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.split())
