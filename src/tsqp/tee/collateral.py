"""What a quote is checked against beside itself: certificates, revocation lists, and what Intel says of its platforms.

From a directory, so that verification needs no network, or from a service. Nothing of it is trusted: it is signed by
the makers, and checked with the quote. A service learns which machine is asked about.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tsqp.errors import EvidenceRefused, InputError, TsqpError
from tsqp.tee.elapsed import elapsed_s
from tsqp.tee.quotes.amd_certificates import Found, read_found
from tsqp.tee.quotes.intel import platform_of, qvl
from tsqp.tee.quotes.snp_report import MalformedReport, SnpReport

MAX_FILE_BYTES = 4 << 20
MAX_FILES = 256
TIMEOUT_S = 20.0
KEPT_S = 3600.0  # then a service is asked again: platforms are found to be out of date, and certificates are revoked


class Collateral(Protocol):
    """Where collateral comes from."""

    def intel(self, kind: str, quote: bytes) -> str:
        """JSON as dcap-qvl has it. Raises EvidenceRefused, TsqpError."""

    def amd(self, quote: bytes, products: tuple[str, ...]) -> Found:
        """Certificates and revocation lists, beside those that came with the evidence."""


@dataclass(frozen=True)
class Directory:
    """Files: ``.json`` for Intel, ``.pem``, ``.der``, ``.cer`` and ``.crl`` for AMD. Others are passed over."""

    path: Path

    def intel(self, kind: str, quote: bytes) -> str:
        """The newest for this kind and line of processors: an older one may still call a platform up to date."""
        wanted = platform_of(kind, quote)
        fitting = [(issued, text) for text in map(_text, self._files(".json")) if (issued := _issued(text, wanted))]
        if not fitting:
            raise EvidenceRefused(f"{kind}.collateral", f"not in {self.path}", f"a .json file for {wanted} there")
        return max(fitting)[1]

    def amd(self, quote: bytes, products: tuple[str, ...]) -> Found:
        return sum((read_found(data) for data in self._files(".pem", ".der", ".cer", ".crl")), Found())

    def _files(self, *endings: str) -> list[bytes]:
        try:
            paths = sorted(path for path in self.path.iterdir() if path.suffix in endings)[:MAX_FILES]
            return [path.read_bytes() for path in paths if path.stat().st_size <= MAX_FILE_BYTES]
        except OSError as error:
            raise InputError(f"the collateral in {self.path} cannot be read: {error.strerror}") from None


class Without:
    """None but what came with the evidence."""

    def intel(self, kind: str, quote: bytes) -> str:
        raise EvidenceRefused(f"{kind}.collateral", "missing", "given as a directory or a URL")

    def amd(self, quote: bytes, products: tuple[str, ...]) -> Found:
        return Found()


class Service:
    """Asked over HTTPS, and again after ``KEPT_S``: a PCCS or Intel's own for Intel's kinds, AMD's KDS for SEV-SNP."""

    def __init__(self, url: str, clock: Callable[[], float] = elapsed_s) -> None:
        if not url.startswith("https://"):
            raise InputError(f"collateral comes from a directory or an https:// address, not from {url}")
        self._url = url.rstrip("/")
        self._clock = clock
        self._kept: dict[str, tuple[float, Any]] = {}  # by what was asked for, with when

    def intel(self, kind: str, quote: bytes) -> str:
        where = platform_of(kind, quote)

        def fetch() -> str:
            try:
                asked = asyncio.wait_for(qvl().get_collateral(self._url, quote), TIMEOUT_S)
                return str(asyncio.run(asked).to_json())
            except (ValueError, RuntimeError, TimeoutError) as error:
                raise self._failed(error) from None

        return str(self._lately(where, fetch))

    def amd(self, quote: bytes, products: tuple[str, ...]) -> Found:
        try:
            report = SnpReport.parse(quote)
        except MalformedReport:
            return Found()  # who checks the quote says what is wrong with it
        tcb, chip = report.reported_tcb, report.chip_id
        levels = f"blSPL={tcb.bootloader}&teeSPL={tcb.tee}&snpSPL={tcb.snp}&ucodeSPL={tcb.microcode}"
        if tcb.fmc is not None:
            levels, chip = f"fmcSPL={tcb.fmc}&{levels}", chip[:16]
        found = Found()
        for product in products:
            of_chip = self._file(f"{product}/{chip}?{levels}")
            if of_chip is not None:  # else the chip is of another line
                found += sum(map(self._there, (f"{product}/cert_chain", f"{product}/crl")), of_chip)
        if not found.certificates:
            expected = f"one that {self._url} knows with its TCB version, of {', '.join(products)}"
            raise EvidenceRefused("sev-snp.chip-id", report.chip_id, expected)
        return found

    def _there(self, path: str) -> Found:
        found = self._file(path)
        if found is None:
            raise self._failed(ValueError(f"no {path} there"))
        return found

    def _file(self, path: str) -> Found | None:
        """None for one that is not there."""
        url = f"{self._url}/vcek/v1/{path}"
        found: Found | None = self._lately(url, partial(self._get, url))
        return found

    def _get(self, url: str) -> Found | None:
        import requests

        try:
            answer = requests.get(url, timeout=TIMEOUT_S, allow_redirects=False)
            if answer.status_code == requests.codes.not_found:
                return None
            answer.raise_for_status()
        except requests.RequestException as error:
            raise self._failed(error) from None
        return read_found(answer.content[:MAX_FILE_BYTES])

    def _lately(self, what: str, fetch: Callable[[], Any]) -> Any:
        """What was fetched at most ``KEPT_S`` ago, or is now."""
        now = self._clock()
        self._kept = {one: (at, kept) for one, (at, kept) in self._kept.items() if now - at <= KEPT_S}
        if what not in self._kept:
            self._kept[what] = now, fetch()
        return self._kept[what][1]

    def _failed(self, error: Exception) -> TsqpError:
        return TsqpError(f"no collateral from {self._url}: {str(error)[:200] or type(error).__name__}")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _issued(text: str, wanted: str) -> str | None:
    """When collateral was issued, ISO 8601; None where it is of another kind or line, or is none."""
    try:
        about = json.loads(json.loads(text)["tcb_info"])
        issued = str(about["issueDate"])
        return issued if f"{str(about['id']).lower()} {about['fmspc']}" == wanted else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def collateral_from(where: str | None) -> Collateral:
    """Of an option: a directory, an ``https://`` address, or None. Raises InputError."""
    if where is None:
        return Without()
    if "://" in where:
        return Service(where)
    path = Path(where)
    if not path.is_dir():
        raise InputError(f"collateral: {path} is no directory and no https:// address")
    return Directory(path)
