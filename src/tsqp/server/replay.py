"""A request answered again, to compare every token with a receipt. docs/attestation.md, section 6.

The endpoint itself runs, with the seed and the salts of the receipt, and makes a receipt of its own: so parameters,
prompt and answer come from the request by the same code as in a server. Covers: an answer of other weights, another
seed or other parameters is refused (tests/server/test_replay.py). Assumes: this processor rounds as the server's does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.types import Message

from tsqp.errors import EvidenceRefused, InputError, TsqpError
from tsqp.server import chat, completions, responses
from tsqp.server.attestation import configuration_of
from tsqp.server.body import parsed
from tsqp.server.errors import ApiError
from tsqp.server.receipts import Checked, Receipts
from tsqp.server.service import Service
from tsqp.server.settings import ServerSettings
from tsqp.tee.receipts import HEADER, SignedReceipt, read_receipt
from tsqp.tee.statement import Statement

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM

ENDPOINTS = {
    "/v1/chat/completions": chat.create,
    "/v1/completions": completions.create,
    "/v1/responses": responses.create,
}
MANY = 1 << 20  # answers of one request: the server's own bounds have let it pass


async def check_replay(model: AsyncLLM, signed: SignedReceipt, body: bytes) -> None:
    """Answer ``body`` again and hold what comes of it against a receipt, whose signature was checked before.

    ``model``: in a private mode. Raises EvidenceRefused for another model, request, parameter or token.
    """
    signed.check_request(body)
    if None in msgspec.structs.astuple(signed.opening):
        raise EvidenceRefused("opening", "one without every salt", "the salts of request, answer and tokens")
    receipt, llm = signed.receipt, model.llm
    digest = "none" if llm.guard is None else llm.guard.model_digest
    if receipt.model_digest != digest:
        raise EvidenceRefused("model-digest", receipt.model_digest, f"{digest}, that of the weights for the replay")
    _same("kv-dtype", receipt.kv_dtype, llm.plan.kv_dtype)
    again = (await _answered(model, signed, body)).receipt
    _same("adapter", receipt.adapter, again.adapter)
    of_sampling = zip(receipt.sampling.__struct_fields__, msgspec.structs.astuple(receipt.sampling), strict=True)
    for name, found in of_sampling:
        _same(f"sampling.{name.replace('_', '-')}", found, getattr(again.sampling, name))
    _same("tokens.prompt", receipt.tokens.prompt, again.tokens.prompt)
    _same("tokens.answer", receipt.tokens.answer, again.tokens.answer)
    by = "that of the tokens of a replay"
    if receipt.software != again.software:
        by += f" by {again.software}: the receipt is of {receipt.software}, which may compute otherwise"
    if receipt.tokens_sha256 != again.tokens_sha256:
        raise EvidenceRefused("tokens-sha256", receipt.tokens_sha256, f"{again.tokens_sha256}, {by}")
    if receipt.answer_sha256 != again.answer_sha256:
        raise EvidenceRefused("answer-sha256", receipt.answer_sha256, f"{again.answer_sha256}, that of a replay")


async def _answered(model: AsyncLLM, signed: SignedReceipt, body: bytes) -> SignedReceipt:
    """The receipt of a replay, signed by a key that nobody keeps."""
    service = _service(model, signed, body)
    sent = _Sent(signed.receipt.path, body)
    request = Request(sent.scope, sent.receive)
    try:
        response = await ENDPOINTS[signed.receipt.path](service, request)
    except (ApiError, InputError) as error:
        raise EvidenceRefused("request", f"one that is refused here ({error})", "one that can be answered") from None
    await response(sent.scope, sent.receive, sent.send)
    return read_receipt(response.headers[HEADER].encode() if HEADER in response.headers else sent.last_receipt())


def _service(model: AsyncLLM, signed: SignedReceipt, body: bytes) -> Service:
    """The server as it has to have been."""
    receipt = signed.receipt
    try:
        name = parsed(body).get("model")
    except ApiError as error:
        raise EvidenceRefused("request", f"one that is refused here ({error})", "one that can be answered") from None
    if not isinstance(name, str):
        raise EvidenceRefused("request", "one that names no model", "one that can be answered")
    key = Ed25519PrivateKey.generate()
    statement = Statement(
        nonce=bytes(32).hex(),
        spki_sha256=bytes(32).hex(),
        receipt_key=key.public_key().public_bytes_raw().hex(),
        model_digest=receipt.model_digest,
        configuration=configuration_of(model.llm),
    )

    def seed() -> int:
        if receipt.sampling.seed is None:
            raise EvidenceRefused("sampling.seed", "null", "a seed: the request has none, and asks for chance")
        return receipt.sampling.seed

    receipts = Receipts(
        statement, key, model.llm.plan.kv_dtype, Checked(model.llm), draw_seed=seed, draw_opening=lambda: signed.opening
    )
    settings = ServerSettings(max_n=MANY, max_choices=MANY, max_answer_tokens=receipt.sampling.max_tokens)
    adapters = tuple(model.llm.adapters)
    for adapter in adapters:
        name = name.removesuffix(f":{adapter}")
    return Service(model, (name,), settings, receipt.protection, "tsqp-replay", receipts=receipts, adapters=adapters)


class _Sent:
    """One request without a network: its body is there, the client never leaves, and the answer's body is kept."""

    def __init__(self, path: str, body: bytes) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "state": {},
        }
        self._body: bytes | None = body
        self._answer = bytearray()

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        self._answer += message.get("body", b"")

    def last_receipt(self) -> bytes:
        """The JSON of the receipt in the last event of a stream.

        Raises EvidenceRefused where none was asked for; TsqpError where the stream ended with an error.
        """
        events = [line.removeprefix(b"data:") for line in bytes(self._answer).splitlines() if line.startswith(b"data:")]
        last: dict[str, Any] = {}
        for event in events:
            if event.strip() != b"[DONE]":
                last = msgspec.json.decode(event)
        if last.get("error") is not None:
            raise TsqpError(f"the replay failed: {last['error']['message']}")
        if "receipt" not in last:
            raise EvidenceRefused("request", "one for a stream without a receipt", "one that asks for a receipt")
        return msgspec.json.encode(last["receipt"])


def _same(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise EvidenceRefused(name, str(found), f"{expected}, as in a replay")
