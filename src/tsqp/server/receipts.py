"""A receipt for each answer of a server that gives evidence. docs/attestation.md, section 6.

Covers: a receipt is of the bytes that came and of those that go, and an answer that ended with an error has none
(tests/server/test_receipts.py). Without evidence there is no ``Receipts``, and none of this is done.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from tsqp.server.answers import Answers, Asked
from tsqp.server.chat_types import Chunk
from tsqp.server.completions_types import Completion
from tsqp.server.errors import ApiError
from tsqp.server.params import SamplingBody
from tsqp.server.responses_types import ResponseEvent
from tsqp.server.service import Service
from tsqp.server.streams import Event
from tsqp.tee.answer_form import AnswerReader
from tsqp.tee.receipts import (
    HEADER,
    RECEIPT_VERSION,
    Checks,
    Opening,
    Path,
    Receipt,
    Sampling,
    SignedReceipt,
    Tokens,
    canonical_tokens,
    salted_sha256,
    sign_receipt,
)
from tsqp.tee.statement import Statement
from tsqp.trusted.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.server.attestation import Attester

SEED_BITS = 53  # of a seed that is drawn: every reader of JSON takes such a number as it is
_LAST = ("response.completed", "response.incomplete")


def drawn_seed() -> int:
    """One that nobody can foresee."""
    return secrets.randbits(SEED_BITS)


@dataclass(frozen=True)
class Receipts:
    """What is the same in all receipts of a server, and what varies from one to the next.

    ``statement``: of the evidence, with any nonce. ``key``: the secret one of its receipt key. ``checked``: how many
    products were checked so far. ``draw_seed``, ``draw_opening``: random in a server; a replay gives what was drawn.
    """

    statement: Statement
    key: Ed25519PrivateKey
    kv_dtype: str
    checked: Callable[[], int]
    draw_seed: Callable[[], int] = drawn_seed
    draw_opening: Callable[[], Opening] = Opening.drawn


def receipts_of(llm: LLM, attester: Attester) -> Receipts:
    """Those of a model that is loaded, signed by the attested key."""
    nonce = bytes(32).hex()  # plays no part in the identity
    return Receipts(attester.statement(nonce), attester.keys.receipt_key, llm.plan.kv_dtype, Checked(llm))


class Checked:
    """Counts products that were checked. A worker that was lost takes nothing of the count with it."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._guard = llm.guard

    def __call__(self) -> int:
        self._guard = self._llm.guard or self._guard  # None while there is no worker
        return 0 if self._guard is None else self._guard.counted()["products_checked"]


def repeatable(service: Service, params: SamplingParams) -> SamplingParams:
    """The same, with a seed that a receipt can state where tokens are chosen by chance."""
    if service.receipts is None or params.seed is not None or params.temperature == 0.0:
        return params
    return replace(params, seed=service.receipts.draw_seed())


@dataclass(frozen=True)
class Draft:
    """What is known of a receipt before its answer begins. ``checked``: the count at that moment."""

    receipts: Receipts
    path: Path
    body: bytes
    asked: Sequence[Asked]
    choices: int
    checked: int

    def sign(self, answer: AnswerReader, tokens: Sequence[Sequence[int]]) -> SignedReceipt:
        """``answer``: all that was sent of it. ``tokens``: the ids of each choice."""
        receipts, opening, statement = self.receipts, self.receipts.draw_opening(), self.receipts.statement
        configuration, lora = statement.configuration, self.asked[0].lora
        receipt = Receipt(
            version=RECEIPT_VERSION,
            receipt_key=statement.receipt_key,
            identity=statement.identity().hex(),
            id=answer.id,
            path=self.path,
            made_at=int(time.time()),
            software=configuration.software,
            model_digest=statement.model_digest,
            adapter=None if lora is None else configuration.adapters[lora],
            protection=configuration.protection,
            kv_dtype=receipts.kv_dtype,
            checks=Checks(
                soundness_bits=configuration.soundness_bits, products=max(0, receipts.checked() - self.checked)
            ),
            request_sha256=salted_sha256(opening.request or "", self.body),
            answer_sha256=salted_sha256(opening.answer or "", answer.canonical()),
            tokens_sha256=salted_sha256(opening.tokens or "", canonical_tokens(tokens)),
            sampling=self._sampling(),
            tokens=Tokens(
                prompt=sum(len(one.prompt) for one in self.asked[:: self.choices]), answer=sum(map(len, tokens))
            ),
        )
        return sign_receipt(receipt, opening, receipts.key)

    def _sampling(self) -> Sampling:
        first = self.asked[0].params
        given = {name: getattr(first, name) for name in Sampling.__struct_fields__}
        return Sampling(**{**given, "max_tokens": max(one.params.max_tokens for one in self.asked)})


async def draft_of(
    service: Service, request: Request, path: Path, body: SamplingBody, asked: Sequence[Asked], choices: int = 1
) -> Draft | None:
    """None where no receipt is to be given. ``choices``: answers to each prompt, side by side in ``asked``.

    Raises ApiError where one is asked for and none can be given.
    """
    wanted = bool(body.stream_options and body.stream_options.include_receipt)
    if service.receipts is None:
        if wanted:
            refuse_receipt("this server gives no receipts: it was started without --evidence")
        return None
    if body.stream and not wanted:
        return None
    return Draft(service.receipts, path, await request.body(), asked, choices, service.receipts.checked())


def refuse_receipt(why: str) -> None:
    """Raises ApiError."""
    raise ApiError(400, why, param="stream_options", code="unsupported_parameter")


def with_header(reply: Response, draft: Draft | None, answers: Answers) -> Response:
    """A whole answer, with its receipt."""
    if draft is not None:
        reader = AnswerReader(draft.path)
        reader.whole(bytes(reply.body))
        reply.headers[HEADER] = draft.sign(reader, answers.token_ids()).to_header()
    return reply


def with_receipt(
    events: AsyncGenerator[Event, None], draft: Draft | None, answers: Answers
) -> AsyncGenerator[Event, None]:
    """A stream, with its receipt: in a last event of its own, or in the last one of the responses API."""
    return events if draft is None else _with_receipt(events, draft, answers)


async def _with_receipt(
    events: AsyncGenerator[Event, None], draft: Draft, answers: Answers
) -> AsyncGenerator[Event, None]:
    reader, last = AnswerReader(draft.path), None
    async with aclosing(events):
        async for event in events:
            last = event.data
            if isinstance(last, ResponseEvent) and last.type == "error":
                yield event  # an answer that failed has no receipt
                return
            reader.event(msgspec.json.encode(last))
            if isinstance(last, ResponseEvent) and last.type in _LAST:
                receipt = draft.sign(reader, answers.token_ids())
                event = Event(msgspec.structs.replace(last, receipt=receipt), event.name)
            yield event
    if isinstance(last, Chunk | Completion):
        usage = UNSET if last.usage is UNSET else None
        receipt = draft.sign(reader, answers.token_ids())
        yield Event(msgspec.structs.replace(last, choices=[], usage=usage, receipt=receipt))
