"""What attestation costs a client: verifying evidence, and a proxy in front of a server.

    python -m benchmarks.attestation [--model default] [--protection masked] [--runs 15] [--streams 16]

Verification is of forged evidence of each kind, without a network, all of it: medians. The proxy is a process of its
own, before a server with evidence of kind none; through it and to the server itself, over the same TLS, in alternation:
time to the first token of a short prompt (medians), then so many streams at once, tokens a second. Server, proxy and
client share the cores of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from tests.tee.certificates import key_pair
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.certificates import NOW
from tests.tee.forge.intel import intel_forge
from tests.tee.policies import policy, policy_text
from tests.tee.statements import RECEIPT_KEY, statement

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.bench.completions import DATA, DONE
from tsqp.bench.server_process import ServerProcess
from tsqp.tee.collateral import Directory
from tsqp.tee.evidence import Evidence, Quote, make_evidence, read_evidence
from tsqp.tee.verification import Roots, spki_sha256, verify_connection

SERVER = ("--evidence", "none", "--kv-memory", "64MiB")
VERIFICATIONS = 100
FIRST_TOKENS = 8
ANSWER_TOKENS = 48


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--protection", default="masked", choices=["masked", "verified"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "attestation.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console = Console()
    verified = {kind: verification_s(kind) for kind in ("tdx", "sgx", "sev-snp")}
    console.print("verification, ms", {kind: round(s * 1e3, 2) for kind, s in verified.items()})
    with ServerProcess("--model", options.model, "--protection", options.protection, *SERVER) as server:
        through = proxied(server, options)
    console.print(through)
    result = {
        "benchmark": "attestation",
        "model": options.model,
        "protection": options.protection,
        "runs": options.runs,
        "streams": options.streams,
        "verification_s": verified,
        "proxy": through,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def verification_s(kind: str) -> float:
    """Median seconds from the bytes of evidence to the verdict."""
    pair = key_pair()
    found = evidence(kind, pair.der)
    data = found.to_json()
    sections: dict[str, Any] = {
        "tdx": {"tdx": {"mrtd": ["4d" * 48]}},
        "sgx": {"sgx": {"mrenclave": ["4d" * 32]}},
        "sev-snp": {"sev_snp": {"measurement": ["4d" * 48]}},
    }
    wanted = policy([kind], **sections[kind])
    roots = Roots(intel=intel_forge().root_der, amd={"Milan": spki_sha256(amd_forge().ark.der).hex()})
    times = []
    with tempfile.TemporaryDirectory() as directory:
        if kind != "sev-snp":
            Path(directory, "collateral.json").write_text(intel_forge().collateral("tdx" if kind == "tdx" else "sgx"))
        given = Directory(Path(directory))
        for _ in range(VERIFICATIONS):
            start = time.perf_counter()
            seen: dict[str, Any] = {"nonce": bytes.fromhex(found.nonce), "certificate": pair.der, "now": NOW}
            verify_connection(read_evidence(data), wanted, given, roots=roots, **seen)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def evidence(kind: str, certificate: bytes) -> Evidence:
    """Of a server with this certificate, forged."""
    given = statement(spki_sha256=spki_sha256(certificate).hex())
    bound = given.report_data()
    if kind == "sev-snp":
        report = amd_forge().report(measurement=b"\x4d" * 48, report_data=bound)
        quote = Quote(kind="sev-snp", quote=report, certificates=amd_forge().certificates())
    elif kind == "sgx":
        quote = Quote(kind="sgx", quote=intel_forge().sgx(mr_enclave=b"\x4d" * 32, report_data=bound))
    else:
        quote = Quote(kind="tdx", quote=intel_forge().tdx(mr_td=b"\x4d" * 48, report_data=bound))
    return make_evidence(given, quote, RECEIPT_KEY, certificate, NOW)


def proxied(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    """The server itself and the proxy, in alternation."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "policy.toml")
        served = {"model-digests": "any", "protections": [options.protection]}
        path.write_text(policy_text(["none"], server=served))
        with proxy(server.address, path) as address:
            places = {"direct": server.address + "/v1", "proxy": address}
            return asyncio.run(compared(places, server.model, options))


@contextmanager
def proxy(address: str, path: Path) -> Iterator[str]:
    """``tsqp proxy`` as a process; its address."""
    command = [
        sys.executable,
        "-m",
        "tsqp",
        "proxy",
        "--server",
        address,
        "--policy",
        str(path),
        "--port",
        "0",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or not (line := process.stdout.readline()):
                raise SystemExit("the proxy did not start")
            yield json.loads(line)["address"]
        finally:
            process.terminate()


async def compared(places: dict[str, str], model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token, and tokens a second of all streams."""
    first: dict[str, list[float]] = {name: [] for name in places}
    rates: dict[str, list[float]] = {name: [] for name in places}
    limits = httpx.Limits(max_connections=options.streams)
    async with httpx.AsyncClient(verify=False, timeout=300, limits=limits) as client:
        for run in range(options.runs + 1):
            for name, address in places.items():
                taken, _ = await stream(client, address, model, FIRST_TOKENS)
                if run:
                    first[name].append(taken)
        for run in range(4):
            for name, address in places.items():
                start = time.perf_counter()
                every = [stream(client, address, model, ANSWER_TOKENS) for _ in range(options.streams)]
                count = sum(tokens for _, tokens in await asyncio.gather(*every))
                if run:
                    rates[name].append(count / (time.perf_counter() - start))
    found: dict[str, Any] = {
        name: {
            "first_token_s": statistics.median(first[name]),
            "tokens_per_s": statistics.median(rates[name]),
            "all_first_token_s": first[name],
            "all_tokens_per_s": rates[name],
        }
        for name in places
    }
    found["added_s"] = found["proxy"]["first_token_s"] - found["direct"]["first_token_s"]
    found["throughput_ratio"] = found["proxy"]["tokens_per_s"] / found["direct"]["tokens_per_s"]
    return found


async def stream(client: httpx.AsyncClient, address: str, model: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first text of an answer, and its events that have text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me of rivers."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    start, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{address}/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if text_of(line):
                first = first or time.perf_counter() - start
                count += 1
    return first, count


def text_of(line: str) -> str:
    """What a line of the stream adds to the answer: nothing by the event that has the role alone."""
    if not line.startswith(DATA) or line.endswith(DONE):
        return ""
    return "".join(choice["delta"].get("content") or "" for choice in json.loads(line.removeprefix(DATA))["choices"])


if __name__ == "__main__":
    main()
