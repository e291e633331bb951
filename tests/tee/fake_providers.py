"""Providers over fakes of what a TEE shows, with forged quotes: one for each kind."""

from __future__ import annotations

from collections.abc import Callable

from tests.tee.fake_gramine import FakeGramine
from tests.tee.fake_tsm import FakeTsm
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.intel import intel_forge
from tsqp.tee.providers import ConfigfsTsm, Gramine, Provider

Fake = FakeTsm | FakeGramine
KINDS = ("tdx", "sev-snp", "sgx")


def fake_of(kind: str) -> tuple[Fake, Provider]:
    """What the system shows, and the provider that reads it."""
    if kind == "sgx":
        gramine = FakeGramine(quote_maker("sgx"))
        return gramine, Gramine(gramine.root, gramine)
    if kind == "tdx":
        tsm = FakeTsm("tdx_guest", quote_maker("tdx"))
    else:
        tsm = FakeTsm("sev_guest", quote_maker("sev-snp"), amd_forge().certificates())
    return tsm, ConfigfsTsm(tsm.root, tsm)


def quote_maker(kind: str) -> Callable[[bytes], bytes]:
    """Forged quotes of this kind over any report data."""
    makers: dict[str, Callable[[bytes], bytes]] = {
        "tdx": lambda data: intel_forge().tdx(report_data=data),
        "tdx v5": lambda data: intel_forge().tdx(version=5, report_data=data),
        "sgx": lambda data: intel_forge().sgx(report_data=data),
        "sev-snp": lambda data: amd_forge().report(report_data=data),
    }
    return makers[kind]
