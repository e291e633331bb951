"""Quotes of TDX and SGX under a root of the tests: accepted, and refused for each fault and each field."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tee.forge.certificates import DAY, NOW
from tests.tee.forge.intel import ENCLAVE_DEBUG, OTHER_FMSPC, TD_DEBUG, IntelForge, intel_forge
from tests.tee.policies import policy
from tsqp.errors import EvidenceRefused, OptionError
from tsqp.tee.quotes.intel import QVL, TDX_FIELDS, check_sgx, check_tdx

DATA = bytes(range(64))
MEASURED = b"\x4d" * 48
ENCLAVE = b"\x4e" * 32


def tdx(quote: bytes | None = None, section: dict[str, Any] | None = None, *, collateral: str | None = None) -> bytes:
    forge = intel_forge()
    wanted = policy(["tdx"], tdx={"mrtd": [MEASURED.hex()], **(section or {})}).tdx
    assert wanted is not None
    quote = forge.tdx(mr_td=MEASURED, report_data=DATA) if quote is None else quote
    return check_tdx(quote, collateral or forge.collateral(), wanted, NOW, forge.root_der)


def sgx(quote: bytes | None = None, section: dict[str, Any] | None = None, *, collateral: str | None = None) -> bytes:
    forge = intel_forge()
    wanted = policy(["sgx"], sgx={"mrenclave": [ENCLAVE.hex()], **(section or {})}).sgx
    assert wanted is not None
    quote = forge.sgx(mr_enclave=ENCLAVE, report_data=DATA) if quote is None else quote
    return check_sgx(quote, collateral or forge.collateral("sgx"), wanted, NOW, forge.root_der)


@pytest.mark.parametrize("version", [4, 5])
def test_a_guest_is_accepted(version: int) -> None:
    assert tdx(intel_forge().tdx(version=version, mr_td=MEASURED, report_data=DATA)) == DATA


def test_an_enclave_is_accepted() -> None:
    assert sgx() == DATA


def test_intels_root_is_the_one_that_counts() -> None:
    """Without the root of the tests a forged quote is one."""
    forge = intel_forge()
    wanted = policy(["tdx"], tdx={"mrtd": [MEASURED.hex()]}).tdx
    assert wanted is not None
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
        check_tdx(forge.tdx(mr_td=MEASURED), forge.collateral(), wanted, NOW)
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
        check_tdx(forge.tdx(mr_td=MEASURED), forge.collateral(), wanted, NOW, IntelForge().root_der)


@pytest.mark.parametrize("fault", ["signature", "qe_signature", "qe_binding"])
def test_what_is_not_signed_is_refused(fault: Any) -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
        tdx(intel_forge().tdx(mr_td=MEASURED, fault=fault))
    with pytest.raises(EvidenceRefused, match=r"sgx\.quote is not valid"):
        sgx(intel_forge().sgx(mr_enclave=ENCLAVE, fault=fault))


def test_a_guest_that_can_be_debugged_is_refused() -> None:
    """Whatever its policy names."""
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid .*Debug"):
        tdx(intel_forge().tdx(mr_td=MEASURED, td_attributes=TD_DEBUG), {"attributes": [TD_DEBUG.hex()]})
    with pytest.raises(EvidenceRefused, match=r"sgx\.quote is not valid .*Debug"):
        sgx(intel_forge().sgx(mr_enclave=ENCLAVE, attributes=ENCLAVE_DEBUG), {"attributes": [ENCLAVE_DEBUG.hex()]})


def test_a_guest_that_another_may_move_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid .*service TD"):
        tdx(intel_forge().tdx(version=5, mr_td=MEASURED, mr_service_td=b"\1" * 48))


@pytest.mark.parametrize("field", sorted(set(TDX_FIELDS) - {"mrtd"}))
@pytest.mark.parametrize("version", [4, 5])
def test_each_measurement_is_compared(field: str, version: int) -> None:
    """With its own field of the report: each has another value there."""
    quote = intel_forge().tdx(version=version, mr_td=MEASURED)
    size = 8 if field in ("attributes", "xfam") else 48
    with pytest.raises(EvidenceRefused, match=rf"tdx\.{field} is ") as raised:
        tdx(quote, {field: ["5a" * size]})
    found = str(raised.value).split(" is ")[1].split(",")[0]
    assert tdx(quote, {field: [found]})


@pytest.mark.parametrize(
    ("told_of_it", "told"),
    [
        ({"status": "OutOfDate"}, r"tdx\.(tcb-status is OutOfDate|quote is)"),
        ({"status": "SWHardeningNeeded"}, r"tdx\.tcb-status is SWHardeningNeeded"),
        ({"status": "Revoked"}, r"tdx\.(quote|tcb-status) is "),
        ({"qe_status": "OutOfDate"}, r"tdx\.(quote|tcb-status) is "),
        ({"module_status": "OutOfDate"}, r"tdx\.(quote|tcb-status) is "),
        ({"required_cpu_svn": bytes([9] * 16)}, r"tdx\.(quote|tcb-status) is "),
        ({"advisories": ["INTEL-SA-00001"]}, r"tdx\.advisories is INTEL-SA-00001, .*none"),
        ({"fmspc": OTHER_FMSPC}, r"tdx\.quote is "),
        ({"revoke_pck": True}, r"tdx\.quote is "),
        ({"revoke_authority": True}, r"tdx\.quote is "),
        ({"valid": (NOW - 40 * DAY, NOW - 10 * DAY)}, r"tdx\.quote is "),
        ({"crl_valid": (NOW - 40 * DAY, NOW - 10 * DAY)}, r"tdx\.quote is "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_platform_that_is_not_up_to_date_is_refused(told_of_it: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=told):
        tdx(collateral=intel_forge().collateral(**told_of_it))


def test_a_policy_may_take_what_it_names() -> None:
    platform = intel_forge().collateral(status="SWHardeningNeeded", advisories=["INTEL-SA-00001"])
    status = {"tcb-status": ["SWHardeningNeeded"], "advisories": ["INTEL-SA-00001"]}
    assert tdx(None, status, collateral=platform) == DATA


def test_another_platform_is_refused() -> None:
    other = IntelForge(fmspc=OTHER_FMSPC)
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is "):
        tdx(other.tdx(mr_td=MEASURED))
    with pytest.raises(EvidenceRefused, match=r"tdx\.fmspc is F0F1F2000000"):
        tdx(None, {"fmspc": ["0F0F0F000000"]})


def test_a_certificate_that_has_ended_is_refused() -> None:
    old = IntelForge(pck_valid=(NOW - 100 * DAY, NOW - DAY))
    wanted = policy(["tdx"], tdx={"mrtd": [MEASURED.hex()]}).tdx
    assert wanted is not None
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is "):
        check_tdx(old.tdx(mr_td=MEASURED), old.collateral(), wanted, NOW, old.root_der)


def test_the_least_version_of_each_part_is_required() -> None:
    assert tdx(None, {"min-tee-tcb-svn": "050102" + "00" * 13})
    with pytest.raises(EvidenceRefused, match=r"tdx\.tee-tcb-svn\[1\] is 1, and not at least 2"):
        tdx(None, {"min-tee-tcb-svn": "0502" + "00" * 14})


@pytest.mark.parametrize(
    ("fields", "changes", "told"),
    [
        ({}, {"mrenclave": ["00" * 32]}, "mrenclave is 4e4e"),
        ({"mr_signer": b"\x51" * 32}, {"mrsigner": ["52" * 32]}, "mrsigner is 5151"),
        ({"isv_prod_id": 7}, {"isv-prod-id": [8, 9]}, "isv-prod-id is 7"),
        ({"isv_svn": 3}, {"min-isv-svn": 4}, "isv-svn is 3, and not at least 4"),
        ({}, {"attributes": ["04" + "00" * 15]}, "attributes is 0500"),
    ],
)
def test_an_enclave_that_the_policy_does_not_name_is_refused(
    fields: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(EvidenceRefused, match=rf"sgx\.{told}"):
        sgx(intel_forge().sgx(mr_enclave=ENCLAVE, **fields), changes)


def test_one_kind_is_not_taken_for_the_other() -> None:
    forge = intel_forge()
    with pytest.raises(EvidenceRefused, match=r"sgx\.quote is of the kind TD10"):
        sgx(forge.tdx(), collateral=forge.collateral("tdx"))
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is of the kind SgxEnclave"):
        tdx(forge.sgx(), collateral=forge.collateral("sgx"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_mutated_or_cut_is_no_crash(data: st.DataObject) -> None:
    """Whatever is accepted says what was signed."""
    quote = bytearray(intel_forge().tdx(mr_td=MEASURED, report_data=DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(quote) - 1))
        quote[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(quote)), st.integers(0, len(quote))))
    try:
        found = tdx(bytes(quote[:cut]))
    except EvidenceRefused:
        return
    assert found == DATA


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is for this interpreter, and for what the extra of pyproject.toml says."""
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)
    with pytest.raises(OptionError) as refused:
        tdx()
    assert str(refused.value).endswith(f": {sys.executable} -m pip install '{QVL}'")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["optional-dependencies"]["verify"] == [QVL]
