"""Quotes from fakes of configfs-tsm and Gramine: what is asked for comes back, and each failure says what it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import dcap_qvl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tee.fake_gramine import FakeGramine
from tests.tee.fake_providers import KINDS, fake_of, quote_maker
from tests.tee.fake_tsm import FakeTsm
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.certificates import NOW
from tests.tee.forge.intel import intel_forge
from tests.tee.real_evidence import real
from tsqp.errors import OptionError, ProviderFailed
from tsqp.tee.evidence import MAX_QUOTE_BYTES, Kind, Quote
from tsqp.tee.providers import ConfigfsTsm, Gramine, NoTee, provider_of, report_data_of

ASKED = bytes(range(64))
OTHER = bytes(range(64, 128))

each_kind = pytest.mark.parametrize("kind", KINDS)
of_linux = pytest.mark.parametrize("kind", ["tdx", "sev-snp"])


def tsm_of(kind: str) -> tuple[FakeTsm, ConfigfsTsm]:
    fake, provider = fake_of(kind)
    assert isinstance(fake, FakeTsm)
    assert isinstance(provider, ConfigfsTsm)
    return fake, provider


@each_kind
def test_a_quote_is_over_what_was_asked(kind: str) -> None:
    _, provider = fake_of(kind)
    assert provider.kind() == kind
    for asked in (ASKED, OTHER):
        quote = provider.quote(asked)
        assert (quote.kind, report_data_of(quote)) == (kind, asked)
        assert quote.certificates == (amd_forge().certificates() if kind == "sev-snp" else b"")


def test_what_comes_out_is_what_the_tee_signed() -> None:
    _, provider = fake_of("tdx")
    forge = intel_forge()
    collateral = dcap_qvl.QuoteCollateralV3.from_json(forge.collateral("tdx"))
    dcap_qvl.verify_with_root_ca(provider.quote(ASKED).quote, collateral, forge.root_der, NOW)


def test_a_tdx_quote_of_version_5_answers_too() -> None:
    fake, provider = tsm_of("tdx")
    fake.make_quote = quote_maker("tdx v5")
    assert report_data_of(provider.quote(ASKED)) == ASKED


@of_linux
def test_each_question_has_a_directory_of_its_own_that_goes_with_it(kind: str) -> None:
    fake, provider = tsm_of(kind)
    provider.quote(ASKED)
    provider.quote(ASKED)
    fake.make_quote = lambda _: b""
    with pytest.raises(ProviderFailed):
        provider.quote(ASKED)
    assert len(set(fake.made)) == 3
    assert fake.entries == {}


@of_linux
def test_a_directory_that_was_given_is_used_for_every_question_and_stays(kind: str) -> None:
    fake, _ = tsm_of(kind)
    given = fake.root / "tsqp"
    fake.make(given)
    provider = ConfigfsTsm(fake.root, fake, entry=given)
    assert provider.kind() == kind
    for asked in (ASKED, OTHER):
        assert report_data_of(provider.quote(asked)) == asked
    assert list(fake.entries) == fake.made == [given]


def test_who_else_writes_to_a_directory_that_was_given_is_noticed() -> None:
    fake, _ = tsm_of("tdx")
    given = fake.root / "tsqp"
    fake.make(given)

    def before(operation: str, path: Path) -> None:
        if (operation, path.name) == ("read", "outblob"):
            fake.put(fake.entries[given], OTHER)

    fake.before = before
    with pytest.raises(ProviderFailed, match="somebody else wrote to"):
        ConfigfsTsm(fake.root, fake, entry=given).quote(ASKED)


def test_a_host_that_has_no_certificates_gives_none() -> None:
    fake, provider = tsm_of("sev-snp")
    fake.certificates = b""
    assert provider.quote(ASKED).certificates == b""


def test_no_tee_gives_no_quote() -> None:
    assert NoTee().kind() == "none"
    assert NoTee().quote(ASKED) == Quote(kind="none", quote=b"")


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size_is_a_mistake_of_the_caller(size: int) -> None:
    for provider in (*(fake_of(kind)[1] for kind in KINDS), NoTee()):
        with pytest.raises(ValueError, match="64 bytes"):
            provider.quote(bytes(size))


# --- What a provider answers ---


@each_kind
def test_a_quote_over_other_report_data_is_no_answer(kind: str) -> None:
    fake, provider = fake_of(kind)
    right = fake.make_quote
    fake.make_quote = lambda _: right(OTHER)
    with pytest.raises(ProviderFailed, match="other report data"):
        provider.quote(ASKED)


@each_kind
def test_an_empty_or_a_short_quote_is_no_answer(kind: str) -> None:
    fake, provider = fake_of(kind)
    right = fake.make_quote
    fake.make_quote = lambda _: b""
    with pytest.raises(ProviderFailed, match="empty quote"):
        provider.quote(ASKED)
    ends = {"tdx": 568, "sgx": 368, "sev-snp": 1183 - 64}[kind] + 63  # one byte less than it takes
    fake.make_quote = lambda asked: right(asked)[:ends]
    with pytest.raises(ProviderFailed, match=f"{ends} bytes .* no known {kind} quote"):
        provider.quote(ASKED)
    if kind != "sev-snp":  # whose size is the one that it has
        fake.make_quote = lambda asked: right(asked)[: ends + 1]
        assert report_data_of(provider.quote(ASKED)) == ASKED


@pytest.mark.parametrize("kind", ["tdx", "sgx"])
def test_a_quote_of_an_unknown_version_is_no_answer(kind: str) -> None:
    fake, provider = fake_of(kind)
    right = fake.make_quote
    fake.make_quote = lambda asked: b"\x06\x00" + right(asked)[2:]
    with pytest.raises(ProviderFailed, match=f"beginning with 0600.*no known {kind} quote"):
        provider.quote(ASKED)


@each_kind
def test_a_quote_that_evidence_has_no_room_for_is_no_answer(kind: str) -> None:
    fake, provider = fake_of(kind)
    right = fake.make_quote
    fake.make_quote = lambda asked: right(asked).ljust(MAX_QUOTE_BYTES, b"\0")
    if kind != "sev-snp":
        assert len(provider.quote(ASKED).quote) == MAX_QUOTE_BYTES
    fake.make_quote = lambda asked: right(asked).ljust(MAX_QUOTE_BYTES + 1, b"\0")
    with pytest.raises(ProviderFailed, match="more than 20480 bytes"):
        provider.quote(ASKED)


def test_certificates_that_evidence_has_no_room_for_are_no_answer() -> None:
    fake, provider = tsm_of("sev-snp")
    fake.certificates = bytes(MAX_QUOTE_BYTES + 1)
    with pytest.raises(ProviderFailed, match="auxblob has more than"):
        provider.quote(ASKED)


# --- Who else writes ---


@of_linux
@pytest.mark.parametrize("attribute", ["outblob", "generation"])
def test_a_write_of_somebody_else_is_noticed(kind: str, attribute: str) -> None:
    """The same bytes, so that the quote holds what was asked: only the generation shows it."""
    fake, provider = tsm_of(kind)

    def write_in_between(operation: str, path: Path) -> None:
        if operation == "read" and path.name == attribute and fake.entries[path.parent].generation == 1:
            fake.put(fake.entries[path.parent], ASKED)

    fake.before = write_in_between
    with pytest.raises(ProviderFailed, match="somebody else wrote"):
        provider.quote(ASKED)


@of_linux
def test_a_write_that_linux_refused_without_a_word_is_noticed(kind: str) -> None:
    fake, provider = tsm_of(kind)

    def written_before_us(operation: str, path: Path) -> None:
        if operation == "write":
            entry = fake.entries[path.parent]
            entry.inblob = ASKED  # of another time, and of no write that counts now

    fake.before = written_before_us
    fake.put = lambda entry, data: None  # type: ignore[method-assign]
    with pytest.raises(ProviderFailed, match="somebody else wrote"):
        provider.quote(ASKED)


# --- What the system says ---

FAILURES = [
    (errno.ENOENT, "there is no .*is this machine such a guest"),
    (errno.EACCES, "is not allowed: let the user"),
    (errno.EPERM, "is not allowed: let the user"),
    (errno.EBUSY, "is busy: ask again"),
    (errno.EWOULDBLOCK, "is busy: ask again"),
    (errno.ENXIO, "No such device or address: look at the log"),
    (errno.EIO, "Input/output error: look at the log"),
]
STEPS = [
    ("tdx", "make", None),
    ("tdx", "read", "provider"),
    ("tdx", "read", "generation"),
    ("tdx", "write", "inblob"),
    ("tdx", "read", "outblob"),
    ("sev-snp", "read", "auxblob"),
    ("sgx", "read", "attestation_type"),
    ("sgx", "write", "user_report_data"),
    ("sgx", "read", "quote"),
]


@pytest.mark.parametrize(("kind", "operation", "name"), STEPS)
@pytest.mark.parametrize(("number", "text"), FAILURES, ids=[errno.errorcode[number] for number, _ in FAILURES])
def test_what_the_system_refuses_is_said_in_one_line(
    kind: str, operation: str, name: str | None, number: int, text: str
) -> None:
    fake, provider = fake_of(kind)

    def fail(found: str, path: Path) -> None:
        if found == operation and (name is None or path.name == name):
            raise OSError(number, os.strerror(number), str(path))

    fake.before = fail
    with pytest.raises(ProviderFailed, match=text) as raised:
        provider.quote(ASKED)
    assert raised.value.provider == ("gramine" if kind == "sgx" else "configfs-tsm")
    assert "\n" not in str(raised.value)
    assert str(fake.root) in str(raised.value)
    assert ASKED.hex() not in str(raised.value)
    assert not getattr(fake, "entries", {})


@of_linux
def test_an_entry_that_stays_does_not_hide_the_quote(kind: str) -> None:
    fake, provider = tsm_of(kind)

    def fail(operation: str, path: Path) -> None:
        if operation == "remove":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    fake.before = fail
    assert report_data_of(provider.quote(ASKED)) == ASKED


def test_a_machine_that_is_no_guest_is_named_as_such(tmp_path: Path) -> None:
    """With the files of this machine."""
    for provider in (ConfigfsTsm(tmp_path / "tsm" / "report"), Gramine(tmp_path / "attestation")):
        with pytest.raises(ProviderFailed, match=r"there is no .*is this machine such a guest"):
            provider.quote(ASKED)
        with pytest.raises(ProviderFailed, match="there is no"):
            provider.kind()


@pytest.mark.parametrize("name", ["arm_cca_guest", "", "tdx_guest2"])
def test_an_unknown_provider_of_linux_is_refused(name: str) -> None:
    fake, provider = tsm_of("tdx")
    fake.provider = name
    for question in (provider.kind, lambda: provider.quote(ASKED)):
        with pytest.raises(ProviderFailed, match=f"its provider is '{name}': only tdx_guest and sev_guest"):
            question()


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x"])
def test_a_generation_that_is_no_number_is_refused(text: str) -> None:
    fake, _ = tsm_of("tdx")

    class Odd(FakeTsm):
        def read(self, path: Path, limit: int) -> bytes:
            return text.encode() if path.name == "generation" else super().read(path, limit)

    odd = Odd(fake.provider, fake.make_quote)
    with pytest.raises(ProviderFailed, match="its generation is"):
        ConfigfsTsm(odd.root, odd).quote(ASKED)


@pytest.mark.parametrize("found", ["none", "epid", ""])
def test_gramine_without_dcap_is_refused(found: str) -> None:
    fake = FakeGramine(quote_maker("sgx"), attestation_type=found)
    provider = Gramine(fake.root, fake)
    for question in (provider.kind, lambda: provider.quote(ASKED)):
        with pytest.raises(ProviderFailed, match=r"attestation type is .* sgx.remote_attestation"):
            question()


# --- By name ---


@pytest.mark.parametrize("name", ["configfs-tsm", "gramine", "none"])
def test_each_name_has_its_provider(name: str) -> None:
    provider = provider_of(name)
    assert provider.name == name
    if name == "none":
        assert provider.quote(ASKED) == Quote(kind="none", quote=b"")
        return
    with pytest.raises(ProviderFailed, match=f"^{name}: "):
        provider.quote(ASKED)


def test_no_other_name_has_one() -> None:
    with pytest.raises(OptionError, match="'auto': there are configfs-tsm, gramine, none"):
        provider_of("auto")


def test_a_directory_is_given_to_configfs_alone(tmp_path: Path) -> None:
    provider = provider_of("configfs-tsm", tmp_path / "gone")
    with pytest.raises(ProviderFailed, match="gone/provider"):
        provider.quote(ASKED)
    with pytest.raises(OptionError, match=r"server\.evidence_entry is for configfs-tsm, not for gramine"):
        provider_of("gramine", tmp_path)


@given(st.sampled_from(["tdx", "sgx", "sev-snp", "none"]), st.binary(max_size=1300))
def test_any_bytes_have_report_data_or_none(kind: Kind, data: bytes) -> None:
    assert len(report_data_of(Quote(kind=kind, quote=data)) or bytes(64)) == 64


# --- The form of what is real ---


def test_report_data_is_where_real_quotes_have_it() -> None:
    kinds: tuple[Kind, ...] = ("tdx", "sgx")
    for kind in kinds:
        data = real(f"{kind}/quote.bin")
        expected = dcap_qvl.parse_quote(data).report.report_data
        assert report_data_of(Quote(kind=kind, quote=data)) == expected
    report = real("snp/milan_v3_report.bin")[4 : 4 + 1184]
    assert report_data_of(Quote(kind="sev-snp", quote=report)) == b"attest-test-fixture-2026".ljust(64, b"\0")
