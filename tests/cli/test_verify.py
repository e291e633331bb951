"""``tsqp verify``: accepted, or refused in one line with an exit code that says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client.evidence_server import evidence_server, honest
from tests.commands import Result
from tests.tee.certificates import key_pair
from tests.tee.policies import policy_text
from tests.tee.real_evidence import real
from tests.tee.statements import RECEIPT_KEY, statement
from tsqp.tee.evidence import Quote, make_evidence

Command = Callable[..., Result]
PAIR = key_pair()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(["none"]))
    return path


def test_a_server_is_accepted_and_its_evidence_kept(tsqp: Command, policy: Path, tmp_path: Path) -> None:
    kept = tmp_path / "evidence.json"
    with evidence_server(PAIR, honest(PAIR), tmp_path) as address:
        result = tsqp("verify", address, "--policy", policy, "--save", kept, "--json")
    assert result.code == 0, result.err
    assert result.json["accepted"] is True
    assert (result.json["kind"], result.json["protection"]) == ("none", "masked")
    told = {"oblivious": False, "embedding": "plain", "locked_memory": False, "soundness_bits": 62}
    assert told.items() <= result.json.items()
    again = tsqp("verify", kept, "--policy", policy, "--json")
    assert again.json == result.json


def test_a_draft_is_a_policy_that_accepts_this_server(tsqp: Command, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with evidence_server(PAIR, honest(PAIR), tmp_path) as address:
        drafted = tsqp("verify", address, "--draft")
        path.write_text(drafted.out)
        assert tsqp("verify", address, "--policy", path).code == 0
    assert drafted.code == 0
    for wrong in (["x.json"], ["x.json", "--draft", "--policy", path], ["x.json", "--draft", "--save", "y"]):
        result = tsqp("verify", *wrong)
        assert result.code == 2
        assert "--draft" in result.error


def test_a_refusal_is_one_line_and_keeps_nothing(tsqp: Command, policy: Path, tmp_path: Path) -> None:
    kept = tmp_path / "evidence.json"
    with evidence_server(key_pair(), honest(PAIR), tmp_path) as address:
        result = tsqp("verify", address, "--policy", policy, "--save", kept)
    assert result.code == 1
    assert "refused: certificate-sha256 is " in result.error
    assert result.out == ""
    assert not kept.exists()


def test_evidence_that_was_kept_grows_old(tsqp: Command, policy: Path, tmp_path: Path) -> None:
    kept = tmp_path / "evidence.json"
    found = make_evidence(statement(), Quote(kind="none", quote=b""), RECEIPT_KEY, b"leaf", 1_700_000_000)
    kept.write_bytes(found.to_json())
    assert "refused: made-at is " in tsqp("verify", kept, "--policy", policy).error
    assert tsqp("verify", kept, "--policy", policy, "--at", "2023-11-14T22:30:00").code == 0


def test_a_published_quote_is_checked_to_its_end(tsqp: Command, tmp_path: Path) -> None:
    """All of it is right but the statement, which is not the one that it was made for."""
    mrtd = real("tdx/quote.bin")[48 + 136 : 48 + 184].hex()
    path, kept, given = tmp_path / "policy.toml", tmp_path / "evidence.json", tmp_path / "collateral"
    path.write_text(policy_text(["tdx"], tdx={"mrtd": [mrtd]}))
    given.mkdir()
    (given / "old.json").write_bytes(real("tdx/collateral_outdated.json"))
    (given / "tdx.json").write_bytes(real("tdx/collateral.json"))
    quote = Quote(kind="tdx", quote=real("tdx/quote.bin"))
    kept.write_bytes(make_evidence(statement(), quote, RECEIPT_KEY, b"leaf", 1_750_464_000).to_json())
    result = tsqp("verify", kept, "--policy", path, "--collateral", given, "--at", "2025-06-21T00:10:00")
    assert "refused: report-data is 9a9d48e7" in result.error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evidence.json"], "evidence.json cannot be read: No such file"),
        (["http://host"], "give https://host:port"),
        (["https://127.0.0.1:1", "--at", "2025-01-01"], "--at is for a file"),
        (["evidence.json", "--collateral", "http://host"], "an https:// address"),
        (["evidence.json", "--collateral", "missing"], "missing is no directory"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], told: str, tsqp: Command, policy: Path) -> None:
    result = tsqp("verify", *arguments, "--policy", policy)
    assert result.code == 2
    assert told in result.error


def test_a_missing_policy_asks_nobody(tsqp: Command, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(nonce: str) -> tuple[int, bytes]:
        asked.append(nonce)
        return 200, b""

    with evidence_server(PAIR, answer, tmp_path) as address:
        result = tsqp("verify", address, "--policy", tmp_path / "missing.toml")
    assert (result.code, asked) == (2, [])
    assert "nothing is sent without one" in result.error


def test_what_is_no_evidence_is_refused(tsqp: Command, policy: Path, tmp_path: Path) -> None:
    kept = tmp_path / "evidence.json"
    kept.write_text(json.dumps({"version": "tsqp-evidence-v1", "\x1b[2J": 1}))
    result = tsqp("verify", kept, "--policy", policy)
    assert result.code == 1
    assert "refused: evidence is what cannot be read" in result.error
    assert "\x1b" not in result.err
