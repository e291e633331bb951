"""A receipt that is right is answered again to the last token; one of a server that cheats is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.adapters import write_adapter
from tests.commands import LIMIT_S
from tests.server.chat_model import chat_model
from tests.server.serving import NAME, client_of, events_of, service_of
from tests.tee.statements import CONFIGURATION, RECEIPT_KEY, statement
from tests.trusted.guard.hostile import serve
from tsqp import LLM
from tsqp.api.async_llm import AsyncLLM
from tsqp.api.config import ComputeConfig
from tsqp.arith.row_threads import row_threads
from tsqp.errors import EvidenceRefused
from tsqp.server.receipts import Checked, Receipts
from tsqp.server.replay import check_replay
from tsqp.tee.receipts import HEADER, SignedReceipt, read_receipt, salted_sha256, sign_receipt

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_receipt": True}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
Answered = tuple[bytes, SignedReceipt]


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Twenty requests, no two alike: greedy and by chance, with and without a seed, of each API, two by an adapter."""
    for number, (path, fields) in enumerate(plain_bodies()):
        yield path, {**fields, "model": f"{NAME}:law"} if number in (5, 14) else fields


def plain_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    for number in range(20):
        messages = [{"role": "user", "content": f"Question {number}: " + "why " * (number % 7)}]
        chance: Any = [{"temperature": 0}, {}, {"seed": number}, {"temperature": 0.7, "top_p": 0.9}][number % 4]
        more: Any = [
            {},
            STREAM,
            {"logprobs": True, "top_logprobs": 2},
            {"n": 2, "stop": ["e"], "presence_penalty": 0.5},
            {"tools": [TOOL], "tool_choice": "required"},
            {"response_format": FORM},
        ][number % 6]
        if number % 5 == 3:
            yield COMPLETIONS, {"prompt": [f"Once {number}", "and more"], **chance}
        elif number % 5 == 4:
            yield RESPONSES, {"input": f"Say {number}", "max_output_tokens": 10, **chance, **STREAM}
        else:
            yield CHAT, {"messages": messages, "max_tokens": 10, **chance, **more}


