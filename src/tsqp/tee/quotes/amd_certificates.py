"""Certificates and revocation lists of AMD, from PEM, DER, or the table that comes with a report.

All of one is read at once, so that what is malformed is refused here and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from tsqp.errors import EvidenceRefused

AMD_OID = "1.3.6.1.4.1.3704.1"
ENTRY_BYTES = 24  # of a certificate table: a GUID, an offset and a length
MAX_CERTIFICATES = 16

MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Certificate:
    """What is looked at of one. ``signed`` are the bytes that ``signature`` is of; ``amd``: AMD's extensions by OID."""

    subject: bytes
    issuer: bytes
    serial: int
    begins: datetime
    ends: datetime
    signed: bytes
    signature: bytes
    key: object
    spki: bytes
    amd: Mapping[str, bytes]

    @classmethod
    def of(cls, found: x509.Certificate) -> Certificate:
        """Raises one of MALFORMED."""
        extensions = [one for one in found.extensions if isinstance(one.value, x509.UnrecognizedExtension)]
        key = found.public_key()
        return cls(
            subject=found.subject.public_bytes(),
            issuer=found.issuer.public_bytes(),
            serial=found.serial_number,
            begins=found.not_valid_before_utc,
            ends=found.not_valid_after_utc,
            signed=found.tbs_certificate_bytes,
            signature=found.signature,
            key=key,
            spki=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            amd={
                one.oid.dotted_string: one.value.value
                for one in extensions
                if one.oid.dotted_string.startswith(f"{AMD_OID}.")
            },
        )


@dataclass(frozen=True)
class Revocations:
    """A list of serial numbers, between two times. ``ends``: None where it does not say."""

    issuer: bytes
    begins: datetime
    ends: datetime | None
    signed: bytes
    signature: bytes
    serials: frozenset[int]

    @classmethod
    def of(cls, found: x509.CertificateRevocationList) -> Revocations:
        """Raises one of MALFORMED."""
        return cls(
            issuer=found.issuer.public_bytes(),
            begins=found.last_update_utc,
            ends=found.next_update_utc,
            signed=found.tbs_certlist_bytes,
            signature=found.signature,
            serials=frozenset(one.serial_number for one in found),
        )


@dataclass(frozen=True)
class Found:
    """What somebody has given, in no order."""

    certificates: tuple[Certificate, ...] = ()
    revocations: tuple[Revocations, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.certificates + other.certificates, self.revocations + other.revocations)


def certificates_in(table: bytes) -> Found:
    """Of a certificate table as ``auxblob`` of configfs-tsm has it. Which is which is seen in them, not in their GUIDs.

    Raises EvidenceRefused.
    """
    return sum((read_found(data) for data in _entries(table)), Found())


def read_found(data: bytes) -> Found:
    """Certificates, or a revocation list, in PEM or DER. Raises EvidenceRefused."""
    try:
        with warnings.catch_warnings():  # AMD's certificates of chips have the serial number 0
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            return _read(data)
    except MALFORMED:
        raise EvidenceRefused("sev-snp.certificates", "what is none", "X.509 certificates and CRLs") from None


def _read(data: bytes) -> Found:
    if b"-----BEGIN X509 CRL" in data:
        return Found(revocations=(Revocations.of(x509.load_pem_x509_crl(data)),))
    if b"-----BEGIN" in data:
        return Found(certificates=tuple(map(Certificate.of, x509.load_pem_x509_certificates(data))))
    try:
        return Found(certificates=(Certificate.of(x509.load_der_x509_certificate(data)),))
    except MALFORMED:
        return Found(revocations=(Revocations.of(x509.load_der_x509_crl(data)),))


def _entries(table: bytes) -> Iterator[bytes]:
    """The parts of a table, whose end is an entry of zeros. Empty without a table."""
    for at in range(0, len(table), ENTRY_BYTES):
        entry = table[at : at + ENTRY_BYTES]
        if not any(entry) and len(entry) == ENTRY_BYTES:
            return
        offset, size = (int.from_bytes(entry[begin : begin + 4], "little") for begin in (16, 20))
        if len(entry) < ENTRY_BYTES or not size or offset + size > len(table) or at >= MAX_CERTIFICATES * ENTRY_BYTES:
            raise EvidenceRefused("sev-snp.certificates", "a table that names bytes outside of it", "a whole one")
        yield table[offset : offset + size]
