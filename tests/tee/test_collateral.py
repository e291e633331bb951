"""Collateral from a service: what is kept, for how long, and which line of processors a chip is of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests

from tests.tee.forge.amd import amd_forge
from tests.tee.forge.intel import intel_forge
from tsqp.errors import EvidenceRefused, TsqpError
from tsqp.tee import collateral
from tsqp.tee.collateral import KEPT_S, Service

URL = "https://collateral.example"
QUOTE = amd_forge().report()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Kds:
    """AMD's service, which knows one chip of one line. ``asked``: how often for each file of a line."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.lines = {"Milan": amd_forge("Milan"), "Genoa": amd_forge("Genoa")}
        self.own = "Milan"
        self.status = 404  # of a chip of another line

    def get(self, url: str, **_options: Any) -> requests.Response:
        line, _, what = url.removeprefix(f"{URL}/vcek/v1/").partition("/")
        forge, answer = self.lines[line], requests.Response()
        kind = what if what in ("cert_chain", "crl") else "vcek"
        self.asked[line, kind] += 1
        answer.status_code = self.status if kind == "vcek" and line != self.own else 200
        content = {"vcek": forge.vcek.der, "cert_chain": forge.ask_ark_pem.encode(), "crl": forge.crl()}
        answer._content = content[kind]
        return answer


@pytest.fixture
def kds(monkeypatch: pytest.MonkeyPatch) -> Kds:
    service = Kds()
    monkeypatch.setattr(requests, "get", service.get)
    return service


def test_what_a_service_said_is_asked_again_after_an_hour(kds: Kds) -> None:
    """A certificate that was revoked meanwhile is in a list that has to be fetched."""
    clock = Clock()
    service = Service(URL, clock=clock)
    first = service.amd(QUOTE, ("Milan",))
    clock.now += KEPT_S
    assert service.amd(QUOTE, ("Milan",)) == first
    assert kds.asked["Milan", "crl"] == 1
    clock.now += 1
    revoked = amd_forge().crl(revoke_ask=True)
    kds.lines["Milan"].crl = lambda **_options: revoked  # type: ignore[method-assign]
    try:
        (listed,) = service.amd(QUOTE, ("Milan",)).revocations
    finally:
        del kds.lines["Milan"].crl
    assert listed.serials == {amd_forge().ask.serial}
    assert kds.asked["Milan", "crl"] == 2


def test_what_intel_said_is_asked_again_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []

    class Library:
        @staticmethod
        async def get_collateral(url: str, quote: bytes) -> Any:
            asked.append(url)
            return type("Found", (), {"to_json": lambda _self: f"answer {len(asked)}"})()

    monkeypatch.setattr(collateral, "qvl", Library)
    service, quote = Service(URL, clock=clock), intel_forge().tdx()
    assert [service.intel("tdx", quote) for _ in range(2)] == ["answer 1", "answer 1"]
    clock.now += KEPT_S + 1
    assert service.intel("tdx", quote) == "answer 2"


def test_what_is_old_is_not_used_where_the_service_fails(kds: Kds, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    service = Service(URL, clock=clock)
    service.amd(QUOTE, ("Milan",))
    clock.now += KEPT_S + 1
    kds.own, kds.status = "Genoa", 503
    with pytest.raises(TsqpError, match="no collateral from https://collateral"):
        service.amd(QUOTE, ("Milan",))


def test_a_chip_is_of_one_of_the_lines_of_a_policy(kds: Kds) -> None:
    """The service answers 404 for the others."""
    service = Service(URL, clock=Clock())
    assert service.amd(QUOTE, ("Genoa", "Milan")) == service.amd(QUOTE, ("Milan",))
    service.amd(QUOTE, ("Genoa", "Milan"))
    assert kds.asked["Genoa", "vcek"] == 1  # what is not there is kept too


def test_a_chip_of_none_of_the_lines_is_said(kds: Kds) -> None:
    service = Service(URL, clock=Clock())
    with pytest.raises(
        EvidenceRefused, match=r"sev-snp\.chip-id is .* one that https://collateral\.example knows .* Genoa"
    ):
        service.amd(QUOTE, ("Genoa",))


def test_another_failure_is_one_for_all_lines(kds: Kds) -> None:
    kds.status = 429
    with pytest.raises(TsqpError, match="429"):
        Service(URL, clock=Clock()).amd(QUOTE, ("Genoa", "Milan"))
