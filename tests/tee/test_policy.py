"""A policy says each thing that it accepts, or it is refused before anything is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tee.policies import SECTIONS, SERVER, policy, policy_text
from tests.tee.statements import CONFIGURATION
from tsqp.errors import EvidenceRefused, PolicyError
from tsqp.tee.policy import check_server, parse_policy, read_policy

KINDS = ["tdx", "sgx", "sev-snp", "none"]
DIGEST = "cc" * 32


def test_a_whole_policy_is_read() -> None:
    found = policy(KINDS)
    assert found.kinds == tuple(KINDS)
    assert found.tdx is not None
    assert found.tdx.rtmr0 == "any"
    assert found.tdx.mrtd == ("aa" * 48,)
    check_server(found.server, DIGEST, CONFIGURATION)


@pytest.mark.parametrize("section", ["server", *SECTIONS])
def test_no_field_may_be_left_out(section: str) -> None:
    for name in SERVER if section == "server" else SECTIONS[section]:
        with pytest.raises(PolicyError, match=f"`{name}`"):
            parse_policy(policy_text(KINDS, **{section.replace("-", "_"): {name: None}}).encode())


@pytest.mark.parametrize("section", ["server", *SECTIONS])
def test_no_field_may_be_unknown(section: str) -> None:
    with pytest.raises(PolicyError, match="unknown field `rtmr9`"):
        parse_policy(policy_text(KINDS, **{section.replace("-", "_"): {"rtmr9": "any"}}).encode())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"top": {"version": 2}}, "version"),
        ({"top": {"kinds": ["tpm"]}}, "kinds"),
        ({"top": {"kinds": []}}, "kinds"),
        ({"top": {"max-age-s": -1}}, "max-age-s"),
        ({"server": {"protections": "any"}}, "protections"),
        ({"server": {"protections": []}}, "server.protections"),
        ({"server": {"model-digests": ["CC" * 32]}}, "model-digests"),
        ({"server": {"model-digests": "all"}}, "model-digests"),
        ({"server": {"oblivious": 1}}, "oblivious"),
        ({"server": {"embeddings": ["hope"]}}, "embeddings"),
        ({"server": {"embeddings": True}}, "embeddings"),
        ({"tdx": {"tcb-status": ["Revoked"]}}, "tcb-status"),
        ({"tdx": {"tcb-status": "any"}}, "tcb-status"),
        ({"tdx": {"attributes": "any"}}, "attributes"),
        ({"tdx": {"mrtd": ["aa" * 47]}}, "mrtd"),
        ({"sev_snp": {"guest-policy": "any"}}, "guest-policy"),
        ({"sev_snp": {"products": "any"}}, "products"),
        ({"sev_snp": {"min-tcb": {"bootloader": 0, "tee": 0, "snp": 0}}}, "min-tcb"),
        ({"tdx": {"mrtd": "any"}}, r"\[tdx\] accepts any software"),
        ({"sgx": {"mrenclave": "any"}}, r"\[sgx\] accepts any software"),
        ({"sev_snp": {"measurement": "any"}}, r"\[sev-snp\] accepts any software"),
        # Anybody's firmware can extend an RTMR, the host chooses MRCONFIGID and HOST_DATA, no ID key is a digest of
        # zeros, and one who signs enclaves signs several products.
        ({"tdx": {"mrtd": "any", "mrconfigid": ["aa" * 48]}}, r"\[tdx\] accepts any software"),
        ({"tdx": {"mrtd": "any", **{f"rtmr{at}": ["aa" * 48] for at in range(4)}}}, r"\[tdx\] accepts any software"),
        ({"sgx": {"mrenclave": "any", "mrsigner": ["aa" * 32]}}, r"\[sgx\] accepts any software"),
        ({"sgx": {"mrenclave": "any", "isv-prod-id": [1]}}, r"\[sgx\] accepts any software"),
        ({"sev_snp": {"measurement": "any", "host-data": ["aa" * 32]}}, r"\[sev-snp\] accepts any software"),
        ({"sev_snp": {"measurement": "any", "id-key-digest": ["00" * 48]}}, r"\[sev-snp\] accepts any software"),
        (
            {"sev_snp": {"measurement": "any", "id-key-digest": ["aa" * 48, "00" * 48]}},
            r"\[sev-snp\] accepts any software",
        ),
    ],
)
def test_what_is_not_a_policy_is_refused_by_its_field(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        parse_policy(policy_text(KINDS, **changes).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"sgx": {"mrenclave": "any", "mrsigner": ["aa" * 32], "isv-prod-id": [1]}},
        {"sev_snp": {"measurement": "any", "id-key-digest": ["aa" * 48]}},
        {"sev_snp": {"id-key-digest": ["00" * 48]}},  # beside a measurement
    ],
)
def test_who_signs_the_software_names_it(changes: dict[str, Any]) -> None:
    parse_policy(policy_text(KINDS, **changes).encode())


@pytest.mark.parametrize("kind", SECTIONS)
def test_kinds_and_sections_belong_together(kind: str) -> None:
    others = [other for other in KINDS if other != kind]
    with pytest.raises(PolicyError, match=f"kinds lacks {kind}"):
        parse_policy(policy_text(KINDS, top={"kinds": others}).encode())
    with pytest.raises(PolicyError, match=rf"\[{kind}\] is missing"):
        parse_policy(policy_text(others, top={"kinds": KINDS}).encode())


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"version = ", b"[" * 5000, b"version = 1"], ids=len)
def test_what_is_no_toml_or_empty_is_refused(data: bytes) -> None:
    with pytest.raises(PolicyError, match="no policy: "):
        parse_policy(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"missing\.toml cannot be read: No such file .*nothing is sent"):
        read_policy(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text(policy_text(KINDS, server={"software": None}))
    with pytest.raises(PolicyError, match=r"bad\.toml: no policy: .*software"):
        read_policy(tmp_path / "bad.toml")
    (tmp_path / "long.toml").write_text("#" * (1 << 20))
    with pytest.raises(PolicyError, match=r"long\.toml has more than"):
        read_policy(tmp_path / "long.toml")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protection": "open"}, r"server\.protection is open"),
        ({"partition": "layer"}, r"server\.partition is layer"),
        ({"soundness_bits": 31}, r"server\.soundness-bits is 31, and not at least 60"),
        ({"worker_keys": ("11" * 32, "12" * 32)}, r"server\.worker-keys is 1212"),
        ({"dealer_keys": ("11" * 32,)}, r"server\.dealer-keys is 1111"),
        ({"worker_keys": "roster"}, r"server\.worker-keys is those of a roster"),
        ({"dealer_keys": "roster"}, r"server\.dealer-keys is those of a roster"),
        ({"adapters": {"legal": "23" * 32}}, r"server\.adapters \(legal\) is 2323"),
    ],
)
def test_a_server_that_runs_otherwise_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(EvidenceRefused, match=told):
        check_server(policy(["none"]).server, DIGEST, msgspec.structs.replace(CONFIGURATION, **change))


@pytest.mark.parametrize("field", ["oblivious", "locked-memory"])
@pytest.mark.parametrize("wanted", [True, False, "any"])
def test_a_switch_is_required_forbidden_or_not_looked_at(field: str, wanted: bool | str) -> None:
    server = policy(["none"], server={field: wanted}).server
    for found in (True, False):
        changed = msgspec.structs.replace(CONFIGURATION, **{field.replace("-", "_"): found})
        if wanted in ("any", found):
            check_server(server, DIGEST, changed)
        else:
            with pytest.raises(EvidenceRefused, match=rf"server\.{field} is {str(found).lower()}"):
                check_server(server, DIGEST, changed)


@pytest.mark.parametrize("wanted", ["any", ["scan", "oram"], ["oram"], []])
def test_the_way_to_look_up_a_token_is_one_of_the_policys(wanted: str | list[str]) -> None:
    server = policy(["none"], server={"embeddings": wanted}).server
    for found in ("plain", "scan", "oram", "auto"):
        changed = msgspec.structs.replace(CONFIGURATION, embedding=found)
        if wanted == "any" or found in wanted:
            check_server(server, DIGEST, changed)
        else:
            with pytest.raises(EvidenceRefused, match=rf"server\.embedding is {found}"):
                check_server(server, DIGEST, changed)


def test_who_does_not_look_at_keys_accepts_a_roster() -> None:
    server = policy(["none"], server={"worker-keys": "any", "dealer-keys": "any"}).server
    check_server(server, DIGEST, msgspec.structs.replace(CONFIGURATION, worker_keys="roster", dealer_keys="roster"))


def test_software_and_model_are_compared() -> None:
    server = policy(["none"], server={"software": ["tsqp 9"]}).server
    with pytest.raises(EvidenceRefused, match=r"server\.software is tsqp 0\.1\.0"):
        check_server(server, DIGEST, CONFIGURATION)
    with pytest.raises(EvidenceRefused, match=r"server\.model-digest is dddd"):
        check_server(policy(["none"]).server, "dd" * 32, CONFIGURATION)
