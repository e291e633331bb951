"""Published quotes of TDX and SGX: accepted at their time, and refused for each thing that may be wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.tee.policies import policy
from tests.tee.real_evidence import real
from tsqp.errors import EvidenceRefused
from tsqp.tee.policy import SgxPolicy, TdxPolicy
from tsqp.tee.quotes.intel import check_sgx, check_tdx

pytest.importorskip("dcap_qvl", reason="quotes of Intel need dcap-qvl: the extra verify")

MRTD = "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7"
MRENCLAVE = "33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"
VALID_AT = 1_750_464_000  # 2025-06-21, within 30 days of what Intel said of its platforms
DAY_S = 86_400
TD_HEADER, TD_REPORT = 48, 584


def tdx_policy(**changes: Any) -> TdxPolicy:
    found = policy(["tdx"], tdx={"mrtd": [MRTD], "fmspc": ["B0C06F000000"], **changes}).tdx
    assert found is not None
    return found


def sgx_policy(**changes: Any) -> SgxPolicy:
    status = {"tcb-status": ["ConfigurationAndSWHardeningNeeded"]}
    found = policy(["sgx"], sgx={"mrenclave": [MRENCLAVE], **status, **changes}).sgx
    assert found is not None
    return found


def tdx(quote: bytes | None = None, now: float = VALID_AT, **changes: Any) -> bytes:
    given = real("tdx/quote.bin") if quote is None else quote
    return check_tdx(given, real("tdx/collateral.json").decode(), tdx_policy(**changes), now)


def test_a_td_is_accepted_at_its_time() -> None:
    at = TD_HEADER + 520
    assert tdx() == real("tdx/quote.bin")[at : at + 64]


def test_an_enclave_is_accepted_at_its_time() -> None:
    found = check_sgx(real("sgx/quote.bin"), real("sgx/collateral.json").decode(), sgx_policy(), VALID_AT)
    assert found == b"Hello, world!".ljust(64, b"\0")


@pytest.mark.parametrize(("days", "told"), [(-30, "future"), (40, "expired")])
def test_collateral_of_another_time_is_refused(days: int, told: str) -> None:
    with pytest.raises(EvidenceRefused, match=rf"tdx\.quote is not valid \(.*{told}"):
        tdx(now=VALID_AT + days * DAY_S)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mrtd": ["00" * 48]}, r"tdx\.mrtd is 91eb2b44"),
        ({"rtmr3": ["11" * 48]}, r"tdx\.rtmr3 is 0000"),
        ({"mrseam": ["11" * 48]}, r"tdx\.mrseam is 5b38e33a"),
        ({"attributes": ["0000000000000000"]}, r"tdx\.attributes is 0000001000000000"),
        ({"xfam": ["e702060000000001"]}, r"tdx\.xfam is e702060000000000"),
        ({"fmspc": ["00906ED50000"]}, r"tdx\.fmspc is B0C06F000000"),
        ({"min-tee-tcb-svn": "06010400000000000000000000000000"}, r"tdx\.tee-tcb-svn\[2\] is 3, and not at least 4"),
        ({"tcb-status": ["OutOfDate"]}, r"tdx\.tcb-status is UpToDate"),
    ],
)
def test_a_td_that_the_policy_does_not_name_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=told):
        tdx(**changes)


def test_a_platform_of_another_line_is_refused() -> None:
    """Collateral for other processors, genuine as it is."""
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
        check_tdx(real("tdx/quote.bin"), real("sgx/collateral.json").decode(), tdx_policy(), VALID_AT)


def test_a_platform_out_of_date_is_refused() -> None:
    """Its time is that of its collateral."""
    collateral = real("tdx/collateral_outdated.json").decode()
    about = json.loads(json.loads(collateral)["tcb_info"])
    assert about["issueDate"].startswith("2026-02-18")
    now = 1_771_500_000  # the day after
    with pytest.raises(EvidenceRefused, match=r"tdx\.(quote|tcb-status) is "):
        check_tdx(real("tdx/quote_outdated.bin"), collateral, tdx_policy(), now)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tcb-status": ["UpToDate"]}, r"sgx\.tcb-status is ConfigurationAndSWHardeningNeeded"),
        ({"advisories": ["INTEL-SA-00289"]}, r"sgx\.advisories is INTEL-SA-00615"),
        ({"mrenclave": ["00" * 32]}, r"sgx\.mrenclave is 33d8736d"),
        ({"mrsigner": ["00" * 32]}, r"sgx\.mrsigner is 815f42f1"),
        ({"isv-prod-id": [1]}, r"sgx\.isv-prod-id is 0"),
        ({"min-isv-svn": 1}, r"sgx\.isv-svn is 0, and not at least 1"),
        ({"attributes": ["07" + "00" * 15]}, r"sgx\.attributes is 0500"),
    ],
)
def test_an_enclave_that_the_policy_does_not_name_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=told):
        check_sgx(real("sgx/quote.bin"), real("sgx/collateral.json").decode(), sgx_policy(**changes), VALID_AT)


def test_one_kind_is_not_taken_for_the_other() -> None:
    with pytest.raises(EvidenceRefused, match=r"sgx\.quote is of the kind TD10"):
        check_sgx(
            real("tdx/quote.bin"),
            real("tdx/collateral.json").decode(),
            sgx_policy(**{"tcb-status": ["UpToDate"]}),
            VALID_AT,
        )


def uncovered(quote: bytes) -> list[tuple[int, int, str]]:
    """Bytes of a v4 quote that no signature covers, and why it does not matter: begin, end, why.

    All others have to be refused when they change.
    """
    signed = TD_HEADER + TD_REPORT
    end = signed + 4 + 64 + 64
    chain, last = quote.index(b"-----BEGIN"), quote.rindex(b"-----BEGIN")
    return [
        (signed, signed + 4, "the size of the rest, which zeros follow"),
        (end, end + 2, "the kind of certification data, of which there is one"),
        (chain - 4, chain, "the size of the chain, which zeros follow: certificates are found by their lines of PEM"),
        *((at, at + 1, "an end of line of PEM") for at in range(chain, last) if quote[at] == ord("\n")),
        (last, len(quote), "a copy of the root, which nobody uses: the verifier has its own; zeros at the end"),
    ]


@pytest.mark.parametrize("part", range(8))
def test_a_changed_byte_is_refused(part: int) -> None:
    """Every byte of the signed part and of the signature; every seventh of the certificates."""
    quote = real("tdx/quote.bin")
    free = uncovered(quote)
    places = [at for at in range(len(quote)) if at < 1300 or at % 7 == 0][part::8]
    collateral, wanted = real("tdx/collateral.json").decode(), tdx_policy()
    plain = check_tdx(quote, collateral, wanted, VALID_AT)
    for at in places:
        changed = bytearray(quote)
        changed[at] ^= 1 << (at % 8)
        try:
            found = check_tdx(bytes(changed), collateral, wanted, VALID_AT)
        except EvidenceRefused:
            continue
        assert any(begin <= at < end for begin, end, _ in free), f"byte {at} may change"
        assert found == plain


@pytest.mark.parametrize("size", [0, 1, 47, 48, 631, 632, 636, 700, 1300, 3000, 4900])
def test_a_short_quote_is_refused(size: int) -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote is not valid"):
        tdx(real("tdx/quote.bin")[:size])


@pytest.mark.parametrize("collateral", ["", "{}", "[]", '{"tcb_info": 1}', "\0" * 100], ids=repr)
def test_collateral_that_is_none_is_refused(collateral: str) -> None:
    with pytest.raises(EvidenceRefused, match=r"tdx\.(collateral|quote) is "):
        check_tdx(real("tdx/quote.bin"), collateral, tdx_policy(), VALID_AT)
