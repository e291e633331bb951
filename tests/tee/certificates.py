"""Self-signed certificates, as a server makes one at its start."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class KeyPair:
    """A P-256 key and its certificate; ``der`` is the certificate."""

    key: ec.EllipticCurvePrivateKey
    der: bytes

    def write(self, directory: Path) -> Path:
        """One PEM file with both, for ``ssl``."""
        path = directory / "server.pem"
        pem = x509.load_der_x509_certificate(self.der).public_bytes(Encoding.PEM)
        path.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pem)
        return path


def key_pair(key: ec.EllipticCurvePrivateKey | None = None) -> KeyPair:
    """A new certificate, of a new key or of the one given."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tsqp")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    return KeyPair(key, builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
