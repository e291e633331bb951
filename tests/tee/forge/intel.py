"""Quotes of TDX (v4, v5) and SGX (v3) with their collateral, under a root that tests alone know.

The parts of a chain, as Intel has them: a root signs the authority of platforms and the signer of TCB info; the
authority signs the certificate of a platform's PCK; the PCK signs the report of the quoting enclave (QE), which holds
the hash of an attestation key; that key signs the quote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.tee.forge import der
from tests.tee.forge.certificates import FOR_A_MONTH, FOR_YEARS, Validity, chain, make_crl, make_signer, name
from tests.tee.forge.collateral import Level, Tee, qe_identity, tcb_info
from tests.tee.forge.layout import (
    ENCLAVE_REPORT,
    ENCLAVE_REPORT_BYTES,
    HEADER_BYTES,
    QUOTE_HEADER,
    TD_REPORT_10,
    TD_REPORT_10_BYTES,
    TD_REPORT_15,
    TD_REPORT_15_BYTES,
    pack,
)

Fields = Mapping[str, bytes | int]  # numbers are little-endian

SGX_EXTENSION = "1.2.840.113741.1.13.1"
INTEL_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
TEE_TYPES = {"sgx": 0x00, "tdx": 0x81}
ORGANIZATION = "Forged for tests"

# What the platform has. The second byte of the TDX versions is which module it runs: TDX_01 in TCB info.
CPU_SVN = bytes([3, 3, 2, 2, 4, 1, 0, 5] + [0] * 8)
TDX_SVN = bytes([5, 1, 2] + [0] * 13)
PCE_SVN, PCE_ID = 11, b"\x00\x00"
FMSPC, OTHER_FMSPC = bytes.fromhex("f0f1f2000000"), bytes.fromhex("0f0f0f000000")
PPID, INSTANCE = bytes(range(16)), bytes(range(16, 32))
QE_SIGNER, QE_SVN, QE_PRODUCT = b"\xe0" * 32, 4, {"sgx": 1, "tdx": 2}

TD_PLAIN = bytes.fromhex("0000001000000000")  # SEPT_VE_DISABLE, without which verifiers refuse, and nothing else
TD_DEBUG = bytes.fromhex("0100001000000000")
XFAM = bytes.fromhex("e702060000000000")
ENCLAVE_PLAIN = bytes.fromhex("0500000000000000e700000000000000")  # INIT, MODE64BIT; features of the processor
ENCLAVE_DEBUG = bytes.fromhex("0700000000000000e700000000000000")
QE_ATTRIBUTES = bytes.fromhex("1500000000000000e700000000000000")  # with the right to the provisioning key

# Each field another value, so that a reader that takes one for the other is noticed.
TD_DEFAULTS: Fields = {
    "tee_tcb_svn": TDX_SVN,
    "mr_seam": b"\x5e" * 48,
    "td_attributes": TD_PLAIN,
    "xfam": XFAM,
    "mr_td": b"\x70" * 48,
    "mr_config_id": b"\x71" * 48,
    "mr_owner": b"\x72" * 48,
    "mr_owner_config": b"\x73" * 48,
    **{f"rt_mr{number}": bytes([0x80 + number]) * 48 for number in range(4)},
    "report_data": b"\xda" * 64,
}
ENCLAVE_DEFAULTS: Fields = {
    "cpu_svn": CPU_SVN,
    "attributes": ENCLAVE_PLAIN,
    "mr_enclave": b"\x60" * 32,
    "mr_signer": b"\x61" * 32,
    "isv_prod_id": 6,
    "isv_svn": 2,
    "report_data": b"\xda" * 64,
}

QuoteFault = Literal["signature", "qe_signature", "qe_binding"]


class IntelForge:
    """One platform with all that vouches for it. Two of them share nothing but names.

    ``pck_valid``: when the certificate of its PCK is. Fields of quotes: tests.tee.forge.layout.
    """

    def __init__(self, *, fmspc: bytes = FMSPC, cpu_svn: bytes = CPU_SVN, pck_valid: Validity = FOR_YEARS) -> None:
        self.fmspc = fmspc
        p256 = ec.SECP256R1()
        self.root = make_signer(
            name("Intel SGX Root CA", ORGANIZATION), ec.generate_private_key(p256), None, authority=True, path_length=1
        )
        self.authority = make_signer(
            name("Intel SGX PCK Platform CA", ORGANIZATION),
            ec.generate_private_key(p256),
            self.root,
            authority=True,
            path_length=0,
        )
        self._pck_key = ec.generate_private_key(p256)
        self.pck = make_signer(
            name("Intel SGX PCK Certificate", ORGANIZATION),
            self._pck_key,
            self.authority,
            authority=False,
            valid=pck_valid,
            extensions=[(SGX_EXTENSION, _sgx_extension(fmspc, cpu_svn))],
        )
        self._tcb_key = ec.generate_private_key(p256)
        self._tcb_signer = make_signer(
            name("Intel SGX TCB Signing", ORGANIZATION), self._tcb_key, self.root, authority=False
        )
        self._attestation_key = ec.generate_private_key(p256)

    @property
    def root_der(self) -> bytes:
        """The certificate that a verifier has to trust."""
        return self.root.der

    @property
    def pck_chain(self) -> str:
        """PEM: PCK, authority, root, as quotes carry them."""
        return chain(self.pck, self.authority, self.root)

    def tdx(
        self,
        *,
        version: int = 4,
        fault: QuoteFault | None = None,
        header: Fields | None = None,
        pck_chain: str | None = None,
        **fields: bytes,
    ) -> bytes:
        """A quote of a trust domain: version 4 has TD report 1.0, version 5 has TD report 1.5 (body type 3).

        ``header``: what its header says instead. ``pck_chain``: the chain in it, if not this platform's.
        """
        if version == 4:
            body = pack(TD_REPORT_10, TD_REPORT_10_BYTES, {**TD_DEFAULTS, **fields})
        else:
            report = pack(TD_REPORT_15, TD_REPORT_15_BYTES, {**TD_DEFAULTS, "tee_tcb_svn2": TDX_SVN, **fields})
            body = (3).to_bytes(2, "little") + len(report).to_bytes(4, "little") + report
        return self._quote("tdx", {"version": version, **(header or {})}, body, fault, pck_chain)

    def sgx(
        self,
        *,
        fault: QuoteFault | None = None,
        header: Fields | None = None,
        pck_chain: str | None = None,
        **fields: bytes | int,
    ) -> bytes:
        """A quote of an enclave, version 3; ``header`` and ``pck_chain`` as for ``tdx``."""
        body = pack(ENCLAVE_REPORT, ENCLAVE_REPORT_BYTES, {**ENCLAVE_DEFAULTS, **fields})
        return self._quote("sgx", {"version": 3, **(header or {})}, body, fault, pck_chain)

    def collateral(
        self,
        tee: Tee = "tdx",
        *,
        status: str = "UpToDate",
        advisories: Sequence[str] = (),
        qe_status: str = "UpToDate",
        module_status: str = "UpToDate",
        fmspc: bytes | None = None,
        required_cpu_svn: bytes = CPU_SVN,
        revoke_pck: bool = False,
        revoke_authority: bool = False,
        valid: Validity = FOR_A_MONTH,
        crl_valid: Validity | None = None,
    ) -> str:
        """JSON as ``dcap_qvl.QuoteCollateralV3.from_json`` reads it.

        ``status``: of a platform that has at least ``required_cpu_svn``; one with less is OutOfDate. ``qe_status``,
        ``module_status``: of the quoting enclave and of the TDX module. ``crl_valid``: of revocation lists, ``valid``
        of all the rest, and of these too where ``crl_valid`` is not given.
        """
        levels = [
            Level(required_cpu_svn, bytes([5, 0, 2] + [0] * 13), PCE_SVN, status, advisories),
            Level(bytes(16), bytes(16), 5, "OutOfDate", ["INTEL-SA-00001"]),
        ]
        info = tcb_info(tee, fmspc or self.fmspc, PCE_ID, levels, module_status, valid)
        identity = qe_identity(tee, QE_SIGNER, QE_PRODUCT[tee], QE_SVN, qe_status, valid)
        signers = chain(self._tcb_signer, self.root)
        listed = crl_valid or valid
        return json.dumps(
            {
                "pck_crl_issuer_chain": chain(self.authority, self.root),
                "root_ca_crl": make_crl(self.root, [self.authority.serial] * revoke_authority, listed).hex(),
                "pck_crl": make_crl(self.authority, [self.pck.serial] * revoke_pck, listed).hex(),
                "tcb_info_issuer_chain": signers,
                "tcb_info": info,
                "tcb_info_signature": _sign(self._tcb_key, info.encode()).hex(),
                "qe_identity_issuer_chain": signers,
                "qe_identity": identity,
                "qe_identity_signature": _sign(self._tcb_key, identity.encode()).hex(),
            }
        )

    def _quote(self, tee: Tee, header: Fields, body: bytes, fault: QuoteFault | None, pck_chain: str | None) -> bytes:
        plain: Fields = {
            "attestation_key_type": 2,  # ECDSA with P-256
            "tee_type": TEE_TYPES[tee],
            "qe_vendor_id": INTEL_VENDOR,
        }
        signed = pack(QUOTE_HEADER, HEADER_BYTES, {**plain, **header}) + body
        signature = _spoilt_if(fault == "signature", _sign(self._attestation_key, signed))
        public = self._attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        certification = self._certification(tee, public, fault, (pck_chain or self.pck_chain).encode())
        if tee == "tdx":  # from version 4 on, what the QE certifies is a block of its own, of type 6
            certification = (6).to_bytes(2, "little") + _with_length(certification, 4)
        return signed + _with_length(signature + public + certification, 4)

    def _certification(self, tee: Tee, attestation_key: bytes, fault: QuoteFault | None, pem: bytes) -> bytes:
        """The report of the QE with its signature, the QE's own data, and the chain of the PCK (type 5)."""
        own_data = bytes(range(32))
        bound = hashlib.sha256(attestation_key + own_data).digest()
        report = pack(
            ENCLAVE_REPORT,
            ENCLAVE_REPORT_BYTES,
            {
                "cpu_svn": CPU_SVN,
                "attributes": QE_ATTRIBUTES,
                "mr_enclave": b"\xe1" * 32,
                "mr_signer": QE_SIGNER,
                "isv_prod_id": QE_PRODUCT[tee],
                "isv_svn": QE_SVN,
                "report_data": _spoilt_if(fault == "qe_binding", bound) + bytes(32),
            },
        )
        signature = _spoilt_if(fault == "qe_signature", _sign(self._pck_key, report))
        return report + signature + _with_length(own_data, 2) + (5).to_bytes(2, "little") + _with_length(pem, 4)


