"""What a client accepts: one TOML file for all kinds of evidence. docs/attestation.md, section 4.

Covers: a policy that names an unknown field, lacks one, or measures no software is refused when it is read, and each
check of a field is one that the file spells out (tests/tee/test_policy.py). Does not cover: whether the values in it
are those of honest software. Assumes: the file came to its reader unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from tsqp.errors import EvidenceRefused, PolicyError
from tsqp.tee.evidence import Kind
from tsqp.tee.statement import Configuration, EmbeddingLookup, Hex32, Name

MAX_POLICY_BYTES = 256 << 10
NO_ID_KEY = "00" * 48  # in a report of a guest that was started without an ID block

Any_ = Literal["any"]
Hex8 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]  # 8 bytes
Hex16 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex48 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{96}\Z")]
Hex64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]
Fmspc = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-F]{12}\Z")]
Advisory = Annotated[str, msgspec.Meta(pattern=r"^INTEL-[A-Z]+-[0-9]+\Z")]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Level = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A part of a policy. No field has a default: what is not checked is written out as "any"."""


class ServerPolicy(Section, frozen=True, kw_only=True):
    """The statement: what is served, and how. ``min_soundness_bits``: 0 accepts products that nobody checked."""

    model_digests: Any_ | tuple[Hex32, ...]
    protections: tuple[Name, ...]
    partitions: Any_ | tuple[Name, ...]
    software: Any_ | tuple[Name, ...]
    min_soundness_bits: Level
    worker_keys: Any_ | tuple[Hex32, ...]
    dealer_keys: Any_ | tuple[Hex32, ...]
    adapters: Any_ | tuple[Hex32, ...]
    oblivious: Any_ | bool
    embeddings: Any_ | tuple[EmbeddingLookup, ...]
    locked_memory: Any_ | bool


class TdxPolicy(Section, frozen=True, kw_only=True):
    """Of a TD report; MRTD is the firmware at its start, RTMR 0 to 3 what was measured after it. Never in debug."""

    mrtd: Any_ | tuple[Hex48, ...]
    rtmr0: Any_ | tuple[Hex48, ...]
    rtmr1: Any_ | tuple[Hex48, ...]
    rtmr2: Any_ | tuple[Hex48, ...]
    rtmr3: Any_ | tuple[Hex48, ...]
    mrconfigid: Any_ | tuple[Hex48, ...]
    mrowner: Any_ | tuple[Hex48, ...]
    mrownerconfig: Any_ | tuple[Hex48, ...]
    mrseam: Any_ | tuple[Hex48, ...]
    mrsignerseam: Any_ | tuple[Hex48, ...]
    attributes: tuple[Hex8, ...]
    xfam: Any_ | tuple[Hex8, ...]
    min_tee_tcb_svn: Annotated[str, msgspec.Meta(pattern=r"^(any|[0-9a-f]{32})\Z")]
    tcb_status: tuple[TcbStatus, ...]
    advisories: Any_ | tuple[Advisory, ...]
    fmspc: Any_ | tuple[Fmspc, ...]


class SgxPolicy(Section, frozen=True, kw_only=True):
    """Of an enclave's report. Never in debug."""

    mrenclave: Any_ | tuple[Hex32, ...]
    mrsigner: Any_ | tuple[Hex32, ...]
    isv_prod_id: Any_ | tuple[Level, ...]
    min_isv_svn: Level
    attributes: tuple[Hex16, ...]
    tcb_status: tuple[TcbStatus, ...]
    advisories: Any_ | tuple[Advisory, ...]
    fmspc: Any_ | tuple[Fmspc, ...]


class SnpTcb(Section, frozen=True, kw_only=True):
    """The least of each part of a TCB version."""

    bootloader: Byte
    tee: Byte
    snp: Byte
    microcode: Byte


class SnpPolicy(Section, frozen=True, kw_only=True):
    """Of an SEV-SNP report. Never in debug, and never with a migration agent."""

    measurement: Any_ | tuple[Hex48, ...]
    host_data: Any_ | tuple[Hex32, ...]
    id_key_digest: Any_ | tuple[Hex48, ...]
    author_key_digest: Any_ | tuple[Hex48, ...]
    family_id: Any_ | tuple[Hex16, ...]
    image_id: Any_ | tuple[Hex16, ...]
    chip_id: Any_ | tuple[Hex64, ...]
    products: tuple[Name, ...]
    guest_policy: tuple[Hex8, ...]
    platform_info: Any_ | tuple[Hex8, ...]
    vmpl: tuple[Level, ...]
    min_guest_svn: Level
    min_tcb: SnpTcb
    revocation: Literal["any", "required"]


