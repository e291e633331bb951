"""Evidence for whoever asks: ``GET /v1/attestation?nonce=``. docs/attestation.md, sections 1 and 2.

Covers: a quote is made for each nonce, as often as the provider bears (tests/server/test_attestation.py). Needs no API
key: who asks has not decided yet whether to show one, and there is no secret in it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from tsqp import __version__
from tsqp.api.config import is_roster
from tsqp.errors import OptionError, ProviderFailed
from tsqp.server.attested_keys import AttestedKeys
from tsqp.server.discreet import about
from tsqp.server.errors import ApiError
from tsqp.tee.evidence import Quote, make_evidence
from tsqp.tee.memory import memory_is_locked
from tsqp.tee.providers import Provider
from tsqp.tee.statement import NONCE_BYTES, Configuration, Keys, Statement

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.server.service import Service

PATH = "/v1/attestation"
NONCE = re.compile(f"[0-9a-f]{{{2 * NONCE_BYTES}}}")
PER_SECOND, BURST = 4.0, 16.0  # quotes, of all who ask
KEPT_CONNECTIONS = 256  # whose last answer is kept

log = logging.getLogger("tsqp.server")


class Attester:
    """Answers questions about one server. ``provider``: what signs."""

    def __init__(
        self,
        provider: Provider,
        keys: AttestedKeys,
        model_digest: str,
        configuration: Configuration,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys = keys
        self._provider = provider
        self._model_digest = model_digest
        self._configuration = configuration
        self._clock = clock
        self._allowance, self._at = BURST, clock()
        self._kept: OrderedDict[object, tuple[str, bytes]] = OrderedDict()

    def check(self) -> None:
        """Make one quote, so that a provider that does not work is known at the start. Raises ProviderFailed."""
        self._quote(self.statement(bytes(NONCE_BYTES).hex()))

    def statement(self, nonce: str) -> Statement:
        """What a quote for this nonce binds."""
        return Statement(
            nonce=nonce,
            spki_sha256=self.keys.spki_sha256,
            receipt_key=self.keys.public_receipt_key,
            model_digest=self._model_digest,
            configuration=self._configuration,
        )

    async def answer(self, nonce: str, connection: object) -> bytes:
        """Evidence as JSON. The same question on the same connection has the same answer. Raises ApiError."""
        kept = self._kept.get(connection)
        if kept is not None and kept[0] == nonce:
            return kept[1]
        self._admit()
        given = self.statement(nonce)
        try:
            quote = await asyncio.to_thread(self._quote, given)
        except ProviderFailed as error:
            log.error("no quote: %s", error, extra=about("no_quote"))
            raise ApiError(503, str(error), kind="server_error", code="no_quote", retry_after_s=1) from None
        made_at = int(time.time())
        data = make_evidence(given, quote, self.keys.receipt_key, self.keys.certificate, made_at).to_json()
        self._kept[connection] = nonce, data
        self._kept.move_to_end(connection)
        while len(self._kept) > KEPT_CONNECTIONS:
            self._kept.popitem(last=False)
        return data

    def _quote(self, given: Statement) -> Quote:
        return self._provider.quote(given.report_data())

    def _admit(self) -> None:
        """A quote takes the host's resources: there are so many a second for all who ask."""
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._at) * PER_SECOND)
        self._at = now
        if self._allowance < 1:
            wait_s = (1 - self._allowance) / PER_SECOND
            raise ApiError(429, "too many questions for evidence: ask again", code="rate_limited", retry_after_s=wait_s)
        self._allowance -= 1


async def show(service: Service, request: Request) -> Response:
    """The endpoint."""
    attester = service.attester
    if attester is None:
        raise ApiError(404, "this server gives no evidence: it was started without --evidence", code="no_evidence")
    nonce = request.query_params.get("nonce", "")
    if not NONCE.fullmatch(nonce):
        wanted = f"nonce must be {2 * NONCE_BYTES} hex digits in lower case, fresh for each question"
        raise ApiError(400, wanted, param="nonce", code="invalid_nonce")
    data = await attester.answer(nonce, request.scope.get("client"))
    return Response(data, media_type="application/json", headers={"cache-control": "no-store"})


def attester_of(llm: LLM, provider: Provider, keys: AttestedKeys) -> Attester:
    """Of a model that is loaded. Raises OptionError for a mode whose weights have no digest."""
    if llm.guard is None or llm.plan.partition is None:
        raise OptionError(
            f"evidence binds a digest of all weights, which protection {llm.plan.protection.name} does not compute: "
            "use masked or verified"
        )
    return Attester(provider, keys, llm.guard.model_digest, configuration_of(llm))


def configuration_of(llm: LLM) -> Configuration:
    """How a model runs, for those who verify it."""
    run, report = llm.plan.run, {} if llm.guard is None else llm.guard.report()
    return Configuration(
        software=f"tsqp {__version__}",
        protection=llm.plan.protection.name,
        partition="none" if llm.plan.partition is None else llm.plan.partition.name,
        soundness_bits=math.floor(float(str(report.get("soundness_bits", 0)))),
        worker_keys=_keys(run.worker.addresses, run.worker.server_key),
        dealer_keys=_keys((run.guard.dealer or "",), run.guard.dealer_key),
        adapters=dict(llm.adapters),
        oblivious=llm.plan.oblivious,
        embedding=llm.plan.oblivious_embedding if llm.plan.oblivious else "plain",
        locked_memory=memory_is_locked(),
    )


def _keys(addresses: Sequence[str], key: Path | None) -> Keys:
    """Of those who are asked for products. A key beside a roster is that of the front, which vouches for theirs."""
    if key is not None:
        return (_public_key(key),)
    return "roster" if any(map(is_roster, addresses)) else ()


def _public_key(path: Path) -> str:
    """32 bytes, hex."""
    from zmq.utils.z85 import decode

    from tsqp.wire.transport.keys import load_public

    return decode(load_public(path)).hex()
