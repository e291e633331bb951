"""``tsqp verify-receipt``: does a receipt belong to this request, this answer and that server?"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tsqp.cli.arguments import Collateral, Json, read_bytes, unix_time
from tsqp.errors import OptionError

if TYPE_CHECKING:
    from tsqp.tee.receipts import SignedReceipt

MAX_REQUEST_BYTES = 64 << 20
UNATTESTED = "the receipt key was not shown to be attested, so anybody may have made this: give --evidence and --policy"


def verify_receipt(
    receipt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    request: Annotated[Path | None, Parameter(help="The body of the request, byte for byte as it was sent.")] = None,
    answer: Annotated[
        Path | None, Parameter(help="The body of the answer, or the text of its stream of events.")
    ] = None,
    evidence: Annotated[Path | None, Parameter(help="Evidence of the server, as tsqp verify --save keeps it.")] = None,
    policy: Annotated[Path | None, Parameter(help="What is accepted as evidence: a TOML file.")] = None,
    collateral: Collateral = None,
    at: Annotated[datetime | None, Parameter(help="Evidence as if it were this moment (ISO 8601, UTC).")] = None,
    replay: Annotated[
        bool, Parameter(help="Answer the request again with --model, and compare every token; needs --request.")
    ] = False,
    model: Annotated[
        str | None,
        Parameter(
            name=["--model", "-m"],
            help="For --replay: the weights that the server is to have had; a directory,"
            " a .gguf file, a Hub id or default.",
        ),
    ] = None,
    lora: Annotated[
        tuple[str, ...],
        Parameter(help="For --replay: each adapter of the server, [NAME=]PATH, as to tsqp serve."),
    ] = (),
    threads: Annotated[int | None, Parameter(help="For --replay: CPU threads; all cores when not given.")] = None,
    json_output: Json = False,
) -> None:
    """Check a receipt. Exit code 0: all that was asked for holds; 1: refused, in one line.

    Parameters
    ----------
    receipt
        A file with the JSON of a receipt or with the text of the header x-tsqp-receipt; - for standard input.
    """
    from tsqp.tee.answer_form import MAX_ANSWER_BYTES, read_answer
    from tsqp.tee.receipts import MAX_RECEIPT_BYTES, read_receipt

    if (evidence is None) != (policy is None):
        raise OptionError("--evidence and --policy go together: evidence says nothing to who accepts any")
    if evidence is None and (collateral is not None or at is not None):
        raise OptionError("--collateral and --at are for --evidence")
    if replay and (request is None or model is None):
        raise OptionError("--replay answers a request again: give it as --request, and the weights as --model")
    if not replay and (model is not None or lora or threads is not None):
        raise OptionError("--model, --lora and --threads are for --replay")
    signed = read_receipt(read_bytes(receipt, MAX_RECEIPT_BYTES))
    signed.check_signature()
    body = None if request is None else read_bytes(request, MAX_REQUEST_BYTES)
    if body is not None:
        signed.check_request(body)
    if answer is not None:
        signed.check_answer(read_answer(read_bytes(answer, MAX_ANSWER_BYTES), signed.receipt.path))
    if evidence is not None and policy is not None:
        _check_evidence(signed, evidence, policy, collateral, at)
    else:
        sys.stderr.write(f"tsqp: note: {UNATTESTED}\n")
    if replay and body is not None and model is not None:
        _replay(signed, body, model, lora, threads, silent=json_output)
    shown = summary(signed)
    shown |= {
        "key_attested": evidence is not None,
        "request_compared": body is not None,
        "answer_compared": answer is not None,
        "replayed": replay,
    }
    sys.stdout.write(json.dumps(shown, indent=None if json_output else 2) + "\n")


def summary(signed: SignedReceipt) -> dict[str, object]:
    """What the receipt says."""
    import msgspec

    fields: dict[str, object] = msgspec.to_builtins(signed.receipt)
    left_out = ("version", "request_sha256", "answer_sha256", "tokens_sha256")
    fields = {name: value for name, value in fields.items() if name not in left_out}
    fields["made_at"] = datetime.fromtimestamp(signed.receipt.made_at, UTC).isoformat()
    return {"accepted": True, **fields}


def _check_evidence(
    signed: SignedReceipt, evidence: Path, policy: Path, collateral: str | None, at: datetime | None
) -> None:
    from tsqp.tee.collateral import collateral_from
    from tsqp.tee.evidence import MAX_EVIDENCE_BYTES, read_evidence
    from tsqp.tee.policy import read_policy
    from tsqp.tee.verification import verify_file

    wanted, given = read_policy(policy), collateral_from(collateral)
    found = read_evidence(read_bytes(evidence, MAX_EVIDENCE_BYTES))
    verify_file(found, wanted, given, now=unix_time(at))
    signed.check_attested(found)


def _replay(
    signed: SignedReceipt, body: bytes, model: str, lora: tuple[str, ...], threads: int | None, *, silent: bool
) -> None:
    """On this machine, with a worker of its own, whose products are checked."""
    from tsqp.api.async_llm import AsyncLLM
    from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
    from tsqp.cli.open_llm import open_llm
    from tsqp.config.dtype import PRIVATE_KV_DTYPES
    from tsqp.errors import EvidenceRefused
    from tsqp.server.replay import check_replay

    receipt = signed.receipt
    if receipt.kv_dtype not in PRIVATE_KV_DTYPES:
        raise EvidenceRefused("kv-dtype", receipt.kv_dtype, f"one of {', '.join(PRIVATE_KV_DTYPES)}")
    compute = ComputeConfig(threads=threads, lora=lora, kv_dtype=receipt.kv_dtype)
    run = RunConfig(model, "verified", WorkerConfig(), GuardConfig(), compute)

    async def again() -> None:
        async with AsyncLLM(open_llm(run, silent=silent)) as opened:
            await check_replay(opened, signed, body)

    asyncio.run(again())
