"""The attestation report of AMD SEV-SNP: one structure of 1,184 bytes, versions 2, 3 and 5.

Source: AMD, "SEV Secure Nested Paging Firmware ABI Specification", document 56860, table "ATTESTATION_REPORT" and the
tables of its policy and TCB version. All numbers are little endian.
"""

from __future__ import annotations

from dataclasses import dataclass

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
VERSIONS = (2, 3, 5)
ECDSA_P384_SHA384 = 1
NUMBER_BYTES = 72  # of R and of S
P384_BYTES = 48
VCEK = 0  # the key of the chip; 1 is a cloud's own, 7 none

KNOWN_POLICY = (1 << 26) - 1  # bits that have a meaning
POLICY_ONE, POLICY_MIGRATION, POLICY_DEBUG = 1 << 17, 1 << 18, 1 << 19
KNOWN_FLAGS = 0x1F  # author key present, chip key masked, three bits of the signing key

TURIN_FAMILY = 0x1A  # processors with another order of the parts of a TCB version


class MalformedReport(ValueError):
    """Not a report of a version that is known here: in words, with the name of the field in front."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(field, found, expected)
        self.field, self.found, self.expected = field, found, expected


@dataclass(frozen=True)
class Tcb:
    """A TCB version: the security version of each part of a platform."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    @classmethod
    def of(cls, raw: bytes, *, turin: bool) -> Tcb:
        """From 8 bytes."""
        if turin:
            return cls(fmc=raw[0], bootloader=raw[1], tee=raw[2], snp=raw[3], microcode=raw[7])
        return cls(bootloader=raw[0], tee=raw[1], snp=raw[6], microcode=raw[7])


@dataclass(frozen=True)
class SnpReport:
    """The fields of a report. ``signed`` are the bytes that ``r`` and ``s`` sign."""

    version: int
    guest_svn: int
    policy: int
    family_id: str
    image_id: str
    vmpl: int
    platform_info: int
    masked_chip_key: bool
    signing_key: int
    report_data: bytes
    measurement: str
    host_data: str
    id_key_digest: str
    author_key_digest: str
    chip_id: str
    reported_tcb: Tcb
    current_tcb: Tcb
    committed_tcb: Tcb
    launch_tcb: Tcb
    signed: bytes
    r: int
    s: int

    @classmethod
    def parse(cls, raw: bytes) -> SnpReport:
        """Raises MalformedReport: another size or version, reserved bits that are set."""
        if len(raw) != REPORT_BYTES:
            raise MalformedReport("quote", f"{len(raw)} bytes", f"a report of {REPORT_BYTES}")
        version, guest_svn = _number(raw, 0, 4), _number(raw, 4, 4)
        if version not in VERSIONS:
            raise MalformedReport("version", str(version), f"one of {', '.join(map(str, VERSIONS))}")
        if (algorithm := _number(raw, 0x34, 4)) != ECDSA_P384_SHA384:
            raise MalformedReport("signature-algorithm", str(algorithm), "1, ECDSA P-384 with SHA-384")
        policy, flags = _number(raw, 8, 8), _number(raw, 0x48, 4)
        if policy & ~KNOWN_POLICY or not policy & POLICY_ONE:
            raise MalformedReport("guest-policy", raw[8:16].hex(), "one without reserved bits")
        if flags & ~KNOWN_FLAGS:
            raise MalformedReport("flags", f"{flags:#x}", "without reserved bits")
        for name, begin, end in _reserved(version):
            if any(raw[begin:end]):
                raise MalformedReport(f"reserved bytes at {name}", raw[begin:end].hex(), "zero")
        turin = version >= 3 and raw[0x188] == TURIN_FAMILY
        r, s = (_signature_number(raw, SIGNED_BYTES + at * NUMBER_BYTES) for at in (0, 1))
        return cls(
            version=version,
            guest_svn=guest_svn,
            policy=policy,
            family_id=raw[0x10:0x20].hex(),
            image_id=raw[0x20:0x30].hex(),
            vmpl=_number(raw, 0x30, 4),
            platform_info=_number(raw, 0x40, 8),
            masked_chip_key=bool(flags & 2),
            signing_key=flags >> 2,
            report_data=raw[0x50:0x90],
            measurement=raw[0x90:0xC0].hex(),
            host_data=raw[0xC0:0xE0].hex(),
            id_key_digest=raw[0xE0:0x110].hex(),
            author_key_digest=raw[0x110:0x140].hex(),
            chip_id=raw[0x1A0:0x1E0].hex(),
            reported_tcb=Tcb.of(raw[0x180:0x188], turin=turin),
            current_tcb=Tcb.of(raw[0x38:0x40], turin=turin),
            committed_tcb=Tcb.of(raw[0x1E0:0x1E8], turin=turin),
            launch_tcb=Tcb.of(raw[0x1F0:0x1F8], turin=turin),
            signed=raw[:SIGNED_BYTES],
            r=r,
            s=s,
        )


def _reserved(version: int) -> list[tuple[str, int, int]]:
    """Bytes that have no meaning yet: a report that sets them says something that is not known here."""
    places = [(0x4C, 0x50), (0x188 if version < 3 else 0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0)]
    places += [(0x1F8 if version < 5 else 0x208, SIGNED_BYTES), (SIGNED_BYTES + 2 * NUMBER_BYTES, REPORT_BYTES)]
    return [(f"{begin:#x}", begin, end) for begin, end in places]


def _number(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")


def _signature_number(raw: bytes, at: int) -> int:
    """72 bytes for a number of 48: the rest is zero, so that one signature has one form."""
    if any(raw[at + P384_BYTES : at + NUMBER_BYTES]):
        raise MalformedReport("signature", "a number of more than 384 bits", "two of 384")
    return _number(raw, at, P384_BYTES)
