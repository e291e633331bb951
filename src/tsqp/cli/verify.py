"""``tsqp verify``: is a server what a policy describes?"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tsqp.cli.arguments import Collateral, Json, read_bytes, unix_time
from tsqp.errors import InputError

if TYPE_CHECKING:
    from tsqp.tee.evidence import Evidence


def verify(
    what: str,
    /,
    *,
    policy: Annotated[Path | None, Parameter(help="What is accepted: a TOML file, docs/attestation.md.")] = None,
    draft: Annotated[
        bool, Parameter(help="Verify nothing, and print a policy that accepts what is shown, to be read and corrected.")
    ] = False,
    collateral: Collateral = None,
    at: Annotated[
        datetime | None, Parameter(help="For a file: as if it were this moment (ISO 8601, UTC), for evidence kept.")
    ] = None,
    save: Annotated[Path | None, Parameter(help="Keep the evidence that was accepted in this file.")] = None,
    json_output: Json = False,
) -> None:
    """Check what a server shows of itself against a policy. Exit code 0: accepted; 1: refused, in one line.

    Parameters
    ----------
    what
        The server, https://host:port, or a file with evidence.
    """
    from tsqp.client.address import parse_server
    from tsqp.client.asking import ask
    from tsqp.tee.collateral import collateral_from
    from tsqp.tee.policy import read_policy
    from tsqp.tee.verification import verify_connection, verify_file

    if draft or policy is None:
        _draft(what, draft=draft, policy=policy, at=at, save=save)
        return
    wanted, given = read_policy(policy), collateral_from(collateral)
    if "://" in what:
        if at is not None:
            raise InputError("--at is for a file: a server is verified now")
        shown = ask(parse_server(what))
        evidence, now = shown.evidence, unix_time()
        verify_connection(evidence, wanted, given, nonce=shown.nonce, certificate=shown.certificate, now=now)
    else:
        evidence = _kept(what)
        verify_file(evidence, wanted, given, now=unix_time(at))
    if save is not None:
        _write(save, evidence.to_json())
    sys.stdout.write(json.dumps(summary(evidence), indent=None if json_output else 2) + "\n")


def _draft(what: str, *, draft: bool, policy: Path | None, at: datetime | None, save: Path | None) -> None:
    """Print a policy, for a person. Raises InputError where something else was meant."""
    from tsqp.client.address import parse_server
    from tsqp.client.asking import ask
    from tsqp.tee.draft import draft_policy

    if not draft:
        raise InputError("give --policy, or --draft for one to begin with: nothing is accepted without a policy")
    if policy is not None or at is not None or save is not None:
        raise InputError("--draft verifies nothing: it goes without --policy, --at and --save")
    shown = ask(parse_server(what)).evidence if "://" in what else _kept(what)
    sys.stdout.write(draft_policy(shown))


def summary(evidence: Evidence) -> dict[str, object]:
    """What was accepted."""
    configuration = evidence.configuration
    return {
        "accepted": True,
        "kind": evidence.kind,
        "protection": configuration.protection,
        "model_digest": evidence.model_digest,
        "partition": configuration.partition,
        "soundness_bits": configuration.soundness_bits,
        "oblivious": configuration.oblivious,
        "embedding": configuration.embedding,
        "locked_memory": configuration.locked_memory,
        "software": configuration.software,
        "key": evidence.spki_sha256,
        "receipt_key": evidence.receipt_key,
        "made_at": datetime.fromtimestamp(evidence.made_at, UTC).isoformat(),
    }


def _kept(what: str) -> Evidence:
    """Of a file."""
    from tsqp.tee.evidence import MAX_EVIDENCE_BYTES, read_evidence

    return read_evidence(read_bytes(what, MAX_EVIDENCE_BYTES, "; give a file, or https://host:port"))


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"--save {path} cannot be written: {error.strerror}") from None
