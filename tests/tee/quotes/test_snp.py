"""Reports of SEV-SNP under a root of the tests: accepted, and refused for each fault and each field."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tee.forge.amd import AmdForge, Tcb, amd_forge, certificate_table
from tests.tee.forge.certificates import DAY, NOW
from tests.tee.policies import policy
from tsqp.errors import EvidenceRefused
from tsqp.tee.quotes.amd_certificates import Found, certificates_in, read_found
from tsqp.tee.quotes.snp import check_snp
from tsqp.tee.quotes.snp_report import REPORT_BYTES

DATA = bytes(range(64))
MEASURED = b"\x4d" * 48


def roots(forge: AmdForge) -> dict[str, str]:
    key = forge.ark.certificate.public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return {forge.product: hashlib.sha256(spki).hexdigest()}


def check(
    quote: bytes | None = None,
    *,
    forge: AmdForge | None = None,
    found: Found | None = None,
    trusted: dict[str, str] | None = None,
    section: dict[str, Any] | None = None,
) -> bytes:
    forge = forge or amd_forge()
    names = {"measurement": [MEASURED.hex()], "products": [forge.product], **(section or {})}
    wanted = policy(["sev-snp"], sev_snp=names).sev_snp
    assert wanted is not None
    quote = forge.report(measurement=MEASURED, report_data=DATA) if quote is None else quote
    found = certificates_in(forge.certificates()) if found is None else found
    return check_snp(quote, found, wanted, NOW, roots(forge) if trusted is None else trusted)


@pytest.mark.parametrize("version", [2, 3, 5])
def test_a_guest_is_accepted(version: int) -> None:
    assert check(amd_forge().report(version, measurement=MEASURED, report_data=DATA)) == DATA


@pytest.mark.parametrize("product", ["Genoa", "Turin"])
def test_other_lines_are_accepted(product: Any) -> None:
    """Turin has another order of versions, and a chip id of 8 bytes."""
    forge = AmdForge(product, tcb=Tcb(bootloader=1, tee=2, snp=3, microcode=4, fmc=5 if product == "Turin" else 0))
    assert check(forge=forge) == DATA


def test_amds_roots_are_the_ones_that_count() -> None:
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is one to another root"):
        check(trusted={"Milan": "00" * 32})
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is one to another root"):
        check(trusted={"Genoa": next(iter(roots(amd_forge()).values()))})  # the root of another line
    wanted = policy(["sev-snp"], sev_snp={"measurement": [MEASURED.hex()]}).sev_snp
    assert wanted is not None
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is one to another root"):
        check_snp(amd_forge().report(measurement=MEASURED), certificates_in(amd_forge().certificates()), wanted, NOW)


@pytest.mark.parametrize("fault", ["signature", "other_key", "big_endian"])
def test_what_is_not_signed_is_refused(fault: Any) -> None:
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.signature is "):
        check(amd_forge().report(measurement=MEASURED, fault=fault))


@pytest.mark.parametrize(
    ("fields", "changes", "told"),
    [
        ({"policy": 0xB0000}, {"guest-policy": ["00000000000b0000"]}, "guest-policy is 0xb0000, which allows debug"),
        ({"policy": 0x70000}, {"guest-policy": ["0000000000070000"]}, "guest-policy is 0x70000, which allows migr"),
        ({"policy": 0x10000}, {"guest-policy": ["0000000000010000"]}, "guest-policy is .*without reserved"),
        ({"policy": 0x30000 | 1 << 26}, {}, "guest-policy is .*without reserved"),
        ({"policy": 0x20000}, {}, "guest-policy is 0000000000020000"),
        ({"version": 4}, {}, "version is 4"),
        ({"version": 1}, {}, "version is 1"),
        ({"signature_algo": 2}, {}, "signature-algorithm is 2"),
        ({"key_info": 1 << 2}, {}, "signing-key is 1"),
        ({"key_info": 7 << 2}, {}, "signing-key is 7"),
        ({"key_info": 1 << 1}, {}, "chip-id is "),
        ({"key_info": 1 << 5}, {}, "flags is "),
        ({"chip_id": b"\x01" * 64}, {}, "chip-id is 0101"),
        ({"vmpl": 1}, {}, "vmpl is 1"),
        ({"guest_svn": 1}, {"min-guest-svn": 2}, "guest-svn is 1, and not at least 2"),
        ({"host_data": b"\x01" * 32}, {"host-data": ["02" * 32]}, "host-data is 0101"),
        ({"id_key_digest": b"\x01" * 48}, {"id-key-digest": ["02" * 48]}, "id-key-digest is 0101"),
        ({"author_key_digest": b"\x01" * 48}, {"author-key-digest": ["02" * 48]}, "author-key-digest is 0101"),
        ({"family_id": b"\x01" * 16}, {"family-id": ["02" * 16]}, "family-id is 0101"),
        ({"image_id": b"\x01" * 16}, {"image-id": ["02" * 16]}, "image-id is 0101"),
        ({"platform_info": 1}, {"platform-info": ["0000000000000025"]}, "platform-info is 0000000000000001"),
        ({}, {"chip-id": ["02" * 64]}, "chip-id is "),
        ({}, {"measurement": ["02" * 48]}, "measurement is 4d4d"),
        ({}, {"products": ["Genoa"]}, "products is Milan"),
    ],
)
def test_a_guest_that_is_not_named_is_refused(fields: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    quote = amd_forge().report(**{"measurement": MEASURED, **fields})
    with pytest.raises(EvidenceRefused, match=rf"sev-snp\.{told}"):
        check(quote, section=changes)


@pytest.mark.parametrize("which", ["reported_tcb", "committed_tcb", "current_tcb", "launch_tcb"])
@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_each_part_of_each_tcb_has_a_least(which: str, part: str) -> None:
    whole = {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 213}
    low = Tcb(**{**whole, part: whole[part] - 1})
    forge = AmdForge(tcb=low) if which == "reported_tcb" else amd_forge()
    full = Tcb(**whole).encode("Milan")
    names = ("reported_tcb", "committed_tcb", "current_tcb", "launch_tcb")
    fields: dict[str, Any] = {name: low.encode("Milan") if name == which else full for name in names}
    field = which.replace("_", "-")
    with pytest.raises(EvidenceRefused, match=rf"sev-snp\.{field}\.{part} is {whole[part] - 1}, and not at least"):
        check(forge.report(measurement=MEASURED, **fields), forge=forge, section={"min-tcb": whole})


def test_a_certificate_of_another_tcb_is_refused() -> None:
    """A key of the chip as it was before an update signs nothing for after it."""
    newer = Tcb(bootloader=4, tee=1, snp=25, microcode=213).encode("Milan")
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.reported-tcb is "):
        check(amd_forge().report(measurement=MEASURED, reported_tcb=newer))


@pytest.mark.parametrize("at", [0x4C, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x1F8, 0x29F, 0x330, REPORT_BYTES - 1])
def test_reserved_bytes_are_refused(at: int) -> None:
    quote = bytearray(amd_forge().report(measurement=MEASURED))
    quote[at] = 1
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.reserved bytes at "):
        check(bytes(quote))


@pytest.mark.parametrize("at", [0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48])
def test_a_signature_has_one_form(at: int) -> None:
    quote = bytearray(amd_forge().report(measurement=MEASURED))
    quote[at] = 1
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.signature is a number of more than 384 bits"):
        check(bytes(quote))


def test_a_chain_that_others_signed_is_refused() -> None:
    forge, other = amd_forge(), AmdForge(root="another")
    own = certificates_in(forge.certificates()).certificates
    theirs = certificates_in(other.certificates()).certificates
    for mixed in ((own[0], theirs[1], own[2]), (theirs[0], own[1], own[2])):
        with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is a certificate with a wrong signature"):
            check(found=Found(mixed))
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is one to another root"):
        check(found=Found((own[0], own[1], theirs[2])))
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.certificates is without the root"):
        check(found=Found(own[:2]))
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.certificates is 2 of chips"):
        check(found=Found((*own, theirs[0])))
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.certificates is 0 of chips"):
        check(found=Found(own[1:]))


def test_the_same_certificates_may_come_twice() -> None:
    """With the report, and as collateral."""
    forge = amd_forge()
    own = certificates_in(forge.certificates())
    assert check(found=own + read_found(forge.vcek.der) + read_found(forge.ask_ark_pem.encode())) == DATA
    assert check(found=sum((own for _ in range(9)), Found())) == DATA


def test_a_certificate_that_has_ended_is_refused() -> None:
    forge = AmdForge(vcek_valid=(NOW - 2 * DAY, NOW - DAY))
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is a certificate not valid at 2026-01-01"):
        check(forge=forge)


def test_revocation_is_asked_where_the_policy_wants_it() -> None:
    forge = amd_forge()
    own = certificates_in(forge.certificates())
    assert check(found=own + read_found(forge.crl()), section={"revocation": "required"}) == DATA
    for listed, told in (
        (Found(), "unknown"),
        (read_found(forge.crl(revoke_ask=True)), "a certificate that was revoked"),
        (read_found(forge.crl(valid=(NOW - 9 * DAY, NOW - DAY))), "a list not valid"),
        (read_found(amd_forge("Genoa").crl()), "unknown"),
    ):
        with pytest.raises(EvidenceRefused, match=rf"sev-snp\.revocation is {told}"):
            check(found=own + listed, section={"revocation": "required"})
        assert check(found=own + listed) == DATA
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.chain is a revocation list with a wrong signature"):
        check(found=own + read_found(AmdForge(root="another").crl()), section={"revocation": "required"})


@pytest.mark.parametrize(
    "table",
    [
        b"\1" * 23,
        b"\1" * 24,
        b"\0" * 16 + b"\x18\0\0\0\0\0\0\0",
        b"\1" * 16 + b"\x18\0\0\0\xff\xff\xff\xff",
        certificate_table({"vcek": b"no certificate"}),
        (b"\1" * 16 + b"\0\0\0\0\1\0\0\0") * 40,
    ],
)
def test_a_table_that_is_none_is_refused(table: bytes) -> None:
    with pytest.raises(EvidenceRefused, match=r"sev-snp\.certificates is "):
        certificates_in(table)


def test_no_table_is_no_certificates() -> None:
    assert certificates_in(b"") == Found()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_mutated_or_cut_is_no_crash(data: st.DataObject) -> None:
    """No byte of a report may change, whichever."""
    quote = bytearray(amd_forge().report(measurement=MEASURED, report_data=DATA))
    plain = bytes(quote)
    for _ in range(data.draw(st.integers(1, 4))):
        quote[data.draw(st.integers(0, len(quote) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(quote)), st.integers(0, len(quote))))
    try:
        check(bytes(quote[:cut]))
    except EvidenceRefused:
        return
    assert bytes(quote[:cut]) == plain


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_mutated_table_is_no_crash(data: st.DataObject) -> None:
    table = bytearray(amd_forge().certificates())
    for _ in range(data.draw(st.integers(1, 4))):
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert check(found=certificates_in(bytes(table))) == DATA
    except EvidenceRefused:
        return
