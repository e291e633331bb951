"""Policies as TOML, with every field; tests change single ones."""

from __future__ import annotations

from typing import Any

from tsqp.tee.policy import Policy, parse_policy

SERVER: dict[str, Any] = {
    "model-digests": ["cc" * 32],
    "protections": ["masked"],
    "partitions": ["linear"],
    "software": "any",
    "min-soundness-bits": 60,
    "worker-keys": ["11" * 32],
    "dealer-keys": [],
    "adapters": ["22" * 32],
    "oblivious": "any",
    "embeddings": "any",
    "locked-memory": "any",
}
TDX: dict[str, Any] = {
    "mrtd": ["aa" * 48],
    "rtmr0": "any",
    "rtmr1": "any",
    "rtmr2": "any",
    "rtmr3": "any",
    "mrconfigid": "any",
    "mrowner": "any",
    "mrownerconfig": "any",
    "mrseam": "any",
    "mrsignerseam": "any",
    "attributes": ["0000001000000000"],
    "xfam": "any",
    "min-tee-tcb-svn": "any",
    "tcb-status": ["UpToDate"],
    "advisories": [],
    "fmspc": "any",
}
SGX: dict[str, Any] = {
    "mrenclave": ["aa" * 32],
    "mrsigner": "any",
    "isv-prod-id": "any",
    "min-isv-svn": 0,
    "attributes": ["0500000000000000e700000000000000"],
    "tcb-status": ["UpToDate"],
    "advisories": "any",
    "fmspc": "any",
}
SEV_SNP: dict[str, Any] = {
    "measurement": ["aa" * 48],
    "host-data": "any",
    "id-key-digest": "any",
    "author-key-digest": "any",
    "family-id": "any",
    "image-id": "any",
    "chip-id": "any",
    "products": ["Milan"],
    "guest-policy": ["0000000000030000"],
    "platform-info": "any",
    "vmpl": [0],
    "min-guest-svn": 0,
    "min-tcb": {"bootloader": 0, "tee": 0, "snp": 0, "microcode": 0},
    "revocation": "any",
}
SECTIONS = {"tdx": TDX, "sgx": SGX, "sev-snp": SEV_SNP}


def policy_text(kinds: list[str], *, top: dict[str, Any] | None = None, **changes: dict[str, Any]) -> str:
    """TOML of a policy for ``kinds``. ``changes``: of the sections, with ``sev_snp`` for sev-snp; None leaves out."""
    wanted = {"server": SERVER, **{kind: SECTIONS[kind] for kind in kinds if kind != "none"}}
    lines = _lines({"version": 1, "kinds": kinds, "max-age-s": 3600, **(top or {})})
    for name, section in wanted.items():
        lines += ["", f"[{name}]", *_lines({**section, **changes.get(name.replace("-", "_"), {})})]
    return "\n".join(lines)


def policy(kinds: list[str], **changes: dict[str, Any]) -> Policy:
    """One that is right, but for ``changes``."""
    return parse_policy(policy_text(kinds, **changes).encode())


def _lines(fields: dict[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in fields.items() if value is not None]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
