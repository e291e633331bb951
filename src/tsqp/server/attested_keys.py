"""The two keys that a quote speaks of: of TLS, and of receipts. Made at start, in memory, and never written to a disk.

Covers: neither key has a file, but for one in the enclave's memory under Gramine, for a moment
(tests/server/test_attested_keys.py). Does not cover: who can read this process's memory. Assumes: Gramine's manifest,
which is measured, has a tmpfs at /tmp (tests/deploy/test_gramine.py).
"""

from __future__ import annotations

import hashlib
import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

VALID = timedelta(days=3650)  # longer than any process; clients look at the key, and not at dates


class AttestedKeys:
    """A self-signed certificate for TLS, and a key for receipts."""

    def __init__(self) -> None:
        self.receipt_key = Ed25519PrivateKey.generate()
        key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = _self_signed(key)
        self._pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.spki_sha256 = hashlib.sha256(spki).hexdigest()
        self.public_receipt_key = self.receipt_key.public_key().public_bytes_raw().hex()

    def tls(self, directory: Path | None = None) -> ssl.SSLContext:
        """TLS 1.3 with the certificate, which OpenSSL reads from memory that has no name in a file system.

        ``directory``: where a name is given to it for that moment, which has to be memory of this process. OpenSSL
        reads files alone, and Gramine has no memfd_create.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        descriptor, path = _memory() if directory is None else tempfile.mkstemp(prefix="tsqp-tls-", dir=directory)
        try:
            os.write(descriptor, self._pem + _pem(self.certificate))
            context.load_cert_chain(path)
            os.pwrite(descriptor, bytes(len(self._pem)), 0)
        finally:
            os.close(descriptor)
            if directory is not None:
                Path(path).unlink()
        return context


def _memory() -> tuple[int, str]:
    """A file without a name, and the path by which this process alone opens it."""
    descriptor = os.memfd_create("tsqp-tls")
    return descriptor, f"/proc/self/fd/{descriptor}"


def _self_signed(key: ec.EllipticCurvePrivateKey) -> bytes:
    """DER. It names nobody: evidence says whose it is."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tsqp")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + VALID)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _pem(certificate: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
