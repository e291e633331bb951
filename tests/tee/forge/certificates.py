"""Certificates, chains and revocation lists of authorities that exist in tests only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

# Unix time at which what is forged is valid, unless it is told otherwise.
NOW = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
DAY = 24 * 3600

Validity = tuple[int, int]  # from, to: Unix time, seconds
FOR_YEARS: Validity = (NOW - 365 * DAY, NOW + 3650 * DAY)
FOR_A_MONTH: Validity = (NOW - 15 * DAY, NOW + 15 * DAY)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_serials = count(1000)  # no two certificates of a test run have the same


def name(common_name: str, organization: str) -> x509.Name:
    """As both makers write them; ``organization`` keeps what is forged apart from what is real."""
    parts = {
        NameOID.COMMON_NAME: common_name,
        NameOID.ORGANIZATION_NAME: organization,
        NameOID.LOCALITY_NAME: "Santa Clara",
        NameOID.STATE_OR_PROVINCE_NAME: "CA",
        NameOID.COUNTRY_NAME: "US",
    }
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts.items()])


def moment(seconds: int) -> datetime:
    """Unix time as a datetime."""
    return datetime.fromtimestamp(seconds, UTC)


@dataclass(frozen=True)
class Signer:
    """A key with its certificate. ``pss``: signs RSASSA-PSS with SHA-384, as AMD does; else ECDSA with SHA-256."""

    key: PrivateKey
    certificate: x509.Certificate
    pss: bool = False

    @property
    def der(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> str:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    @property
    def serial(self) -> int:
        """Of the certificate."""
        return self.certificate.serial_number


def make_signer(
    subject: x509.Name,
    key: PrivateKey,
    issuer: Signer | None,
    *,
    authority: bool,
    valid: Validity = FOR_YEARS,
    path_length: int | None = None,
    extensions: Iterable[tuple[str, bytes]] = (),
    pss: bool = False,
    bare: bool = False,
) -> Signer:
    """A certificate for ``key``, signed by ``issuer`` or, without one, by the key itself.

    ``extensions``: object identifier and DER of each further one, in their order; with ``bare`` there are no others.
    ``pss`` as in ``Signer``; what an issuer signs has the issuer's form.
    """
    issuer_key = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(next(_serials))
        .not_valid_before(moment(valid[0]))
        .not_valid_after(moment(valid[1]))
    )
    if not bare:
        builder = (
            builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .add_extension(_usage(authority), critical=True)
            .add_extension(x509.BasicConstraints(authority, path_length), critical=True)
        )
    for oid, content in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), content), critical=False)
    signs_pss = issuer.pss if issuer else pss
    certificate = builder.sign(issuer_key, _hash(signs_pss), rsa_padding=_padding(signs_pss))
    return Signer(key, certificate, pss)


def make_crl(issuer: Signer, revoked: Iterable[int] = (), valid: Validity = FOR_A_MONTH) -> bytes:
    """A revocation list, DER, that names the serial numbers of ``revoked``."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(valid[0]))
        .next_update(moment(valid[1]))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    for serial in revoked:
        date = moment(valid[0]) - timedelta(days=1)
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(date).build()
        builder = builder.add_revoked_certificate(entry)
    crl = builder.sign(issuer.key, _hash(issuer.pss), rsa_padding=_padding(issuer.pss))
    return crl.public_bytes(Encoding.DER)


def chain(*signers: Signer) -> str:
    """Certificates as PEM, the leaf first."""
    return "".join(signer.pem for signer in signers)


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        **dict.fromkeys(("key_encipherment", "data_encipherment", "key_agreement"), False),
        **dict.fromkeys(("encipher_only", "decipher_only"), False),
    )


def _hash(pss: bool) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA384() if pss else hashes.SHA256()


def _padding(pss: bool) -> padding.PSS | None:
    return padding.PSS(padding.MGF1(hashes.SHA384()), hashes.SHA384().digest_size) if pss else None
