"""A draft accepts the evidence that it was made of, and nothing that differs from it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.tee.forge.amd import amd_forge
from tests.tee.forge.certificates import NOW
from tests.tee.forge.intel import intel_forge
from tests.tee.statements import CONFIGURATION, RECEIPT_KEY, statement
from tsqp.errors import EvidenceRefused
from tsqp.tee.collateral import Directory
from tsqp.tee.draft import draft_policy
from tsqp.tee.evidence import Evidence, Kind, Quote, make_evidence
from tsqp.tee.policy import parse_policy
from tsqp.tee.verification import Roots, spki_sha256, verify_file

ROOTS = Roots(intel=intel_forge().root_der, amd={"Milan": spki_sha256(amd_forge().ark.der).hex()})
KINDS: list[Kind] = ["tdx", "sgx", "sev-snp", "none"]


def evidence(kind: Kind, measured: bytes = b"\x4d", **changes: Any) -> Evidence:
    given = statement(**changes)
    data = given.report_data()
    quote, certificates = b"", b""
    if kind == "tdx":
        quote = intel_forge().tdx(mr_td=measured * 48, report_data=data)
    elif kind == "sgx":
        quote = intel_forge().sgx(mr_enclave=measured * 32, report_data=data)
    elif kind == "sev-snp":
        quote, certificates = (
            amd_forge().report(measurement=measured * 48, report_data=data),
            amd_forge().certificates(),
        )
    return make_evidence(given, Quote(kind=kind, quote=quote, certificates=certificates), RECEIPT_KEY, b"leaf", NOW)


@pytest.fixture(scope="module")
def collateral(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    path = tmp_path_factory.mktemp("collateral")
    (path / "tdx.json").write_text(intel_forge().collateral("tdx"))
    (path / "sgx.json").write_text(intel_forge().collateral("sgx"))
    return Directory(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_accepts_what_it_was_made_of(kind: Kind, collateral: Directory) -> None:
    text = draft_policy(evidence(kind))
    assert text.startswith("# What the server said of itself, and nobody has verified.")
    verify_file(evidence(kind), parse_policy(text.encode()), collateral, now=NOW, roots=ROOTS)


def test_a_draft_of_a_server_whose_workers_a_roster_names_looks_at_no_key_of_theirs(collateral: Directory) -> None:
    named = evidence("none", configuration=msgspec.structs.replace(CONFIGURATION, worker_keys="roster"))
    drafted = parse_policy(draft_policy(named).encode())
    assert drafted.server.worker_keys == "any"
    verify_file(named, drafted, collateral, now=NOW, roots=ROOTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_refuses_what_differs(kind: Kind, collateral: Directory) -> None:
    wanted = parse_policy(draft_policy(evidence(kind)).encode())
    others = [
        evidence(kind, model_digest="dd" * 32),
        evidence(kind, configuration=msgspec.structs.replace(CONFIGURATION, protection="open")),
        evidence(kind, configuration=msgspec.structs.replace(CONFIGURATION, software="tsqp 9")),
        *([evidence(kind, b"\x5a")] if kind != "none" else []),
    ]
    for other in others:
        with pytest.raises(EvidenceRefused):
            verify_file(other, wanted, collateral, now=NOW, roots=ROOTS)


@pytest.mark.parametrize("kind", ["tdx", "sgx", "sev-snp"])
def test_what_is_no_quote_is_refused(kind: Kind) -> None:
    for quote in (b"", b"x" * 2000, evidence("sgx" if kind == "tdx" else "tdx").quote):
        with pytest.raises(EvidenceRefused, match=rf"^refused: {kind}\."):
            draft_policy(msgspec.structs.replace(evidence(kind), quote=quote))
