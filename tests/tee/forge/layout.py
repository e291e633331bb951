"""Where the fields of the signed structures are, as Intel and AMD document them: offset and size in bytes.

Sources: Intel SGX DCAP quoting library API (quotes v3 to v5, SGX enclave report), Intel TDX DCAP quoting library API
(TD report 1.0 and 1.5); AMD SEV secure nested paging firmware ABI, 56860 (attestation report).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

Layout = Mapping[str, tuple[int, int]]


def _in_a_row(*fields: tuple[str, int]) -> dict[str, tuple[int, int]]:
    """Fields one after the other, by their sizes."""
    ends = list(accumulate(size for _, size in fields))
    return {name: (end - size, size) for (name, size), end in zip(fields, ends, strict=True)}


QUOTE_HEADER = _in_a_row(
    ("version", 2),
    ("attestation_key_type", 2),
    ("tee_type", 4),
    ("qe_svn", 2),
    ("pce_svn", 2),
    ("qe_vendor_id", 16),
    ("user_data", 20),
)

TD_REPORT_10 = _in_a_row(
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mr_signer_seam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rt_mr0", 48),
    ("rt_mr1", 48),
    ("rt_mr2", 48),
    ("rt_mr3", 48),
    ("report_data", 64),
)

TD_REPORT_15 = {**TD_REPORT_10, "tee_tcb_svn2": (584, 16), "mr_service_td": (600, 48)}

ENCLAVE_REPORT = _in_a_row(
    ("cpu_svn", 16),
    ("misc_select", 4),
    ("reserved1", 28),
    ("attributes", 16),
    ("mr_enclave", 32),
    ("reserved2", 32),
    ("mr_signer", 32),
    ("reserved3", 96),
    ("isv_prod_id", 2),
    ("isv_svn", 2),
    ("reserved4", 60),
    ("report_data", 64),
)

SNP_REPORT: Layout = {
    "version": (0x000, 4),
    "guest_svn": (0x004, 4),
    "policy": (0x008, 8),
    "family_id": (0x010, 16),
    "image_id": (0x020, 16),
    "vmpl": (0x030, 4),
    "signature_algo": (0x034, 4),
    "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8),
    "key_info": (0x048, 4),
    "report_data": (0x050, 64),
    "measurement": (0x090, 48),
    "host_data": (0x0C0, 32),
    "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8),
    "cpuid_family": (0x188, 1),  # from version 3 on, with the next two
    "cpuid_model": (0x189, 1),
    "cpuid_stepping": (0x18A, 1),
    "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8),
    "current_version": (0x1E8, 3),  # build, minor, major
    "committed_version": (0x1EC, 3),
    "launch_tcb": (0x1F0, 8),
    "launch_mit_vector": (0x1F8, 8),  # version 5, with the next
    "current_mit_vector": (0x200, 8),
    "signature_r": (0x2A0, 72),
    "signature_s": (0x2E8, 72),
}

HEADER_BYTES, BODY_DESCRIPTOR_BYTES = 48, 6  # of an Intel quote; version 5 has a descriptor of its body
TD_REPORT_10_BYTES, TD_REPORT_15_BYTES, ENCLAVE_REPORT_BYTES = 584, 648, 384
SNP_REPORT_BYTES, SNP_SIGNED_BYTES = 0x4A0, 0x2A0


def pack(layout: Layout, size: int, fields: Mapping[str, bytes | int]) -> bytes:
    """``size`` bytes with these fields; numbers little-endian, the rest zero.

    Raises ValueError for a field that is unknown or of another size: a typing error in a test is not to pass as a
    refusal.
    """
    data = bytearray(size)
    for name, found in fields.items():
        if name not in layout:
            raise ValueError(f"{name} is no field of this structure")
        offset, width = layout[name]
        content = found.to_bytes(width, "little") if isinstance(found, int) else found
        if len(content) != width:
            raise ValueError(f"{name} has {width} bytes, not {len(content)}")
        data[offset : offset + width] = content
    return bytes(data)


def field(layout: Layout, data: bytes, name: str) -> bytes:
    """The bytes of one field."""
    offset, width = layout[name]
    return data[offset : offset + width]