@cache
def intel_forge() -> IntelForge:
    """The same platform for all tests of a process."""
    return IntelForge()


def _sgx_extension(fmspc: bytes, cpu_svn: bytes) -> bytes:
    """What the certificate of a PCK says of its platform: a sequence of pairs of identifier and value."""

    def pair(path: str, content: bytes) -> bytes:
        return der.sequence(der.identifier(f"{SGX_EXTENSION}.{path}"), content)

    versions = [pair(f"2.{number}", der.integer(svn)) for number, svn in enumerate(cpu_svn, start=1)]
    tcb = der.sequence(*versions, pair("2.17", der.integer(PCE_SVN)), pair("2.18", der.octets(cpu_svn)))
    configuration = der.sequence(*(pair(f"7.{number}", der.boolean(truth=True)) for number in (1, 2, 3)))
    return der.sequence(
        pair("1", der.octets(PPID)),
        pair("2", tcb),
        pair("3", der.octets(PCE_ID)),
        pair("4", der.octets(fmspc)),
        pair("5", der.enumerated(1)),  # scalable
        pair("6", der.octets(INSTANCE)),
        pair("7", configuration),  # dynamic platform, cached keys, SMT
    )


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """R and S, 32 bytes each, big-endian, as Intel has them."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _with_length(content: bytes, width: int) -> bytes:
    return len(content).to_bytes(width, "little") + content


def _spoilt_if(spoil: bool, content: bytes) -> bytes:
    """The same but for one bit."""
    return content[:-1] + bytes([content[-1] ^ 1]) if spoil else content
