"""Attestation reports of SEV-SNP (versions 2, 3, 5) with their certificates, under roots that tests alone know.

The chain, as AMD has it: a root (ARK) signs itself and the signing key of a product line (ASK), which signs the
certificate of one processor at one TCB (VCEK); all three signatures are RSASSA-PSS with SHA-384. The VCEK is ECDSA with
P-384 and signs reports. AMD's RSA keys have 4096 bits; these have 2048, which are made in a tenth of the time.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.tee.forge import der
from tests.tee.forge.certificates import FOR_A_MONTH, FOR_YEARS, Signer, Validity, chain, make_crl, make_signer, name
from tests.tee.forge.layout import SNP_REPORT, SNP_REPORT_BYTES, SNP_SIGNED_BYTES, pack

AMD = "1.3.6.1.4.1.3704.1"
ORGANIZATION = "Forged for tests"
CHIP_ID = bytes(range(0x40, 0x80))
# Of the certificate table: GHCB specification, 56421, under MSG_REPORT_REQ.
GUIDS = {
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
}

POLICY_ONE = 1 << 17  # a reserved bit that is always set
POLICY_PLAIN = POLICY_ONE | 1 << 16  # SMT allowed
POLICY_DEBUG = POLICY_PLAIN | 1 << 19
POLICY_MIGRATION = POLICY_PLAIN | 1 << 18
FIRMWARE = bytes([29, 55, 1])  # build, minor, major

# Family, model and stepping, as CPUID gives them and as reports name them from version 3 on.
CPUIDS = {"Milan": (0x19, 0x01, 0x01), "Genoa": (0x19, 0x11, 0x01), "Turin": (0x1A, 0x02, 0x01)}

Product = Literal["Milan", "Genoa", "Turin"]
ReportFault = Literal["signature", "other_key", "big_endian"]


@dataclass(frozen=True)
class Tcb:
    """Security versions of a processor. ``fmc``: of Turin alone."""

    bootloader: int = 4
    tee: int = 1
    snp: int = 0x18
    microcode: int = 0xD5
    fmc: int = 0

    def encode(self, product: Product) -> bytes:
        """The 8 bytes that a report has. Turin puts them in another order."""
        if product == "Turin":
            return bytes([self.fmc, self.bootloader, self.tee, self.snp, 0, 0, 0, self.microcode])
        return bytes([self.bootloader, self.tee, 0, 0, 0, 0, self.snp, self.microcode])


TCB = Tcb()


class AmdForge:
    """One processor of a product line with its chain. Two of them share RSA keys at most by ``root``.

    ``tcb``, ``chip_id`` and ``vcek_valid``: what the certificate of the processor says. ``root``: names the RSA keys;
    chains of two names do not verify each other.
    """

    def __init__(
        self,
        product: Product = "Milan",
        *,
        tcb: Tcb = TCB,
        chip_id: bytes = CHIP_ID,
        vcek_valid: Validity = FOR_YEARS,
        root: str = "forged",
    ) -> None:
        self.product: Product = product
        self.tcb = tcb
        self.chip_id = chip_id[:8].ljust(64, b"\0") if product == "Turin" else chip_id
        self.ark = make_signer(
            name(f"ARK-{product}", ORGANIZATION), _rsa_key(f"{root}: ARK"), None, authority=True, pss=True
        )
        self.ask = make_signer(
            name(f"SEV-{product}", ORGANIZATION),
            _rsa_key(f"{root}: ASK"),
            self.ark,
            authority=True,
            path_length=0,
            pss=True,
        )
        self._vcek_key = ec.generate_private_key(ec.SECP384R1())
        self.vcek = self._vcek(tcb, vcek_valid)

    @property
    def ask_ark_pem(self) -> str:
        """The chain above the processor, as AMD publishes it."""
        return chain(self.ask, self.ark)

    def crl(self, *, revoke_ask: bool = False, valid: Validity = FOR_A_MONTH) -> bytes:
        """The revocation list of the root, DER. AMD revokes signing keys in it, not single processors."""
        return make_crl(self.ark, [self.ask.serial] * revoke_ask, valid)

    def report(self, version: int = 3, *, fault: ReportFault | None = None, **fields: bytes | int) -> bytes:
        """1184 bytes. Fields: tests.tee.forge.layout.SNP_REPORT; numbers are little-endian."""
        tcb = self.tcb.encode(self.product)
        family, model, stepping = CPUIDS[self.product]
        plain: dict[str, bytes | int] = {
            "version": version,
            "policy": POLICY_PLAIN,
            "signature_algo": 1,  # ECDSA, P-384, SHA-384
            **dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), tcb),
            "platform_info": 0x05,  # SMT, ECC
            "report_data": b"\xda" * 64,
            "measurement": b"\x90" * 48,
            "host_data": b"\xc0" * 32,
            "report_id": b"\x14" * 32,
            "report_id_ma": b"\xff" * 32,  # no migration agent
            "chip_id": self.chip_id,
            "current_version": FIRMWARE,
            "committed_version": FIRMWARE,
        }
        if version >= 3:
            plain |= {"cpuid_family": family, "cpuid_model": model, "cpuid_stepping": stepping}
        signed = pack(SNP_REPORT, SNP_REPORT_BYTES, {**plain, **fields})[:SNP_SIGNED_BYTES]
        key = ec.generate_private_key(ec.SECP384R1()) if fault == "other_key" else self._vcek_key
        r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
        order: Literal["big", "little"] = "big" if fault == "big_endian" else "little"
        signature = r.to_bytes(72, order) + (s ^ (fault == "signature")).to_bytes(72, order)
        return (signed + signature).ljust(SNP_REPORT_BYTES, b"\0")

    def certificates(self) -> bytes:
        """What configfs-tsm gives beside the report, in ``auxblob``."""
        return certificate_table({"vcek": self.vcek.der, "ask": self.ask.der, "ark": self.ark.der})

    def _vcek(self, tcb: Tcb, valid: Validity) -> Signer:
        extensions = [
            ("1", der.integer(0)),
            ("2", der.ia5(f"{self.product}-B0")),
            ("3.1", der.integer(tcb.bootloader)),
            ("3.2", der.integer(tcb.tee)),
            *((f"3.{spare}", der.integer(0)) for spare in (4, 5, 6, 7)),
            ("3.3", der.integer(tcb.snp)),
            ("3.8", der.integer(tcb.microcode)),
            *([("3.9", der.integer(tcb.fmc))] if self.product == "Turin" else []),
            ("4", self.chip_id[: 8 if self.product == "Turin" else 64]),  # bare: AMD puts no OCTET STRING around it
        ]
        return make_signer(
            name("SEV-VCEK", ORGANIZATION),
            self._vcek_key,
            self.ask,
            authority=False,
            valid=valid,
            extensions=[(f"{AMD}.{path}", content) for path, content in extensions],
            bare=True,
        )


def certificate_table(entries: Mapping[str, bytes]) -> bytes:
    """Certificates, DER, by a name of GUIDS: entries of 24 bytes, one of zeros, then the certificates.

    The 16 bytes of a GUID are in the order in which it is written (RFC 9562), and not in the mixed order of UEFI:
    virtee/sev, google/go-sev-guest and AMDESE/sev-guest write and compare it so. Linux only looks for zeros.
    """
    offset = 24 * (len(entries) + 1)
    heads, bodies = b"", b""
    for entry, content in entries.items():
        position = offset + len(bodies)
        heads += uuid.UUID(GUIDS[entry]).bytes + position.to_bytes(4, "little") + len(content).to_bytes(4, "little")
        bodies += content
    return heads + bytes(24) + bodies


@cache
def amd_forge(product: Product = "Milan") -> AmdForge:
    """The same processor for all tests of a process."""
    return AmdForge(product)


@cache
def _rsa_key(_of: str) -> rsa.RSAPrivateKey:
    """One key for each name: making one takes a tenth of a second."""
    return rsa.generate_private_key(65537, 2048)
