"""What is forged is taken by a verifier that others wrote, each fault is not, and the form is that of real evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import dcap_qvl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tee.forge import der, intel, layout
from tests.tee.forge.certificates import DAY, FOR_YEARS, NOW
from tests.tee.forge.collateral import Tee
from tests.tee.forge.intel import IntelForge, QuoteFault, intel_forge
from tests.tee.real_evidence import real

FORGE = intel_forge()
LONG_AGO = (NOW - 90 * DAY, NOW - DAY)
COLLATERAL: dict[Tee, str] = {"tdx": FORGE.collateral("tdx"), "sgx": FORGE.collateral("sgx")}
QUOTES: dict[str, tuple[Tee, Callable[..., bytes]]] = {
    "tdx v4": ("tdx", FORGE.tdx),
    "tdx v5": ("tdx", lambda **options: FORGE.tdx(version=5, **options)),
    "sgx v3": ("sgx", FORGE.sgx),
}

each_quote = pytest.mark.parametrize("kind", QUOTES)


def status(quote: bytes, collateral: str, *, root: bytes = FORGE.root_der, now: int = NOW) -> str:
    """What dcap-qvl says of the platform. Raises ValueError where it refuses."""
    return dcap_qvl.verify_with_root_ca(quote, dcap_qvl.QuoteCollateralV3.from_json(collateral), root, now).status


@each_quote
def test_a_forged_quote_verifies_under_the_root_of_the_tests_alone(kind: str) -> None:
    tee, make = QUOTES[kind]
    assert status(make(), COLLATERAL[tee]) == "UpToDate"
    with pytest.raises(ValueError, match="InvalidCrlSignature"):
        dcap_qvl.verify(make(), dcap_qvl.QuoteCollateralV3.from_json(COLLATERAL[tee]), NOW)


@each_quote
@pytest.mark.parametrize(
    ("fault", "refusal"),
    [
        ("signature", "report signature is invalid"),
        ("qe_signature", "invalid for qe_report"),
        ("qe_binding", "QE report hash mismatch"),
    ],
)
def test_each_fault_of_a_quote_is_refused(kind: str, fault: QuoteFault, refusal: str) -> None:
    tee, make = QUOTES[kind]
    with pytest.raises(ValueError, match=refusal):
        status(make(fault=fault), COLLATERAL[tee])


@each_quote
@pytest.mark.parametrize(
    ("header", "refusal"),
    [
        ({"version": 6}, "Unsupported quote version|Failed to decode"),
        ({"attestation_key_type": 3}, "attestation key type"),
        ({"qe_vendor_id": bytes(16)}, "vendor"),
        ({"tee_type": 0x82}, "TEE type|Failed to decode"),
    ],
    ids=str,
)
def test_a_header_of_another_kind_is_refused(kind: str, header: dict[str, Any], refusal: str) -> None:
    """Signed all the same: it is the value that is refused, and not the signature."""
    tee, make = QUOTES[kind]
    with pytest.raises(ValueError, match=refusal):
        status(make(header=header), COLLATERAL[tee])


@pytest.mark.parametrize(
    ("kind", "debug"),
    [
        ("tdx v4", {"td_attributes": intel.TD_DEBUG}),
        ("tdx v5", {"td_attributes": intel.TD_DEBUG}),
        ("sgx v3", {"attributes": intel.ENCLAVE_DEBUG}),
    ],
    ids=str,
)
def test_debug_is_refused(kind: str, debug: dict[str, bytes]) -> None:
    tee, make = QUOTES[kind]
    with pytest.raises(ValueError, match="Debug"):
        status(make(**debug), COLLATERAL[tee])


@each_quote
def test_the_chain_of_another_platform_is_refused(kind: str) -> None:
    other = IntelForge()
    tee, make = QUOTES[kind]
    with pytest.raises(ValueError, match="certificate chain"):
        status(make(pck_chain=other.pck_chain), COLLATERAL[tee])
    with pytest.raises(ValueError, match="InvalidCrlSignature"):
        status(make(), other.collateral(tee))


@pytest.mark.parametrize("tee", ["tdx", "sgx"])
@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"fmspc": intel.OTHER_FMSPC}, "Fmspc mismatch"),
        ({"revoke_pck": True}, "CertRevoked"),
        ({"revoke_authority": True}, "CertRevoked"),
        ({"status": "Revoked"}, "Revoked"),
        ({"qe_status": "Revoked"}, "Revoked"),
        ({"crl_valid": LONG_AGO}, "CrlExpired"),
        ({"valid": LONG_AGO, "crl_valid": FOR_YEARS}, "TCBInfo expired"),
        ({"valid": (NOW + DAY, NOW + 9 * DAY), "crl_valid": FOR_YEARS}, "in the future"),
    ],
    ids=str,
)
def test_each_fault_of_the_collateral_is_refused(tee: Tee, options: dict[str, Any], refusal: str) -> None:
    quote = FORGE.tdx() if tee == "tdx" else FORGE.sgx()
    with pytest.raises(ValueError, match=refusal):
        status(quote, FORGE.collateral(tee, **options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"status": "SWHardeningNeeded", "advisories": ["INTEL-SA-00002"]}, "SWHardeningNeeded"),
        ({"status": "OutOfDate"}, "OutOfDate"),
        ({"required_cpu_svn": b"\x09" * 16}, "OutOfDate"),
        ({"qe_status": "OutOfDate"}, "OutOfDate"),
        ({"module_status": "OutOfDate"}, "OutOfDate"),
    ],
    ids=str,
)
def test_a_platform_that_is_behind_is_named_and_refused_by_a_strict_policy(
    options: dict[str, Any], expected: str
) -> None:
    """``verify`` alone lets it pass: who calls it has to look at the status."""
    collateral = FORGE.collateral("tdx", **options)
    assert status(FORGE.tdx(), collateral) == expected
    strict = dcap_qvl.QuotePolicy.strict(NOW).allow_dynamic_platform(True).allow_cached_keys(True).allow_smt(True)
    verifier = dcap_qvl.QuoteVerifier(FORGE.root_der)
    verifier.verify_with_policy(FORGE.tdx(), dcap_qvl.QuoteCollateralV3.from_json(COLLATERAL["tdx"]), NOW, strict)
    with pytest.raises(ValueError, match=expected):
        verifier.verify_with_policy(FORGE.tdx(), dcap_qvl.QuoteCollateralV3.from_json(collateral), NOW, strict)


def test_an_expired_certificate_of_a_platform_is_refused() -> None:
    expired = IntelForge(pck_valid=LONG_AGO)
    with pytest.raises(ValueError, match="CertExpired"):
        status(expired.tdx(), expired.collateral(), root=expired.root_der)


def test_collateral_of_the_other_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="QE Identity"):
        status(FORGE.tdx(), COLLATERAL["sgx"])


@each_quote
@settings(max_examples=40)
@given(st.data())
def test_a_changed_bit_of_what_is_signed_is_refused(kind: str, data: st.DataObject) -> None:
    tee, make = QUOTES[kind]
    size = {"tdx v4": 48 + 584, "tdx v5": 48 + 6 + 648, "sgx v3": 48 + 384}[kind]
    quote = bytearray(make())
    quote[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"failed|decode"):
        status(bytes(quote), COLLATERAL[tee])


FIELDS = {
    "tdx v4": layout.TD_REPORT_10,
    "tdx v5": layout.TD_REPORT_15,
    "sgx v3": {
        name: place for name, place in layout.ENCLAVE_REPORT.items() if not name.startswith(("reserved", "misc", "isv"))
    },
}


@each_quote
def test_each_field_is_read_back_as_it_was_set(kind: str) -> None:
    for name, (_, size) in FIELDS[kind].items():
        content = bytes(range(1, size + 1))
        report = dcap_qvl.parse_quote(QUOTES[kind][1](**{name: content})).report
        assert getattr(report, name) == content, name


@pytest.mark.parametrize("name", ["mr_tdx", "report_datum"])
def test_a_field_that_does_not_exist_is_no_refusal_but_an_error(name: str) -> None:
    fields: dict[str, Any] = {name: bytes(48)}
    with pytest.raises(ValueError, match="no field"):
        FORGE.tdx(**fields)
    with pytest.raises(ValueError, match="has 48 bytes"):
        FORGE.tdx(mr_td=bytes(47))


@given(st.integers(0, 1 << 70))
def test_a_der_integer_is_one_that_is_not_negative(number: int) -> None:
    encoded = der.integer(number)
    assert encoded[:2] == bytes([2, len(encoded) - 2])
    assert int.from_bytes(encoded[2:], "big", signed=True) == number
    assert len(encoded) == 3 or not (encoded[2] == 0 and encoded[3] < 128)  # the shortest form


def test_der_identifiers_and_long_values() -> None:
    assert der.identifier("1.2.840.113741.1.13.1").hex() == "06092a864886f84d010d01"
    assert der.octets(bytes(127))[:2] == b"\x04\x7f"
    assert der.octets(bytes(128))[:3] == b"\x04\x81\x80"
    assert der.octets(bytes(300))[:4] == b"\x04\x82\x01\x2c"


# --- The form of what is real ---


@pytest.mark.parametrize(("file", "kind"), [("tdx/quote.bin", "tdx v4"), ("sgx/quote.bin", "sgx v3")])
def test_the_fields_of_a_real_quote_are_where_the_forge_puts_them(file: str, kind: str) -> None:
    quote = real(file)
    report = dcap_qvl.parse_quote(quote).report
    for name in FIELDS[kind]:
        assert layout.field(FIELDS[kind], quote[layout.HEADER_BYTES :], name) == getattr(report, name), name
    assert layout.field(layout.QUOTE_HEADER, quote, "qe_vendor_id") == intel.INTEL_VENDOR
    forged = QUOTES[kind][1]()
    for name in ("version", "attestation_key_type", "tee_type"):
        assert layout.field(layout.QUOTE_HEADER, quote, name) == layout.field(layout.QUOTE_HEADER, forged, name)


def test_a_real_platform_says_of_itself_what_a_forged_one_says() -> None:
    """Each identifier of Intel's extension has a value of the same size in both."""
    extension = dcap_qvl.parse_quote(real("tdx/quote.bin")).pck_extension()
    forged = dcap_qvl.parse_quote(FORGE.tdx()).pck_extension()
    assert extension is not None
    assert forged is not None
    assert (forged.fmspc, forged.cpu_svn, forged.pce_svn) == (intel.FMSPC, intel.CPU_SVN, intel.PCE_SVN)
    paths = [*(str(n) for n in range(1, 8)), *(f"2.{n}" for n in range(1, 19)), "7.1", "7.2", "7.3"]
    for path in paths:
        theirs, ours = (found.get_value(f"{intel.SGX_EXTENSION}.{path}") for found in (extension, forged))
        assert theirs is not None
        assert ours is not None
        assert len(theirs) == len(ours), path


@pytest.mark.parametrize("tee", ["tdx", "sgx"])
def test_real_collateral_has_the_same_form(tee: Tee) -> None:
    theirs, ours = json.loads(real(f"{tee}/collateral.json")), json.loads(COLLATERAL[tee])
    assert {name for name in theirs if name != "pck_certificate_chain"} == ours.keys()
    for part in ("tcb_info", "qe_identity"):
        real_part, forged_part = json.loads(theirs[part]), json.loads(ours[part])
        assert form(real_part) == form(forged_part)


def form(part: dict[str, Any]) -> dict[str, Any]:
    """Names and types, and the sizes of hexadecimal texts; of a list the first; without what may be left out."""
    found: dict[str, Any] = {}
    for name, value in part.items():
        match value:
            case dict():
                found[name] = form(value)
            case [dict(first), *_]:
                found[name] = form(first)
            case str() if set(value) <= set("0123456789abcdefABCDEF"):
                found[name] = len(value)
            case _:
                found[name] = type(value)
    for optional in ("advisoryIDs", "category", "type"):
        found.pop(optional, None)
    return found
