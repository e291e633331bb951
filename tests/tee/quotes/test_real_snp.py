"""Published reports of AMD SEV-SNP: accepted, and refused for each thing that may be wrong with them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.tee.policies import policy
from tests.tee.real_evidence import real
from tsqp.errors import EvidenceRefused
from tsqp.tee.policy import SnpPolicy
from tsqp.tee.quotes.amd_certificates import Found, read_found
from tsqp.tee.quotes.snp import check_snp
from tsqp.tee.quotes.snp_report import REPORT_BYTES, SnpReport

NOW = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
MEASUREMENT = "7f51e17f72a04d5422cb2c00998166536019a217376f3aa45a630e59c805a599847ff250dbffcd07e1ba639771d6f05d"
SIGNATURE_END = 0x2A0 + 144


def report() -> bytes:
    """Version 3, behind four bytes that its publisher has put in front."""
    return real("snp/milan_v3_report.bin")[4 : 4 + REPORT_BYTES]


def chain(*names: str) -> Found:
    given = names or ("snp/milan_v3_vcek.pem", "snp/milan_v3_ask.pem", "snp/milan_ask_ark.pem")
    return sum((read_found(real(name)) for name in given), Found())


def snp_policy(**changes: Any) -> SnpPolicy:
    found = policy(["sev-snp"], sev_snp={"measurement": [MEASUREMENT], **changes}).sev_snp
    assert found is not None
    return found


def test_a_guest_is_accepted() -> None:
    assert check_snp(report(), chain(), snp_policy(), NOW) == report()[0x50:0x90]


def test_a_guest_that_may_be_debugged_is_refused() -> None:
    quote, found = real("snp/milan_v2_debug_report.bin"), chain("snp/milan_v2_vcek.der", "snp/milan_ask_ark.pem")
    allowed = {"guest-policy": ["00000000000b0000"], "measurement": [SnpReport.parse(quote).measurement]}
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.guest-policy is 0xb0000, which allows debug"):
        check_snp(quote, found, snp_policy(**allowed), NOW)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"measurement": ["00" * 48]}, r"measurement is 7f51e17f"),
        ({"host-data": ["11" * 32]}, r"host-data is "),
        ({"guest-policy": ["0000000000020000"]}, r"guest-policy is 0000000000030000"),
        ({"vmpl": [1]}, r"vmpl is 0"),
        ({"min-guest-svn": 1}, r"guest-svn is 0, and not at least 1"),
        ({"products": ["Genoa"]}, r"products is Milan"),
        ({"revocation": "required"}, r"revocation is unknown"),
        ({"chip-id": ["00" * 64]}, r"chip-id is "),
        ({"min-tcb": {"bootloader": 4, "tee": 0, "snp": 25, "microcode": 0}}, r"reported-tcb\.snp is 23, .*least 25"),
        (
            {"min-tcb": {"bootloader": 4, "tee": 0, "snp": 23, "microcode": 214}},
            r"reported-tcb\.microcode is 213, .*least 214",
        ),
    ],
)
def test_a_guest_that_the_policy_does_not_name_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=rf"sev-snp\.{told}"):
        check_snp(report(), chain(), snp_policy(**changes), NOW)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["snp/milan_v3_ask.pem", "snp/milan_ask_ark.pem"], "certificates is 0 of chips"),
        (["snp/milan_v3_vcek.pem", "snp/milan_v2_vcek.der", "snp/milan_ask_ark.pem"], "certificates is 2 of chips"),
        (["snp/milan_v3_vcek.pem"], "without the signer"),
        (["snp/milan_v3_vcek.pem", "snp/milan_v3_ask.pem"], "without the root"),
        (["snp/milan_v3_vcek.pem", "snp/genoa_ask_ark.pem"], "without the signer"),
        (["snp/milan_v2_vcek.der", "snp/milan_ask_ark.pem"], "(chip-id|reported-tcb) is "),
    ],
)
def test_a_chain_of_others_is_refused(names: list[str], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=told):
        check_snp(report(), chain(*names), snp_policy(), NOW)


@pytest.mark.parametrize("year", [2025, 2034])
def test_certificates_of_another_time_are_refused(year: int) -> None:
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is a certificate not valid at"):
        check_snp(report(), chain(), snp_policy(), datetime(year, 1, 1, tzinfo=UTC).timestamp())


@pytest.mark.parametrize("part", range(4))
def test_a_changed_bit_is_refused(part: int) -> None:
    """Every byte of the report: those that are signed, the signature, and those behind it."""
    quote, found, wanted = report(), chain(), snp_policy()
    for at in range(part, len(quote), 4):
        changed = bytearray(quote)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(EvidenceRefused):
            check_snp(bytes(changed), found, wanted, NOW)


@pytest.mark.parametrize("size", [0, 4, 0x2A0, REPORT_BYTES - 1, REPORT_BYTES + 1])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(EvidenceRefused, match=rf"sev-snp\.quote is {size} bytes"):
        check_snp((report() + b"\0")[:size], chain(), snp_policy(), NOW)
