"""What a receipt costs a server: processor time of the thread that answers, for each answer.

    python -m benchmarks.receipts [--tokens 256] [--rounds 300]

``whole`` and ``logprobs`` are chat answers in one piece, the second with 20 likely tokens beside each; ``stream`` is
the same as a stream that asks for a receipt, of an event for each token; ``large`` has a request of 1 MiB. The same
answer with and without, in alternation: the least of all rounds, and the difference. ``verify`` is a client's check of
signature, request and answer. No model runs: a receipt is made of bytes and counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.server.answers import Answers, Asked
from tsqp.server.chat_types import Answer, Choice, ChoicePiece, Chunk, Completion, Logprobs, Piece
from tsqp.server.json_reply import json_reply
from tsqp.server.logprobs import TokenLogprob, TopLogprobs
from tsqp.server.receipts import Draft, Receipts, with_header, with_receipt
from tsqp.server.streams import Event, framed
from tsqp.server.usage import Usage
from tsqp.tee.answer_form import read_answer
from tsqp.tee.receipts import HEADER, read_receipt
from tsqp.tee.statement import Configuration, Statement
from tsqp.trusted.engine.sampling_params import SamplingParams

WORD = " river"
SMALL, LARGE = 2 << 10, 1 << 20  # bytes of a request
LIMIT_S = 1e-3


class _Ended:
    """Answers that are complete."""

    def __init__(self, tokens: int) -> None:
        self._ids = tuple(range(1000, 1000 + tokens))

    def token_ids(self) -> list[tuple[int, ...]]:
        return [self._ids]


def receipts() -> Receipts:
    """Of a server without a TEE."""
    key = Ed25519PrivateKey.generate()
    configuration = Configuration(
        software="tsqp",
        protection="masked",
        partition="linear",
        soundness_bits=62,
        worker_keys=(),
        dealer_keys=(),
        adapters={},
        oblivious=False,
        embedding="plain",
        locked_memory=False,
    )
    public = key.public_key().public_bytes_raw().hex()
    words = {"nonce": "00" * 32, "spki_sha256": "11" * 32, "receipt_key": public, "model_digest": "22" * 32}
    return Receipts(Statement(**words, configuration=configuration), key, "bfloat16", lambda: 0)


class Case:
    """One kind of answer, made with a receipt or without."""

    def __init__(self, tokens: int, request_bytes: int, *, logprobs: bool = False) -> None:
        self._receipts, self._tokens = receipts(), tokens
        self.body = b'{"messages": "' + b"x" * (request_bytes - 16) + b'"}'
        self._answers = cast(Answers, _Ended(tokens))
        told = None
        if logprobs:
            likely = [TokenLogprob(f"{WORD}{one}", -1.5, list(WORD.encode())) for one in range(20)]
            told = Logprobs([TopLogprobs(WORD, -0.5, list(WORD.encode()), likely) for _ in range(tokens)])
        choice = Choice(0, Answer(WORD * tokens), "stop", told)
        self._reply = Completion("chatcmpl-1", 1, "m", "tsqp", [choice], Usage.of(10, tokens))
        self._pieces = [ChoicePiece(0, Piece(content=WORD)) for _ in range(tokens)]
        self._pieces.append(ChoicePiece(0, Piece(), finish_reason="stop"))

    def draft(self) -> Draft:
        asked = [Asked([1] * 10, SamplingParams(seed=1, temperature=1.0))]
        return Draft(self._receipts, "/v1/chat/completions", self.body, asked, 1, 0)

    def whole(self, *, receipt: bool) -> tuple[bytes, bytes]:
        """The bytes of the answer and of its receipt."""
        reply = with_header(json_reply(self._reply), self.draft() if receipt else None, self._answers)
        return bytes(reply.body), reply.headers.get(HEADER, "").encode()

    def stream(self, *, receipt: bool) -> None:
        """All events, as bytes."""
        asyncio.run(self._streamed(self.draft() if receipt else None))

    async def _streamed(self, draft: Draft | None) -> None:
        events = with_receipt(self._events(), draft, self._answers)
        async for _ in framed(events, None, b""):
            pass

    async def _events(self) -> AsyncGenerator[Event, None]:
        for piece in self._pieces:
            yield Event(Chunk("chatcmpl-1", 1, "m", "tsqp", [piece]))


def least_s(makers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of this thread's processor time: the least of all rounds, in alternation."""
    best = dict.fromkeys(makers, float("inf"))
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.thread_time()
            make()
            best[name] = min(best[name], time.thread_time() - start)
    return best


def measured(make: Callable[..., Any], rounds: int) -> dict[str, float]:
    """With, without, and what is between them."""
    found = least_s({"with_s": lambda: make(receipt=True), "without_s": lambda: make(receipt=False)}, rounds)
    return {**found, "receipt_s": found["with_s"] - found["without_s"]}


def main() -> None:
    """Measure, print, write. Ends with 1 where a receipt costs more than a millisecond."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS / "receipts.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    small, large = Case(options.tokens, SMALL), Case(options.tokens, LARGE)
    cases: dict[str, dict[str, float]] = {
        "whole": measured(small.whole, options.rounds),
        "logprobs": measured(Case(options.tokens, SMALL, logprobs=True).whole, options.rounds),
        "stream": measured(small.stream, options.rounds),
        "large": measured(large.whole, options.rounds),
    }
    answer, header = small.whole(receipt=True)

    def verify() -> None:
        signed = read_receipt(header)
        signed.check_signature()
        signed.check_request(small.body)
        signed.check_answer(read_answer(answer, signed.receipt.path))

    cases["verify"] = least_s({"verify_s": verify}, options.rounds)
    for name, figures in cases.items():
        print(f"{name:10}", {figure: f"{seconds * 1e3:.3f} ms" for figure, seconds in figures.items()})
    print(f"header: {len(header)} bytes")
    result = {
        "benchmark": "receipts",
        "tokens": options.tokens,
        "rounds": options.rounds,
        "header_bytes": len(header),
        "cases": cases,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    if any(case.get("receipt_s", 0.0) > LIMIT_S for case in cases.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
