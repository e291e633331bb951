"""Whole evidence with a quote of each kind, from a connection to the verdict; and what collateral is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tee.certificates import key_pair
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.certificates import DAY, NOW
from tests.tee.forge.intel import OTHER_FMSPC, intel_forge
from tests.tee.policies import policy
from tests.tee.statements import RECEIPT_KEY, statement
from tsqp.errors import EvidenceRefused, InputError
from tsqp.tee.collateral import Collateral, Directory, Service, Without, collateral_from
from tsqp.tee.evidence import Evidence, Quote, make_evidence
from tsqp.tee.quotes.intel import platform_of
from tsqp.tee.verification import Roots, spki_sha256, verify_connection, verify_file

PAIR = key_pair()
NONCE = b"\xaa" * 32
KINDS = ["tdx", "sgx", "sev-snp"]
SECTIONS: dict[str, Any] = {
    "tdx": {"mrtd": ["4d" * 48]},
    "sgx": {"mrenclave": ["4d" * 32]},
    "sev_snp": {"measurement": ["4d" * 48]},
}
POLICY = policy(KINDS, **SECTIONS)
ROOTS = Roots(intel=intel_forge().root_der, amd={"Milan": spki_sha256(amd_forge().ark.der).hex()})


def evidence(kind: str, bound: bytes | None = None, certificates: bytes | None = None, **changes: Any) -> Evidence:
    """``bound``: what the quote binds, if not the statement."""
    given = statement(**{"spki_sha256": spki_sha256(PAIR.der).hex(), **changes})
    data = given.report_data() if bound is None else bound
    table = amd_forge().certificates() if kind == "sev-snp" else b""
    quotes = {
        "tdx": lambda: intel_forge().tdx(mr_td=b"\x4d" * 48, report_data=data),
        "sgx": lambda: intel_forge().sgx(mr_enclave=b"\x4d" * 32, report_data=data),
        "sev-snp": lambda: amd_forge().report(measurement=b"\x4d" * 48, report_data=data),
    }
    beside = table if certificates is None else certificates
    quote = Quote(kind=kind, quote=quotes[kind](), certificates=beside)  # type: ignore[arg-type]
    return make_evidence(given, quote, RECEIPT_KEY, PAIR.der, NOW)


@pytest.fixture(scope="module")
def collateral(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    path = tmp_path_factory.mktemp("collateral")
    for tee in ("tdx", "sgx"):
        (path / f"{tee}.json").write_text(intel_forge().collateral(tee))
    (path / "notes.txt").write_text("no collateral")
    return Directory(path)


def verify(found: Evidence, given: Collateral, **changes: Any) -> None:
    seen: dict[str, Any] = {"nonce": NONCE, "certificate": PAIR.der, "now": NOW, "roots": ROOTS, **changes}
    verify_connection(found, POLICY, given, **seen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_accepted(kind: str, collateral: Directory) -> None:
    verify(evidence(kind), collateral)
    verify_file(evidence(kind), POLICY, collateral, now=NOW, roots=ROOTS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_makers_roots_are_the_default(kind: str, collateral: Directory) -> None:
    with pytest.raises(EvidenceRefused, match=rf"{kind}\.(quote|chain) is "):
        verify_file(evidence(kind), POLICY, collateral, now=NOW)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["model_digest", "receipt_key", "nonce"])
def test_a_quote_of_another_statement_is_refused(kind: str, part: str, collateral: Directory) -> None:
    """A genuine quote, taken from a server with another model, key or question."""
    other = statement(**{"spki_sha256": spki_sha256(PAIR.der).hex(), part: "dd" * 32})
    with pytest.raises(EvidenceRefused, match=r"report-data is .*the hash of this statement"):
        verify(evidence(kind, bound=other.report_data()), collateral)


def test_a_quote_under_another_kind_is_refused(collateral: Directory) -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.(collateral|quote) is "):
        verify(msgspec.structs.replace(evidence("sgx"), kind="tdx"), collateral)
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.quote is "):
        verify(msgspec.structs.replace(evidence("tdx"), kind="sev-snp"), collateral)
    with pytest.raises(EvidenceRefused, match="kind is none"):
        verify(msgspec.structs.replace(evidence("tdx"), kind="none"), collateral)


def test_certificates_beside_a_quote_of_intel_are_refused(collateral: Directory) -> None:
    with pytest.raises(EvidenceRefused, match="certificates is 1 bytes, and not none beside tdx"):
        verify(evidence("tdx", certificates=b"x"), collateral)


def test_the_chain_of_a_chip_may_come_as_collateral(tmp_path: Path) -> None:
    """Some hosts give none beside the report."""
    with pytest.raises(EvidenceRefused, match="0 of chips"):
        verify(evidence("sev-snp", certificates=b""), Without())
    (tmp_path / "vcek.der").write_bytes(amd_forge().vcek.der)
    (tmp_path / "chain.pem").write_text(amd_forge().ask_ark_pem)
    verify(evidence("sev-snp", certificates=b""), Directory(tmp_path))


def test_the_newest_collateral_counts(tmp_path: Path) -> None:
    """An older one may still call a platform up to date, and is valid for its month."""
    forge = intel_forge()
    (tmp_path / "a.json").write_text(forge.collateral(valid=(NOW - 20 * DAY, NOW + 10 * DAY)))
    verify(evidence("tdx"), Directory(tmp_path))
    (tmp_path / "b.json").write_text(forge.collateral(status="OutOfDate", valid=(NOW - DAY, NOW + 29 * DAY)))
    (tmp_path / "c.json").write_text(forge.collateral(valid=(NOW - 10 * DAY, NOW + 20 * DAY)))
    with pytest.raises(EvidenceRefused, match=r"tdx\.tcb-status is OutOfDate"):
        verify(evidence("tdx"), Directory(tmp_path))


def test_collateral_of_other_platforms_is_passed_over(tmp_path: Path) -> None:
    forge = intel_forge()
    (tmp_path / "other.json").write_text(forge.collateral(fmspc=OTHER_FMSPC, valid=(NOW, NOW + 30 * DAY)))
    (tmp_path / "sgx.json").write_text(forge.collateral("sgx", valid=(NOW, NOW + 30 * DAY)))
    (tmp_path / "none.json").write_text(json.dumps({"tcb_info": "[]"}))
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    with pytest.raises(EvidenceRefused, match=r"tdx\.collateral is not in .*a \.json file for tdx F0F1F2000000"):
        verify(evidence("tdx"), Directory(tmp_path))
    (tmp_path / "own.json").write_text(forge.collateral())
    verify(evidence("tdx"), Directory(tmp_path))


def test_without_collateral_no_quote_of_intel_is_accepted() -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.collateral is missing, and not given as a directory or a URL"):
        verify(evidence("tdx"), Without())


def test_where_collateral_comes_from(tmp_path: Path) -> None:
    assert collateral_from(str(tmp_path)) == Directory(tmp_path)
    assert isinstance(collateral_from(None), Without)
    assert isinstance(collateral_from("https://collateral"), Service)
    for wrong in ("http://collateral", "ftp://x", str(tmp_path / "missing")):
        with pytest.raises(InputError, match="https://"):
            collateral_from(wrong)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Directory(tmp_path / "missing").amd(b"", ("Milan",))


def test_what_is_no_quote_has_no_platform() -> None:
    for data in (b"", b"x" * 100):
        with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
            platform_of("tdx", data)
