"""``tsqp verify-receipt``: what was asked for holds, or is refused in one line."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.commands import LIMIT_S, Home, Result
from tests.server.chat_model import chat_model
from tests.server.process import serving
from tests.tee.policies import policy_text
from tests.tee.some_receipts import ANSWER, REQUEST, evidence, signed
from tsqp.tee.receipts import HEADER, SignedReceipt

Command = Callable[..., Result]
AT = ("--at", "2027-01-15T08:00:00")  # when the evidence of tests was made


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory with all that belongs to one answer."""
    (choice,) = json.loads(ANSWER)
    body = {"id": "x", "choices": [{"index": 0, "message": {"content": choice["text"]}, "finish_reason": "stop"}]}
    (tmp_path / "receipt.json").write_bytes(msgspec.json.encode(signed()))
    (tmp_path / "request.json").write_bytes(REQUEST)
    (tmp_path / "answer.json").write_text(json.dumps(body))
    (tmp_path / "evidence.json").write_bytes(evidence().to_json())
    (tmp_path / "policy.toml").write_text(policy_text(["none"]))
    return tmp_path


def options(kept: Path, *names: str) -> list[str | Path]:
    """What belongs to the receipt, as options."""
    ends = {"policy": "toml"}
    return [word for name in names for word in (f"--{name}", kept / f"{name}.{ends.get(name, 'json')}")]


def test_all_of_it_is_accepted(tsqp: Command, kept: Path) -> None:
    every = options(kept, "request", "answer", "evidence", "policy")
    result = tsqp("verify-receipt", kept / "receipt.json", *every, *AT, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    shown = result.json
    compared = ("accepted", "key_attested", "request_compared", "answer_compared", "replayed")
    assert [shown[name] for name in compared] == [True, True, True, True, False]
    assert (shown["protection"], shown["sampling"]["seed"], shown["checks"]["products"]) == ("masked", 77, 340)
    assert shown["made_at"] == "2027-01-15T08:00:00+00:00"


def test_a_header_from_a_pipe_and_a_key_that_nobody_attests(tsqp: Command) -> None:
    result = tsqp("verify-receipt", "-", stdin=f"{HEADER}: {signed().to_header()}\r\n")
    assert result.code == 0, result.err
    assert "note: the receipt key was not shown to be attested" in result.err
    assert '"key_attested": false' in result.out


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("receipt.json", b"eyJ9", "refused: receipt is what cannot be read"),
        ("receipt.json", msgspec.json.encode(signed()).replace(b"masked", b"local "), "refused: signature is "),
        ("request.json", REQUEST + b"\n", "refused: request is one with the salted hash"),
        ("answer.json", b'{"choices": []}', "refused: answer is one that broke off"),
        ("answer.json", b"data: [DONE]", "refused: answer is one that broke off"),
        ("evidence.json", evidence(spki_sha256="99" * 32).to_json(), "refused: identity is "),
        ("policy.toml", policy_text(["none"], server={"protections": ["verified"]}).encode(), "server.protection is"),
    ],
)
def test_a_refusal_is_one_line(tsqp: Command, kept: Path, name: str, content: bytes, told: str) -> None:
    (kept / name).write_bytes(content)
    every = options(kept, "request", "answer", "evidence", "policy")
    result = tsqp("verify-receipt", kept / "receipt.json", *every, *AT)
    assert (result.code, result.out) == (1, "")
    assert told in result.error


def test_evidence_that_was_kept_grows_old(tsqp: Command, kept: Path) -> None:
    result = tsqp("verify-receipt", kept / "receipt.json", *options(kept, "evidence", "policy"))
    assert "refused: made-at is " in result.error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--evidence", "evidence.json"], "--evidence and --policy go together"),
        (["--policy", "policy.toml"], "--evidence and --policy go together"),
        (["--collateral", "."], "--collateral and --at are for --evidence"),
        (["--replay", "--model", "default"], "give it as --request"),
        (["--replay", "--request", "request.json"], "the weights as --model"),
        (["--model", "default"], "--model, --lora and --threads are for --replay"),
        (["--lora", "default"], "--model, --lora and --threads are for --replay"),
        (["--request", "missing.json"], "missing.json cannot be read: No such file"),
    ],
)
def test_wrong_use_is_one_line(tsqp: Command, kept: Path, arguments: list[str], told: str) -> None:
    placed = [kept / one if "." in one and len(one) > 1 else one for one in arguments]
    result = tsqp("verify-receipt", kept / "receipt.json", *placed)
    assert result.code == 2
    assert told in result.error


def test_a_cache_of_keys_that_is_none_is_refused(tsqp: Command, kept: Path) -> None:
    (kept / "receipt.json").write_bytes(msgspec.json.encode(signed(kv_dtype="float16")))
    replay = ("--replay", "--model", "nowhere")
    result = tsqp("verify-receipt", kept / "receipt.json", *options(kept, "request"), *replay)
    assert "refused: kv-dtype is float16" in result.error


@pytest.mark.slow
def test_from_a_server_to_a_replay(home: Home, tsqp: Command, tmp_path: Path) -> None:
    """A server in a process of its own, evidence of kind none, a stream by chance, and all checks there are."""
    model = ("--model", chat_model())
    body = json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello?"}],
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_receipt": True},
        }
    )
    options = ("--served-model-name", "tiny", "--port", 0, "--protection", "verified", "--evidence", "none")
    policy = tmp_path / "policy.toml"
    digest = tsqp("model", "info", chat_model(), "--digest", "--json").json["model_digest"]
    wanted: dict[str, Any] = {
        "model-digests": [digest],
        "protections": ["verified"],
        "worker-keys": "any",
        "dealer-keys": "any",
        "adapters": "any",
    }
    policy.write_text(policy_text(["none"], server=wanted))
    evidence = tmp_path / "evidence.json"
    with serving(home, *model, *options) as server:
        verified = tsqp("verify", server.address, "--policy", policy, "--save", evidence)
        assert verified.code == 0, verified.err
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        headers = {"content-type": "application/json"}
        with httpx.Client(verify=trusting, timeout=LIMIT_S) as client:
            answer = client.post(f"{server.address}/v1/chat/completions", content=body, headers=headers)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if '"receipt":' in line]
    (tmp_path / "receipt.json").write_text(json.dumps(json.loads(events[0])["receipt"]))
    (tmp_path / "request.json").write_text(body)
    (tmp_path / "answer.txt").write_text(answer.text)
    every = ("--request", tmp_path / "request.json", "--answer", tmp_path / "answer.txt")
    attested = ("--evidence", evidence, "--policy", policy)
    result = tsqp("verify-receipt", tmp_path / "receipt.json", *every, *attested, "--replay", *model, "--json")
    assert result.code == 0, result.err
    assert result.json["replayed"] is True
    assert result.json["key_attested"] is True
    read: SignedReceipt = msgspec.json.decode((tmp_path / "receipt.json").read_bytes(), type=SignedReceipt)
    assert read.receipt.checks.products > 0
