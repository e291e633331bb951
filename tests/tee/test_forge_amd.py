"""Forged reports of SEV-SNP: signatures and chains hold, each fault breaks one, and the form is that of real ones."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tests.tee.forge import amd, layout
from tests.tee.forge.amd import AmdForge, Product, ReportFault, Tcb, amd_forge
from tests.tee.forge.layout import SNP_REPORT, SNP_REPORT_BYTES, SNP_SIGNED_BYTES
from tests.tee.real_evidence import real

FORGE = amd_forge()
# Real reports with the certificate of their processor, and where the report begins in its file.
REAL = {
    "snp/milan_v2_debug_report.bin": (0, "snp/milan_v2_vcek.der"),
    "snp/milan_v3_report.bin": (4, "snp/milan_v3_vcek.pem"),
}


def field(report: bytes, name: str) -> bytes:
    return layout.field(SNP_REPORT, report, name)


def check(report: bytes, vcek: x509.Certificate) -> None:
    """Raises InvalidSignature where the certificate's key did not sign."""
    r, s = (int.from_bytes(field(report, name), "little") for name in ("signature_r", "signature_s"))
    key = vcek.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(r, s), report[:SNP_SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))


def certificate(data: bytes) -> x509.Certificate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AMD gives each processor's certificate the serial number 0
        if data.startswith(b"-----"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)


def extensions(vcek: x509.Certificate) -> dict[str, bytes]:
    """AMD's, by the end of their identifiers."""
    return {
        extension.oid.dotted_string.removeprefix(f"{amd.AMD}."): extension.value.public_bytes()
        for extension in vcek.extensions
    }


@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_a_report_is_signed_by_its_processor_whose_chain_holds(product: Product, version: int) -> None:
    forge = amd_forge(product)
    report = forge.report(version)
    assert len(report) == SNP_REPORT_BYTES
    check(report, forge.vcek.certificate)
    forge.vcek.certificate.verify_directly_issued_by(forge.ask.certificate)
    forge.ask.certificate.verify_directly_issued_by(forge.ark.certificate)
    forge.ark.certificate.verify_directly_issued_by(forge.ark.certificate)
    assert any(field(report, "cpuid_family")) == (version >= 3)


@pytest.mark.parametrize("fault", ["signature", "other_key", "big_endian"])
def test_each_fault_breaks_the_signature(fault: ReportFault) -> None:
    with pytest.raises((InvalidSignature, ValueError)):
        check(FORGE.report(fault=fault), FORGE.vcek.certificate)


def test_a_chain_of_another_root_does_not_hold() -> None:
    other = AmdForge(root="another")
    for forged, issuer in ((other.vcek, FORGE.ask), (other.ask, FORGE.ark)):
        with pytest.raises(InvalidSignature):
            forged.certificate.verify_directly_issued_by(issuer.certificate)


def test_two_processors_of_one_line_have_keys_of_their_own() -> None:
    with pytest.raises(InvalidSignature):
        check(AmdForge().report(), FORGE.vcek.certificate)


@pytest.mark.parametrize("revoke", [False, True])
def test_the_revocation_list_is_signed_by_the_root(revoke: bool) -> None:
    crl = x509.load_der_x509_crl(FORGE.crl(revoke_ask=revoke))
    key = FORGE.ark.certificate.public_key()
    assert crl.is_signature_valid(key)  # type: ignore[arg-type]
    assert not crl.is_signature_valid(FORGE.ask.certificate.public_key())  # type: ignore[arg-type]
    assert (crl.get_revoked_certificate_by_serial_number(FORGE.ask.serial) is not None) == revoke


def test_each_field_of_a_report_can_be_set_and_is_signed() -> None:
    for name, (offset, size) in SNP_REPORT.items():
        if name == "version" or offset >= SNP_SIGNED_BYTES:
            continue
        content = bytes(range(1, size + 1))
        fields: dict[str, Any] = {name: content}
        report = FORGE.report(**fields)
        assert field(report, name) == content == report[offset : offset + size]
        check(report, FORGE.vcek.certificate)


def test_the_versions_of_a_turin_are_in_an_order_of_their_own() -> None:
    tcb = Tcb(bootloader=2, tee=3, snp=4, microcode=5, fmc=1)
    assert tcb.encode("Turin").hex() == "0102030400000005"
    assert tcb.encode("Genoa").hex() == "0203000000000405"


def test_a_certificate_table_has_guids_as_they_are_written() -> None:
    table = FORGE.certificates()
    parts = {"vcek": FORGE.vcek.der, "ask": FORGE.ask.der, "ark": FORGE.ark.der}
    assert table[:16].hex() == "63da758de6644564adc5f4b93be8accd"
    for number, (name, content) in enumerate(parts.items()):
        entry = table[24 * number : 24 * (number + 1)]
        offset, length = (int.from_bytes(entry[at : at + 4], "little") for at in (16, 20))
        assert (str(uuid.UUID(bytes=entry[:16])), table[offset : offset + length]) == (amd.GUIDS[name], content)
    assert table[72:96] == bytes(24)


def test_a_debug_policy_is_one_bit_of_a_plain_one() -> None:
    assert FORGE.report(policy=amd.POLICY_DEBUG)[8:16].hex() == "00000b0000000000"
    assert FORGE.report()[8:16].hex() == "0000030000000000"


# --- The form of what is real ---


@pytest.mark.parametrize("file", REAL)
def test_a_real_report_verifies_with_fields_where_the_forge_puts_them(file: str) -> None:
    offset, of = REAL[file]
    report, vcek = real(file)[offset : offset + SNP_REPORT_BYTES], certificate(real(of))
    check(report, vcek)
    found = extensions(vcek)
    assert field(report, "chip_id") == found["4"]
    numbers = {path: int.from_bytes(content[2:], "big") for path, content in found.items() if path.startswith("3.")}
    tcb = Tcb(numbers["3.1"], numbers["3.2"], numbers["3.3"], numbers["3.8"])
    assert field(report, "reported_tcb") == tcb.encode("Milan")
    forged = FORGE.report(report[0])
    constant: tuple[str, ...] = ("version", "signature_algo")
    if report[0] >= 3:
        constant = (*constant, "cpuid_family", "cpuid_model", "cpuid_stepping", "report_id_ma")
    assert [field(report, name) for name in constant] == [field(forged, name) for name in constant]
    assert field(report, "policy")[2] & 2  # the bit that is always set
    spare = bytearray(report)
    for at, size in SNP_REPORT.values():
        spare[at : at + size] = bytes(size)
    assert not any(spare)  # nothing of it is in a place that the forge does not know


@pytest.mark.parametrize("of", ["snp/milan_v2_vcek.der", "snp/milan_v3_vcek.pem"])
def test_a_real_processors_certificate_has_the_extensions_of_a_forged_one(of: str) -> None:
    theirs, ours = certificate(real(of)), FORGE.vcek.certificate
    assert list(extensions(theirs)) == list(extensions(ours))
    for path in ("1", "2", "4"):
        assert len(extensions(theirs)[path]) == len(extensions(ours)[path])
    assert theirs.signature_algorithm_oid == ours.signature_algorithm_oid
    pss: Any = theirs.signature_algorithm_parameters
    forged: Any = ours.signature_algorithm_parameters
    assert (pss.mgf._algorithm.name, pss._salt_length) == (forged.mgf._algorithm.name, forged._salt_length)
