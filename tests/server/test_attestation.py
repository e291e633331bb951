"""The endpoint for evidence: a fresh quote for each nonce, so many a second, and clear lines for all else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from zmq.utils.z85 import decode

from tests.server.asgi import ask, error_of
from tests.server.serving import app_of, service_of
from tests.tee.fake_providers import fake_of
from tests.tee.statements import CONFIGURATION
from tsqp.api.config import GuardConfig, RunConfig, WorkerConfig
from tsqp.api.llm import LLM
from tsqp.api.plan import Plan
from tsqp.errors import ProviderFailed
from tsqp.server.attestation import BURST, KEPT_CONNECTIONS, PER_SECOND, Attester, configuration_of
from tsqp.server.attested_keys import AttestedKeys
from tsqp.server.errors import ApiError
from tsqp.tee.evidence import Quote, read_evidence
from tsqp.tee.providers import NoTee, Provider, report_data_of
from tsqp.wire.transport.keys import create_keys, load_public

KEYS = AttestedKeys()
DIGEST = "cc" * 32
NONCE = "0123456789abcdef" * 4


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """Counts the questions to a provider."""

    def __init__(self, provider: Provider) -> None:
        self.asked: list[bytes] = []
        self.name = provider.name
        self._provider = provider

    def kind(self) -> Any:
        return self._provider.kind()

    def quote(self, report_data: bytes) -> Quote:
        self.asked.append(report_data)
        return self._provider.quote(report_data)


def attester(provider: Provider | None = None, clock: Clock | None = None) -> Attester:
    return Attester(provider or NoTee(), KEYS, DIGEST, CONFIGURATION, clock or Clock())


def get(one: Attester | None, query: str = f"?nonce={NONCE}") -> httpx.Response:
    return ask(app_of(service_of(None, attester=one)), f"/v1/attestation{query}")


@pytest.mark.parametrize("kind", ["tdx", "sev-snp", "sgx"])
def test_a_quote_is_of_this_statement(kind: str) -> None:
    _, provider = fake_of(kind)
    answer = get(attester(provider))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found = read_evidence(answer.content)
    found.check_signature()
    assert (found.kind, found.nonce, found.model_digest) == (kind, NONCE, DIGEST)
    assert (found.spki_sha256, found.receipt_key) == (KEYS.spki_sha256, KEYS.public_receipt_key)
    assert found.configuration == CONFIGURATION
    quote = Quote(kind=found.kind, quote=found.quote, certificates=found.certificates)
    assert report_data_of(quote) == found.statement.report_data()
    assert bool(found.certificates) == (kind == "sev-snp")


@pytest.mark.parametrize(
    "query", ["", "?nonce=", "?nonce=00", f"?nonce={NONCE.upper()}", f"?nonce={NONCE}0", f"?nonce={NONCE}%0a", "?n=1"]
)
def test_what_is_no_nonce_is_refused(query: str) -> None:
    provider = Counting(NoTee())
    answer = get(attester(provider), query)
    assert answer.status_code == 400
    assert (error_of(answer)["param"], error_of(answer)["code"]) == ("nonce", "invalid_nonce")
    assert provider.asked == []


def test_a_server_without_evidence_says_so() -> None:
    answer = get(None)
    assert answer.status_code == 404
    assert "started without --evidence" in error_of(answer)["message"]


def test_a_provider_that_fails_is_one_line() -> None:
    fake, provider = fake_of("tdx")

    def broken(_operation: str, path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    fake.before = broken
    one = attester(provider)
    answer = get(one)
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "no_quote"
    assert answer.headers["retry-after"] == "1"
    with pytest.raises(ProviderFailed, match="is not allowed"):
        one.check()


async def questions(one: Attester, connection: object, count: int) -> int:
    """How many of so many fresh questions were answered."""
    asked = (one.answer(f"{number:064x}", connection) for number in range(count))
    found = [await one_by_one for one_by_one in map(_status_of, asked)]
    assert set(found) <= {200, 429}
    return found.count(200)


async def _status_of(answer: Awaitable[bytes]) -> int:
    try:
        await answer
    except ApiError as error:
        return error.status
    return 200


def test_the_same_question_on_a_connection_is_one_quote() -> None:
    async def whole() -> None:
        provider = Counting(NoTee())
        one = attester(provider)
        first = await one.answer(NONCE, "a")
        for _ in range(50):
            assert await one.answer(NONCE, "a") == first
        assert len(provider.asked) == 1
        await one.answer(NONCE, "b")
        await one.answer("ab" * 32, "a")
        await one.answer(NONCE, "a")  # the last question is kept, and not every one
        assert len(provider.asked) == 4

    asyncio.run(whole())


def test_there_are_so_many_quotes_a_second() -> None:
    async def whole() -> None:
        clock = Clock()
        one = attester(clock=clock)
        assert await questions(one, "a", 40) == BURST
        clock.now += 2.0
        assert await questions(one, "b", 40) == 2 * PER_SECOND
        clock.now += 1000.0
        assert await questions(one, "c", 40) == BURST
        with pytest.raises(ApiError) as raised:
            await one.answer("ab" * 32, "d")
        assert raised.value.headers["retry-after"] == "1"

    asyncio.run(whole())


def test_what_is_kept_is_bounded() -> None:
    async def whole() -> None:
        clock = Clock()
        one = attester(clock=clock)
        for connection in range(KEPT_CONNECTIONS + 10):
            clock.now += 1.0
            await one.answer(NONCE, connection)
        assert len(one._kept) == KEPT_CONNECTIONS

    asyncio.run(whole())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    directory.chmod(0o700)
    for name in ("own", "worker", "front"):
        create_keys(directory, name)
    return directory


@pytest.mark.parametrize(
    ("address", "worker_key", "dealer", "dealer_key", "told"),
    [
        (None, None, None, None, ((), ())),
        ("tcp://192.0.2.1:7000", "worker", None, None, ("worker", ())),
        ("roster+tcp://192.0.2.1:7100", None, None, None, ("roster", ())),
        ("roster:///srv/roster.json", None, "roster:///srv/dealers.json", None, ("roster", "roster")),
        (None, None, "roster+tcp://192.0.2.1:7100", "front", ((), "front")),
    ],
)
def test_evidence_says_whose_keys_are_known(
    keys: Path,
    address: str | None,
    worker_key: str | None,
    dealer: str | None,
    dealer_key: str | None,
    told: tuple[Any, Any],
) -> None:
    """What a roster names changes while the server runs, so no list of keys would be true."""

    def path(name: str | None) -> Path | None:
        return None if name is None else keys / f"{name}.key"

    def hexadecimal(name: Any) -> Any:
        return (decode(load_public(keys / f"{name}.key")).hex(),) if name in ("worker", "front") else name

    worker = WorkerConfig(address=address or (), key=keys / "own.key_secret", server_key=path(worker_key))
    guard = GuardConfig(pad_source=f"dealer={dealer}" if dealer else "tee", dealer_key=path(dealer_key))
    plan = Plan.of(RunConfig(worker=worker, guard=guard)) if address or dealer else Plan.of(RunConfig())
    found = configuration_of(cast(LLM, SimpleNamespace(plan=plan, guard=None, adapters={})))
    assert (found.worker_keys, found.dealer_keys) == tuple(map(hexadecimal, told))
