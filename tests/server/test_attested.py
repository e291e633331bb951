"""From a TEE to a client: a server over a fake TEE, the proxy before it, and OpenAI's client before that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI

from tests.server.chat_model import chat_model
from tests.server.running import Server
from tests.tee.fake_providers import Fake, fake_of
from tests.tee.forge.amd import amd_forge
from tests.tee.forge.certificates import DAY
from tests.tee.forge.intel import ENCLAVE_DEFAULTS, TD_DEFAULTS, intel_forge
from tests.tee.policies import policy
from tsqp import LLM
from tsqp.client.address import parse_server
from tsqp.client.pinning import PinnedServer
from tsqp.client.proxy import Proxy
from tsqp.errors import OptionError, ProviderFailed
from tsqp.server.listening import Listening
from tsqp.server.ready import Ready
from tsqp.tee.bounded_provider import BoundedProvider
from tsqp.tee.collateral import Directory
from tsqp.tee.receipts import HEADER, read_receipt
from tsqp.tee.verification import Roots, spki_sha256

KINDS = ["tdx", "sev-snp", "sgx"]
ROOTS = Roots(intel=intel_forge().root_der, amd={"Milan": spki_sha256(amd_forge().ark.der).hex()})
MESSAGES: Any = [{"role": "user", "content": "Hello?"}]
FORGED = {"tdx": ("mrtd", TD_DEFAULTS["mr_td"]), "sgx": ("mrenclave", ENCLAVE_DEFAULTS["mr_enclave"])}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(chat_model()), protection="verified") as model:
        yield model


@pytest.fixture
def server(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda _: None)
    monkeypatch.setattr(llm, "close", lambda: None)  # for the next test
    monkeypatch.setattr("tsqp.api.async_llm.AsyncLLM.close", _left_open)
    gate = threading.Event()
    gate.set()
    return Server(llm, gate, [])


async def _left_open(_model: object, _drain_s: float) -> None:
    pass


@pytest.fixture
def collateral(tmp_path: Path) -> Directory:
    now = int(time.time())
    for tee in ("tdx", "sgx"):
        valid = (now - DAY, now + 20 * DAY)
        (tmp_path / f"{tee}.json").write_text(intel_forge().collateral(tee, valid=valid))
    return Directory(tmp_path)


def policy_for(llm: LLM, kind: str, **changes: Any) -> Any:
    assert llm.guard is not None
    served = {"model-digests": [llm.guard.model_digest], "protections": ["verified"], **changes}
    if kind == "sev-snp":
        return policy([kind], server=served, sev_snp={"measurement": ["90" * 48]})
    field, value = FORGED[kind]
    assert isinstance(value, bytes)
    return policy([kind], server=served, **{kind: {field: [value.hex()]}})


def through_a_proxy(
    server: Server, fake: tuple[Fake, Any], wanted: Any, given: Directory, case: Callable[[Any, Any], Awaitable[None]]
) -> None:
    """Run ``case`` with OpenAI's client and the pinned server, before a server with evidence."""

    def client(ready: Ready) -> None:
        async def whole() -> None:
            pinned = PinnedServer(parse_server(ready.address), wanted, given, max_age_s=60, roots=ROOTS)
            listening = await Proxy(pinned).listen(0)
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
            try:
                async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai:
                    await case(openai, pinned)
            finally:
                listening.close()
                pinned.close()

        asyncio.run(whole())

    server.run(client, listening=Listening(port=0), evidence="configfs-tsm")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Fake, Any]:
    fake, provider = fake_of(request.param)
    monkeypatch.setattr("tsqp.server.run.provider_of", lambda _name, _entry: BoundedProvider(provider, 2.0))
    return fake, provider


@pytest.mark.parametrize("faked", KINDS, indirect=True, ids=KINDS)
def test_a_chat_through_the_proxy(
    faked: tuple[Fake, Any], server: Server, collateral: Directory, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["faked"]

    async def case(openai: AsyncOpenAI, pinned: PinnedServer) -> None:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        raw = await openai.chat.completions.with_raw_response.create(**asked)
        whole, signed = raw.parse(), read_receipt(raw.headers[HEADER].encode())
        stream = await openai.chat.completions.create(**asked, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content
        (one,) = pinned.verified.values()
        assert (one.evidence.kind, one.evidence.configuration.protection) == (kind, "verified")
        assert one.evidence.configuration.soundness_bits == 62
        signed.check_signature()
        signed.check_attested(one.evidence)
        assert signed.receipt.checks.products > 0

    through_a_proxy(server, faked, policy_for(server.llm, kind), collateral, case)


@pytest.mark.parametrize("faked", ["tdx"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protections": ["masked"]}, "server.protection is verified"),
        ({"model-digests": ["00" * 32]}, "server.model-digest is "),
        ({"min-soundness-bits": 63}, "server.soundness-bits is 62, and not at least 63"),
    ],
)
def test_a_server_that_is_not_named_gets_no_prompt(
    faked: tuple[Fake, Any], server: Server, collateral: Directory, changes: dict[str, Any], told: str
) -> None:
    async def case(openai: AsyncOpenAI, pinned: PinnedServer) -> None:
        with pytest.raises(APIStatusError) as raised:
            await openai.chat.completions.create(model="tiny", messages=MESSAGES)
        assert raised.value.status_code == 502
        assert told in raised.value.message
        assert pinned.verified == {}

    added = server.llm.engine.counts().added
    through_a_proxy(server, faked, policy_for(server.llm, "tdx", **changes), collateral, case)
    assert server.llm.engine.counts().added == added


@pytest.mark.parametrize("faked", ["tdx"], indirect=True)
def test_a_provider_that_hangs_sends_nothing(faked: tuple[Fake, Any], server: Server, collateral: Directory) -> None:
    fake, _ = faked
    goes_on = threading.Event()

    async def case(openai: AsyncOpenAI, pinned: PinnedServer) -> None:
        fake.before = lambda _operation, _path: (goes_on.wait(), None)[1]
        with pytest.raises(APIStatusError, match=r"status 503 .*no answer within 2 s"):
            await openai.chat.completions.create(model="tiny", messages=MESSAGES)
        goes_on.set()

    through_a_proxy(server, faked, policy_for(server.llm, "tdx"), collateral, case)


@pytest.mark.parametrize("faked", ["tdx"], indirect=True)
def test_a_provider_that_fails_ends_the_start(faked: tuple[Fake, Any], server: Server) -> None:
    fake, _ = faked

    def missing(_operation: str, path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    fake.before = missing
    with pytest.raises(ProviderFailed, match="is this machine such a guest"):
        server.run(lambda _ready: None, listening=Listening(port=0), evidence="configfs-tsm")


def test_a_mode_without_a_digest_gives_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda _: None)
    with LLM(str(chat_model()), protection="local") as model:
        server = Server(model, threading.Event(), [])
        with pytest.raises(OptionError, match="protection local does not compute: use masked or verified"):
            server.run(lambda _ready: None, listening=Listening(port=0), evidence="none")


@pytest.mark.parametrize(
    ("listening", "told"),
    [
        (Listening(tls_cert=Path("a"), tls_key=Path("b")), "goes without server.tls_cert"),
        (Listening(unix_socket=Path("/x")), "goes without server.unix_socket: it is bound to TLS"),
    ],
)
def test_evidence_is_of_a_key_of_its_own(listening: Listening, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        listening.check(has_keys=True, own_tls=True)
    Listening(host="0.0.0.0").check(has_keys=True, own_tls=True)
