"""Where quotes come from: configfs-tsm (TDX, SEV-SNP), Gramine (SGX), or nowhere. docs/attestation.md, section 3.

Covers: a quote that is given holds the report data that was asked for, and nobody else wrote in between
(tests/tee/test_providers.py). Does not cover: that a quote is right; whoever relies on it verifies it. Assumes: one
question at a time, which ``BoundedProvider`` sees to.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from tsqp.errors import OptionError, ProviderFailed
from tsqp.tee.bounded_provider import BoundedProvider
from tsqp.tee.evidence import MAX_QUOTE_BYTES, Kind, Quote
from tsqp.tee.quote_files import QuoteFiles, SystemFiles
from tsqp.tee.statement import REPORT_DATA_BYTES

TSM_REPORTS = Path("/sys/kernel/config/tsm/report")
GRAMINE_ATTESTATION = Path("/dev/attestation")
KIND_OF_TSM: dict[str, Kind] = {"tdx_guest": "tdx", "sev_guest": "sev-snp"}  # what Linux calls its providers

SNP_REPORT_BYTES = 1184
# Where the report data begins, by kind and by the version with which the quote begins (for SEV-SNP any version).
REPORT_DATA_AT = {("tdx", 4): 568, ("tdx", 5): 574, ("sgx", 3): 368}
SNP_REPORT_DATA_AT = 80


class Provider(Protocol):
    """What gives quotes."""

    @property
    def name(self) -> str:
        """As ``--evidence`` has it."""

    def kind(self) -> Kind:
        """Of the quotes that it gives. Raises ProviderFailed."""

    def quote(self, report_data: bytes) -> Quote:
        """A fresh quote over 64 bytes. Raises ProviderFailed, and ValueError for another number of bytes."""


class ConfigfsTsm:
    """Linux's interface for guests of TDX and SEV-SNP, from Linux 6.7 on.

    ``entry``: a directory of the kernel's that root made and gave to this user. Without one a directory is made for
    each question, which root alone can use: what configfs makes belongs to root, whoever asks for it.
    """

    name = "configfs-tsm"

    def __init__(self, root: Path = TSM_REPORTS, files: QuoteFiles | None = None, *, entry: Path | None = None) -> None:
        self._root = root
        self._given = entry
        self._files = files or SystemFiles()

    def kind(self) -> Kind:
        with _explained(self.name, self._root), self._entry() as entry:
            return self._kind(entry)

    def quote(self, report_data: bytes) -> Quote:
        _check_size(report_data)
        with _explained(self.name, self._root), self._entry() as entry:
            kind = self._kind(entry)
            before = self._generation(entry)
            self._files.write(entry / "inblob", report_data)
            out = self._blob(entry, "outblob")
            certificates = self._blob(entry, "auxblob") if kind == "sev-snp" else b""
            # Linux counts writes. It does not say that it refused one, and another's would be answered to us.
            if self._generation(entry) != before + 1:
                raise ProviderFailed(self.name, f"somebody else wrote to {entry}", "ask again")
        return _answer(self.name, Quote(kind=kind, quote=out, certificates=certificates), report_data)

    @contextmanager
    def _entry(self) -> Iterator[Path]:
        """A directory of the kernel's for one question. Its name is new, so that no two processes share one.

        One that was given is used again: ``generation`` shows whether another process uses it too.
        """
        if self._given is not None:
            yield self._given
            return
        entry = self._root / f"tsqp-{os.getpid()}-{secrets.token_hex(8)}"
        self._files.make(entry)
        try:
            yield entry
        finally:
            with suppress(OSError):  # what went wrong before says more
                self._files.remove(entry)

    def _kind(self, entry: Path) -> Kind:
        name = self._line(entry, "provider")
        if name not in KIND_OF_TSM:
            raise ProviderFailed(self.name, f"its provider is {name!r}", f"only {' and '.join(KIND_OF_TSM)} are known")
        return KIND_OF_TSM[name]

    def _generation(self, entry: Path) -> int:
        text = self._line(entry, "generation")
        if not text.isdecimal():
            raise ProviderFailed(self.name, f"its generation is {text!r}", "it has to be a number")
        return int(text)

    def _line(self, entry: Path, attribute: str) -> str:
        return self._files.read(entry / attribute, 128)[:128].decode("ascii", errors="replace").strip()

    def _blob(self, entry: Path, attribute: str) -> bytes:
        return _limited(self.name, self._files.read(entry / attribute, MAX_QUOTE_BYTES), attribute)


class Gramine:
    """SGX through Gramine, with DCAP."""

    name = "gramine"

    def __init__(self, root: Path = GRAMINE_ATTESTATION, files: QuoteFiles | None = None) -> None:
        self._root = root
        self._files = files or SystemFiles()

    def kind(self) -> Kind:
        with _explained(self.name, self._root):
            found = self._files.read(self._root / "attestation_type", 128)[:128].decode("ascii", errors="replace")
        if found.strip() != "dcap":
            remedy = 'say sgx.remote_attestation = "dcap" in the manifest'
            raise ProviderFailed(self.name, f"its attestation type is {found.strip()!r}, not 'dcap'", remedy)
        return "sgx"

    def quote(self, report_data: bytes) -> Quote:
        _check_size(report_data)
        kind = self.kind()
        with _explained(self.name, self._root):
            self._files.write(self._root / "user_report_data", report_data)
            found = _limited(self.name, self._files.read(self._root / "quote", MAX_QUOTE_BYTES), "quote")
        return _answer(self.name, Quote(kind=kind, quote=found), report_data)


class NoTee:
    """No TEE, and no quote."""

    name = "none"

    def kind(self) -> Kind:
        return "none"

    def quote(self, report_data: bytes) -> Quote:
        _check_size(report_data)
        return Quote(kind="none", quote=b"")


PROVIDERS: dict[str, type[ConfigfsTsm | Gramine | NoTee]] = {
    provider.name: provider for provider in (ConfigfsTsm, Gramine, NoTee)
}


def provider_of(name: str, entry: Path | None = None) -> BoundedProvider:
    """The provider that ``--evidence`` names, which is waited for a bounded time. ``entry``: as ConfigfsTsm has it.

    Raises OptionError.
    """
    if name not in PROVIDERS:
        raise OptionError(f"no provider of evidence {name!r}", hint=f"there are {', '.join(PROVIDERS)}")
    if entry is not None:
        if name != ConfigfsTsm.name:
            fields = ("server.evidence_entry", "server.evidence")
            raise OptionError(f"server.evidence_entry is for {ConfigfsTsm.name}, not for {name}", fields=fields)
        return BoundedProvider(ConfigfsTsm(entry=entry))
    return BoundedProvider(PROVIDERS[name]())


def report_data_of(quote: Quote) -> bytes | None:
    """The 64 bytes that a quote of TDX, SGX or SEV-SNP holds; None where it is too short, or of an unknown version."""
    data = quote.quote
    if quote.kind == "sev-snp":
        start = SNP_REPORT_DATA_AT if len(data) == SNP_REPORT_BYTES else None
    else:
        start = REPORT_DATA_AT.get((quote.kind, int.from_bytes(data[:2], "little")))
    if start is None or len(data) < start + REPORT_DATA_BYTES:
        return None
    return data[start : start + REPORT_DATA_BYTES]


def _answer(name: str, quote: Quote, report_data: bytes) -> Quote:
    """The same, if it answers the question."""
    found = report_data_of(quote)
    if not quote.quote:
        raise ProviderFailed(name, "it gave an empty quote", "look at the log of the kernel and of the host")
    if found is None:
        begins = quote.quote[:4].hex()
        problem = f"it gave {len(quote.quote)} bytes beginning with {begins}, which are no known {quote.kind} quote"
        raise ProviderFailed(name, problem, "a quote is TDX v4 or v5, SGX v3, or an SEV-SNP report")
    if found != report_data:
        raise ProviderFailed(name, "it gave a quote over other report data", "ask again; nobody else may use it")
    return quote


def _limited(name: str, data: bytes, what: str) -> bytes:
    if len(data) > MAX_QUOTE_BYTES:
        raise ProviderFailed(name, f"{what} has more than {MAX_QUOTE_BYTES} bytes", "evidence has no room for it")
    return data


def _check_size(report_data: bytes) -> None:
    if len(report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes, not {len(report_data)}")


@contextmanager
def _explained(name: str, root: Path) -> Iterator[None]:
    """Turns what the system says into ProviderFailed."""
    try:
        yield
    except FileNotFoundError as error:
        remedy = f"is this machine such a guest, and {root} mounted?"
        raise ProviderFailed(name, f"there is no {error.filename or root}", remedy) from error
    except PermissionError as error:
        remedy = "let the user of this process use it"
        raise ProviderFailed(name, f"{error.filename or root} is not allowed", remedy) from error
    except OSError as error:
        where = error.filename or root
        if error.errno in (errno.EBUSY, errno.EWOULDBLOCK):
            raise ProviderFailed(name, f"{where} is busy", "ask again") from error
        remedy = "look at the log of the kernel and of the host"
        raise ProviderFailed(name, f"{where}: {error.strerror or error}", remedy) from error
