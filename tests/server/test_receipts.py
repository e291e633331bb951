"""Each answer of a server with evidence has a receipt, of the bytes that came and went; others have none."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.server.chat_model import IM_END
from tests.server.serving import NAME, Exchange, Script, app_of, client_of, events_of, service_of
from tests.tee.some_receipts import check_tokens
from tests.tee.statements import RECEIPT_KEY, statement
from tsqp.errors import WorkerLost
from tsqp.server.receipts import Checked, Receipts, drawn_seed
from tsqp.server.service import Service
from tsqp.tee.answer_form import read_answer
from tsqp.tee.receipts import HEADER, MAX_HEADER_BYTES, SignedReceipt, read_receipt

CANARY = "xylophone7f3a"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": f"{CANARY}?"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLED = f'Well.<tool_call>\n{{"name": "look", "arguments": {{"at": "{CANARY}"}}}}\n</tool_call>'
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": MESSAGES}),
    "chat, n": (CHAT, {"messages": MESSAGES, "n": 3, "seed": 5}),
    "chat, logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20}),
    "chat, a stop": (CHAT, {"messages": MESSAGES, "stop": ["phone7"]}),
    "chat, tools": (CHAT, {"messages": MESSAGES, "tools": [TOOL]}),
    "chat, cut": (CHAT, {"messages": MESSAGES, "max_tokens": 5}),
    "completions": (COMPLETIONS, {"prompt": CANARY}),
    "completions, several": (COMPLETIONS, {"prompt": [CANARY, "ab"], "n": 2, "echo": True, "logprobs": 1}),
    "completions, a prompt alone": (COMPLETIONS, {"prompt": CANARY, "echo": True, "max_tokens": 0}),
    "responses": (RESPONSES, {"input": CANARY, "metadata": {"a": CANARY}}),
    "responses, tools": (
        RESPONSES,
        {"input": CANARY, "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}]},
    ),
    "responses, cut": (RESPONSES, {"input": CANARY, "max_output_tokens": 4}),
}
every_body = pytest.mark.parametrize("name", BODIES)


def receipts(**changes: Any) -> Receipts:
    counts = iter(range(100, 10_000, 34))
    return Receipts(statement(), RECEIPT_KEY, "bfloat16", lambda: next(counts), **changes)


def service(*answers: Any, **changes: Any) -> Service:
    return service_of(Script(*answers), receipts=receipts(), **changes)


def body_of(name: str, **more: Any) -> tuple[str, bytes]:
    path, fields = BODIES[name]
    # Sorted as no client sends it, with spaces: the bytes count, and not what they say.
    return path, json.dumps({"model": NAME, **fields, **more}, sort_keys=True, indent=1).encode()


def post(one: Service, path: str, body: bytes) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with client_of(one) as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})

    return asyncio.run(asked())


def text_of(name: str) -> str:
    return CALLED if "tools" in name else f"Yes, {CANARY}!"


def streamed(name: str, **options: Any) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_receipt": True, **options}}


def receipt_in(answer: httpx.Response) -> SignedReceipt:
    return read_receipt(json.dumps(events_of(answer.text)[-1]["receipt"]).encode())


@every_body
def test_a_whole_answer_has_one_in_its_header(name: str) -> None:
    path, body = body_of(name)
    answer = post(service(text_of(name)), path, body)
    assert answer.status_code == 200, answer.text
    header = answer.headers[HEADER]
    signed = read_receipt(header.encode())
    check(signed, path, body, answer.content)
    assert len(header) <= MAX_HEADER_BYTES
    usage = answer.json()["usage"]
    if "alone" not in name:
        counts = (usage.get("prompt_tokens", usage.get("input_tokens")), signed.receipt.tokens.answer)
        assert counts == (signed.receipt.tokens.prompt, usage.get("completion_tokens", usage.get("output_tokens")))


@every_body
@pytest.mark.parametrize("options", [{}, {"include_usage": True, "include_obfuscation": False}], ids=["", "usage"])
def test_a_stream_has_one_at_its_end_where_it_asks(name: str, options: dict[str, Any]) -> None:
    path, body = body_of(name, **streamed(name, **options))
    answer = post(service(text_of(name)), path, body)
    assert answer.status_code == 200, answer.text
    assert HEADER not in answer.headers
    signed = receipt_in(answer)
    check(signed, path, body, answer.content)
    found = events_of(answer.text)
    assert sum("receipt" in event for event in found) == 1
    if path != RESPONSES:
        assert answer.text.rstrip().endswith("data: [DONE]")
        assert found[-1]["choices"] == []
        assert [event["usage"] is not None for event in found if "usage" in event][-2:] in ([], [True, False])


def check(signed: SignedReceipt, path: str, body: bytes, answer: bytes) -> None:
    """It is of these bytes, and no text is in it."""
    signed.check_signature()
    signed.check_request(body)
    signed.check_answer(read_answer(answer, signed.receipt.path))
    receipt = signed.receipt
    assert (receipt.path, receipt.identity) == (path, statement().identity().hex())
    assert receipt.id in answer.decode()
    assert (receipt.checks.soundness_bits, receipt.checks.products) == (62, 34)
    told = receipt.message().decode()
    for word in (CANARY, "Yes", "phone", "look"):
        assert word not in told


def test_the_same_stream_without_its_option_has_none() -> None:
    for name in BODIES:
        path, body = body_of(name, stream=True)
        answer = post(service(text_of(name)), path, body)
        assert answer.status_code == 200
        assert "receipt" not in answer.text + str(answer.headers)


@every_body
def test_without_evidence_there_is_none_and_none_can_be_asked_for(name: str) -> None:
    path, body = body_of(name)
    script = Script(text_of(name))
    answer = post(service_of(script), path, body)
    assert HEADER not in answer.headers
    assert {one.params.seed for one in script.opened} == {None} or "seed" in BODIES[name][1]
    refused = post(service_of(script), path, body_of(name, **streamed(name))[1])
    assert refused.status_code == 400
    assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == (
        "stream_options",
        "unsupported_parameter",
    )


@pytest.mark.parametrize("name", ["chat", "completions", "responses"])
def test_an_answer_that_fails_has_none(name: str) -> None:
    broken = [*b"Yes", WorkerLost("is lost")]
    path, body = body_of(name)
    answer = post(service(broken), path, body)
    assert answer.status_code == 503
    assert HEADER not in answer.headers
    path, body = body_of(name, **streamed(name))
    text = post(service(broken), path, body).text
    assert events_of(text)[-1]["error"] is not None
    assert "receipt" not in text


def test_an_answer_whose_client_leaves_has_none() -> None:
    async def left() -> list[str]:
        goes_on = asyncio.Event()
        signed: list[str] = []

        def opening() -> Any:
            signed.append("signed")
            raise AssertionError

        script = Script([*b"Yes", goes_on])
        one = service_of(script, receipts=receipts(draw_opening=opening))
        fields = {"model": NAME, "messages": MESSAGES, **streamed("chat")}
        exchange = Exchange(app_of(one), CHAT, fields)
        assert await exchange.status() == 200
        await exchange.event()
        exchange.leave()
        await exchange.done
        assert script.ended
        return signed

    assert asyncio.run(left()) == []


def test_sampling_is_what_was_used() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1}
    more = {"frequency_penalty": 0.3, "presence_penalty": -0.3, "ignore_eos": True, "max_tokens": 9, "seed": -(2**63)}
    path, body = body_of("chat", **given, **more)
    script = Script("Yes")
    answer = post(service_of(script, receipts=receipts()), path, body)
    sampling = read_receipt(answer.headers[HEADER].encode()).receipt.sampling
    (asked,) = script.opened
    for name, value in {**given, **more}.items():
        assert getattr(sampling, name) == getattr(asked.params, name) == value, name


def test_a_seed_is_drawn_where_tokens_are_chosen_by_chance() -> None:
    script = Script("Yes")
    seeds = iter((11, 12, 13))
    one = service_of(script, receipts=receipts(draw_seed=lambda: next(seeds)))
    for temperature, expected in ((1, 11), (0, None), (0.5, 12)):
        answer = post(one, CHAT, body_of("chat", temperature=temperature)[1])
        assert read_receipt(answer.headers[HEADER].encode()).receipt.sampling.seed == expected
        assert script.opened[-1].params.seed == expected
    answer = post(one, CHAT, body_of("chat", n=2)[1])
    assert read_receipt(answer.headers[HEADER].encode()).receipt.sampling.seed == 13
    first, second = (opened.params.seed for opened in script.opened[-2:])
    assert first == 13 != second


def test_seeds_that_are_drawn_differ_and_any_json_holds_them() -> None:
    drawn = {drawn_seed() for _ in range(50)}
    assert len(drawn) == 50
    assert all(0 <= seed < 1 << 53 for seed in drawn)


def test_salts_differ_from_answer_to_answer() -> None:
    one = service("Yes")
    path, body = body_of("chat", seed=3)
    first, second = (read_receipt(post(one, path, body).headers[HEADER].encode()) for _ in range(2))
    assert first.opening != second.opening
    assert first.receipt.request_sha256 != second.receipt.request_sha256
    assert first.receipt.tokens_sha256 != second.receipt.tokens_sha256


def test_tokens_are_those_of_every_choice() -> None:
    path, body = body_of("completions, several")
    script = Script("Yes", [65, 66, IM_END])
    signed = read_receipt(post(service_of(script, receipts=receipts()), path, body).headers[HEADER].encode())
    yes = script.tokenizer.encode("Yes", special_tokens=False)
    check_tokens(signed, [yes, [65, 66], yes, [65, 66]])
    prompts = [one.prompt for one in script.opened[::2]]
    assert signed.receipt.tokens.prompt == sum(map(len, prompts)) > len(CANARY)
    assert signed.receipt.tokens.answer == 2 * len(yes) + 4


def test_openai_s_client_takes_them() -> None:
    """It is strict about what it reads."""

    async def asked() -> None:
        inside: Any = client_of(service(f"Yes, {CANARY}!"))
        async with AsyncOpenAI(
            base_url="http://server/v1",
            api_key="none",
            max_retries=0,
            http_client=inside,
            _strict_response_validation=True,
        ) as client:
            options: Any = {"include_receipt": True, "include_usage": True}
            messages: Any = MESSAGES
            raw = await client.chat.completions.with_raw_response.create(model=NAME, messages=messages)
            assert raw.parse().choices[0].message.content == f"Yes, {CANARY}!"
            read_receipt(raw.headers[HEADER].encode()).check_signature()
            stream: Any = await client.chat.completions.create(
                model=NAME, messages=messages, stream=True, stream_options=options
            )
            chunks = [chunk async for chunk in stream]
            read_receipt(json.dumps(chunks[-1].receipt).encode()).check_signature()
            assert chunks[-2].usage is not None
            del options["include_usage"]
            events: Any = await client.responses.create(
                model=NAME, input=CANARY, stream=True, extra_body={"stream_options": options}
            )
            last = [event async for event in events][-1]
            read_receipt(json.dumps(last.receipt).encode()).check_signature()

    asyncio.run(asked())


def test_products_are_counted_across_workers() -> None:
    class Guard:
        def __init__(self, checked: int) -> None:
            self._checked = checked

        def counted(self) -> dict[str, int]:
            return {"products_checked": self._checked}

    class Model:
        guard: Guard | None = Guard(7)

    model: Any = Model()
    count = Checked(model)
    assert count() == 7
    model.guard = None
    assert count() == 7  # no worker
    model.guard = Guard(9)
    assert count() == 9