class Policy(Section, frozen=True, kw_only=True):
    """A whole file. A section of a kind is there if, and only if, ``kinds`` names it."""

    version: Literal[1]
    kinds: tuple[Kind, ...]
    max_age_s: Level
    server: ServerPolicy
    tdx: TdxPolicy | None = None
    sgx: SgxPolicy | None = None
    sev_snp: SnpPolicy | None = None


class Pinned(NamedTuple):
    """What of a section has to be there so that not just any software is accepted."""

    holds: Callable[[Any], bool]
    told: str


# Of each section. RTMRs, MRCONFIGID and HOST_DATA only add to these: any firmware can extend an RTMR to any value, and
# the host chooses the other two. One who signs enclaves may sign others, so MRSIGNER goes with a product.
PINNED = {
    "tdx": Pinned(lambda one: one.mrtd != "any", "mrtd"),
    "sgx": Pinned(
        lambda one: one.mrenclave != "any" or "any" not in (one.mrsigner, one.isv_prod_id),
        "mrenclave, or mrsigner with isv-prod-id",
    ),
    "sev_snp": Pinned(
        lambda one: one.measurement != "any" or (one.id_key_digest != "any" and NO_ID_KEY not in one.id_key_digest),
        "measurement, or id-key-digest without that of zeros, which is no key",
    ),
}


def read_policy(path: Path) -> Policy:
    """The policy that a file holds. Raises PolicyError, in one line that names the file and the field."""
    try:
        if path.stat().st_size > MAX_POLICY_BYTES:
            raise PolicyError(f"{path} has more than {MAX_POLICY_BYTES} bytes: it is no policy")
        return parse_policy(path.read_bytes())
    except OSError as error:
        raise PolicyError(f"the policy {path} cannot be read: {error.strerror}; nothing is sent without one") from None
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def parse_policy(data: bytes) -> Policy:
    """Raises PolicyError."""
    try:
        policy = msgspec.convert(msgspec.toml.decode(data), Policy, strict=True)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PolicyError(f"no policy: {str(error)[:300]}") from None
    if not policy.kinds or not policy.server.protections:
        raise PolicyError("kinds and server.protections must name at least one each, or nothing is ever accepted")
    for name, pinned in PINNED.items():
        section, kind = getattr(policy, name), name.replace("_", "-")
        if (section is None) != (kind not in policy.kinds):
            missing = section is None
            raise PolicyError(f"kinds names {kind}, so [{kind}] is missing" if missing else f"kinds lacks {kind}")
        if section is not None and not pinned.holds(section):
            raise PolicyError(f"[{kind}] accepts any software: name {pinned.told}")
    return policy


def check_server(policy: ServerPolicy, model_digest: str, found: Configuration) -> None:
    """The statement of a server against a policy. Raises EvidenceRefused."""
    one_of("server.protection", found.protection, policy.protections)
    one_of("server.model-digest", model_digest, policy.model_digests)
    one_of("server.partition", found.partition, policy.partitions)
    one_of("server.software", found.software, policy.software)
    at_least("server.soundness-bits", found.soundness_bits, policy.min_soundness_bits)
    for field in ("worker_keys", "dealer_keys"):
        keys = getattr(found, field)
        for key in ("those of a roster, whoever it names",) if keys == "roster" else keys:
            one_of(f"server.{field.replace('_', '-')}", key, getattr(policy, field))
    for name, digest in found.adapters.items():
        one_of(f"server.adapters ({name})", digest, policy.adapters)
    one_of("server.embedding", found.embedding, policy.embeddings)
    for field in ("oblivious", "locked_memory"):
        value, wanted = getattr(found, field), getattr(policy, field)
        if wanted not in ("any", value):
            raise EvidenceRefused(f"server.{field.replace('_', '-')}", str(value).lower(), str(wanted).lower())


def one_of(field: str, found: Any, allowed: Any) -> None:
    """Raises EvidenceRefused unless ``allowed`` is "any" or has what was found."""
    if allowed != "any" and found not in allowed:
        shown = ", ".join(map(str, allowed[:3])) + (f" or {len(allowed) - 3} more" if len(allowed) > 3 else "")
        raise EvidenceRefused(field, str(found), f"one of the policy's: {shown or 'none'}")


def at_least(field: str, found: int, least: int) -> None:
    """Raises EvidenceRefused for less."""
    if found < least:
        raise EvidenceRefused(field, str(found), f"at least {least}")