def other_weights() -> Path:
    """The same shape and tokenizer; each matrix has its rows in another order."""
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    directory = Path(mkdtemp(prefix="tsqp-other-")) / "model"
    copytree(chat_model(), directory)
    (file,) = directory.glob("*.safetensors")
    weights = {name: one.flip(0).contiguous() if one.dim() == 2 else one for name, one in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return directory


@cache
def adapter() -> str:
    """As an option."""
    import transformers

    model: Any = SimpleNamespace(oracle=transformers.AutoModelForCausalLM.from_pretrained(chat_model()))
    return f"law={write_adapter(Path(mkdtemp(prefix='tsqp-law-')), model)}"


@contextmanager
def opened(model: Path, mode: Any, threads: int) -> Iterator[LLM]:
    """On its own number of threads."""
    before = torch.get_num_threads()
    row_threads.cache_clear()
    try:
        compute = ComputeConfig(threads=threads, lora=(adapter(),))
        with serve(model) as (_, address), LLM(str(model), protection=mode, worker=address, compute=compute) as llm:
            yield llm
    finally:
        torch.set_num_threads(before)
        row_threads.cache_clear()


def receipts_of(llm: LLM, digest: str | None = None) -> Receipts:
    """Signed by the key of tests. ``digest``: what the server claims; the truth when not given."""
    assert llm.guard is not None
    configuration = msgspec.structs.replace(CONFIGURATION, adapters=dict(llm.adapters))
    stated = statement(model_digest=digest or llm.guard.model_digest, configuration=configuration)
    return Receipts(stated, RECEIPT_KEY, llm.plan.kv_dtype, Checked(llm))


async def answered(
    model: AsyncLLM, asked: list[tuple[str, dict[str, Any]]], digest: str | None = None
) -> list[Answered]:
    """All at once, by the server's endpoints."""
    service = service_of(model, receipts=receipts_of(model.llm, digest), adapters=tuple(model.llm.adapters))

    async def one(path: str, fields: dict[str, Any]) -> Answered:
        body = json.dumps({"model": NAME, **fields}).encode()
        answer = await client.post(path, content=body, headers={"content-type": "application/json"}, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        if HEADER in answer.headers:
            return body, read_receipt(answer.headers[HEADER].encode())
        return body, read_receipt(json.dumps(events_of(answer.text)[-1]["receipt"]).encode())

    async with client_of(service) as client:
        return list(await asyncio.gather(*(one(*body) for body in asked)))


@pytest.fixture(scope="module")
def made() -> list[Answered]:
    """What a masked server has answered, all twenty at once, on two threads."""

    async def whole(llm: LLM) -> list[Answered]:
        async with AsyncLLM(llm) as model:
            return await answered(model, list(bodies()))

    with opened(chat_model(), "masked", 2) as llm:
        return asyncio.run(whole(llm))


@pytest.fixture(scope="module")
def model(made: list[Answered]) -> Iterator[LLM]:
    """What replays: verified, on one thread; opened when the server has ended."""
    with opened(chat_model(), "verified", 1) as llm:
        yield llm


@pytest.fixture
def replay(model: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replays of receipts, one after another."""
    monkeypatch.setattr(model, "close", lambda: None)  # for the next test

    def replayed(*asked: tuple[SignedReceipt, bytes]) -> None:
        async def whole() -> None:
            async with AsyncLLM(model) as opened_again:
                for signed, body in asked:
                    await check_replay(opened_again, signed, body)

        asyncio.run(whole())

    return replayed


def test_twenty_answers_are_the_same_alone_on_other_threads(made: list[Answered], replay: Callable[..., None]) -> None:
    drawn = [body for body, signed in made if b'"seed"' not in body and signed.receipt.sampling.seed is not None]
    assert len(drawn) >= 8
    assert {signed.receipt.path for _, signed in made} == {CHAT, COMPLETIONS, RESPONSES}
    assert sum(signed.receipt.tokens.answer for _, signed in made) > 150
    assert all(signed.receipt.checks.products > 0 for _, signed in made)
    assert sum(signed.receipt.adapter is not None for _, signed in made) == 2
    replay(*((signed, body) for body, signed in made))


def resigned(signed: SignedReceipt, **changes: Any) -> SignedReceipt:
    """What a server that lies signs."""
    return sign_receipt(msgspec.structs.replace(signed.receipt, **changes), signed.opening, RECEIPT_KEY)


def of_chance(made: list[Answered]) -> Answered:
    """One that was chosen by a seed that the server has drawn."""
    return next(
        (body, signed)
        for body, signed in made
        if b'"seed"' not in body and signed.receipt.sampling.seed is not None and b"stream" not in body
    )


def test_what_a_receipt_says_is_held_against_the_replay(made: list[Answered], replay: Callable[..., None]) -> None:
    body, signed = of_chance(made)
    replay((signed, body))
    receipt, sampling = signed.receipt, signed.receipt.sampling

    def lies(told: str, **changes: Any) -> None:
        with pytest.raises(EvidenceRefused, match=f"refused: ({told}) is "):
            replay((resigned(signed, **changes), body))

    lies("model-digest", model_digest="cc" * 32)
    lies("kv-dtype", kv_dtype="int8")
    lies("tokens-sha256", tokens_sha256="cc" * 32)
    lies("answer-sha256", answer_sha256="cc" * 32)
    # By chance the other answer has as many tokens.
    lies("tokens-sha256|tokens.answer", sampling=msgspec.structs.replace(sampling, seed=1))
    lies("sampling.seed", sampling=msgspec.structs.replace(sampling, seed=None))
    lies("sampling.temperature", sampling=msgspec.structs.replace(sampling, temperature=0.25))
    lies("sampling.top-k", sampling=msgspec.structs.replace(sampling, top_k=1))
    lies("tokens.prompt", tokens=msgspec.structs.replace(receipt.tokens, prompt=1))
    lies("tokens.answer", tokens=msgspec.structs.replace(receipt.tokens, answer=1))
    lies("request", path=RESPONSES)
    lies("adapter", adapter="cc" * 32)
    with pytest.raises(EvidenceRefused, match="request is one with the salted hash"):
        replay((signed, body + b" "))
    closed = msgspec.structs.replace(signed, opening=msgspec.structs.replace(signed.opening, answer=None))
    with pytest.raises(EvidenceRefused, match="opening is one without every salt"):
        replay((closed, body))


def test_a_server_with_other_weights_is_found_out(
    made: list[Answered], model: LLM, replay: Callable[..., None]
) -> None:
    """It says that it has the right ones, or says which it has."""
    assert model.guard is not None
    # Greedy ones: by chance, the flat logits of a random model give the same tokens for nearly any weights.
    claimed, asked = model.guard.model_digest, list(plain_bodies())[0:16:4]

    async def cheats(llm: LLM) -> tuple[list[Answered], list[Answered]]:
        async with AsyncLLM(llm) as cheating:
            return await answered(cheating, asked, claimed), await answered(cheating, asked[:1])

    other = str(other_weights())
    with serve(other) as (_, address), LLM(other, protection="verified", worker=address) as llm:
        lied, honest = asyncio.run(cheats(llm))
    for body, signed in lied:
        signed.check_signature()
        signed.check_request(body)
        with pytest.raises(EvidenceRefused, match=r"refused: tokens(-sha256|\.answer) is "):
            replay((signed, body))
    with pytest.raises(EvidenceRefused, match=r"refused: model-digest is .* that of the weights for the replay"):
        replay((honest[0][1], honest[0][0]))


def test_a_stream_that_asked_for_no_receipt_is_refused(made: list[Answered], replay: Callable[..., None]) -> None:
    _, signed = of_chance(made)
    fields = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": True}
    body = json.dumps(fields).encode()
    assert signed.opening.request is not None
    lie = resigned(signed, path=CHAT, request_sha256=salted_sha256(signed.opening.request, body))
    with pytest.raises(EvidenceRefused, match="one for a stream without a receipt"):
        replay((lie, body))


@pytest.mark.parametrize("body", [b"{}", b"[", b'{"model": "x"}', b'{"model": 1, "messages": []}'])
def test_what_is_no_request_is_refused(made: list[Answered], replay: Callable[..., None], body: bytes) -> None:
    _, signed = of_chance(made)
    assert signed.opening.request is not None
    lie = resigned(signed, request_sha256=salted_sha256(signed.opening.request, body))
    with pytest.raises(EvidenceRefused, match="refused: request is "):
        replay((lie, body))
