"""What a client can tell from the time to a first token: about its own earlier requests, and about nobody else's.

A prompt that is found in a kept cache is answered sooner: by that CVE-2025-46570 told prompts of other tenants, with
an AUC of 0.99. Two questions are asked of each request here.

**How much was computed**: the tokens of its prompt that were computed and those that were found, by the server's own
counters. No load of the machine changes these integers, so they are compared exactly. A request whose prompt is all
computed can only be told by something that is not counted.

**How long it took**, for that rest, as its client measures it. Requests come in pairs, one after the other, in an order
that a coin decides: a prompt that somebody has sent before, and one of the same length that nobody has. If that made no
difference, the coin alone would say which of the two is the faster one, whatever else the machine does and however its
load drifts. So the number of times is binomial, with one half, exactly. A test of ranks over all samples, such as Mann
and Whitney's, would need samples that load leaves alike. What has a chance of less than one in a million is called a
leak: so seldom is a sound server accused. That the same count does tell a client's own second request shows that a leak
of this size would be seen.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.commands import LIMIT_S, Home
from tests.families import VOCAB
from tests.server.chat_model import CONTEXT, chat_model
from tests.server.process import serving
from tests.server.reading import metrics
from tsqp.server.api_keys import add_line, line_for, new_key
from tsqp.server.guards.affinity import HEADER as AFFINITY

PAIRS = 40
PROMPT = CONTEXT - 100  # tokens
CHANCE = 1e-6


class Cost(NamedTuple):
    """Of one request: seconds as the client sees them, and the server's counts of prompt tokens."""

    seconds: float
    computed: float
    found: float


@dataclass
class Client:
    """One key's. ``page``: the address of the server's metrics."""

    http: httpx.Client
    page: str

    def ask(self, prompt: list[int], **more: Any) -> Cost:
        """One token, and what it took."""
        before = metrics(self.page)
        body = {"model": "chat", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **more}
        start = time.perf_counter()
        answer = self.http.post("/v1/completions", json=body)
        seconds = time.perf_counter() - start
        assert answer.status_code == 200, answer.text
        after = metrics(self.page)
        names = ("vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total")
        return Cost(seconds, *(after[name] - before[name] for name in names))

    def pair(self, known: list[int], fresh: list[int]) -> tuple[Cost, Cost]:
        """What both cost, asked for in an order by chance."""
        if random.random() < 0.5:
            return self.ask(known), self.ask(fresh)
        last = self.ask(fresh)
        return self.ask(known), last


def fresh_prompt() -> list[int]:
    return [random.randrange(VOCAB) for _ in range(PROMPT)]


def chance_of(faster: int, pairs: int) -> float:
    """How likely a fair coin is to be as one-sided as this, to either side."""
    most = max(faster, pairs - faster)
    return min(1.0, 2 * sum(math.comb(pairs, count) for count in range(most, pairs + 1)) / 2**pairs)


def test_the_chance_of_a_coin() -> None:
    assert chance_of(30, 60) == 1
    assert chance_of(60, 60) == chance_of(0, 60) == 2**-59
    assert chance_of(8, 10) == pytest.approx(2 * (45 + 10 + 1) / 1024)


@pytest.fixture
def tenants(home: Home, tmp_path: Path) -> Iterator[list[Client]]:
    """Clients of two keys of one server."""
    keys = {name: new_key() for name in ("alice", "bob")}
    for name, key in keys.items():
        add_line(tmp_path / "keys", line_for(name, key))
    options = ("--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0)
    more = ("--protection", "verified", "--api-keys", tmp_path / "keys")
    with serving(home, *options, *more) as server:
        assert server.metrics_address is not None
        clients = [
            httpx.Client(base_url=server.address, headers={"authorization": f"Bearer {key}"}, timeout=LIMIT_S)
            for key in keys.values()
        ]
        with clients[0], clients[1]:
            yield [Client(client, server.metrics_address) for client in clients]


@pytest.mark.slow
def test_a_hit_shows_to_the_tenant_that_it_belongs_to_alone(tenants: list[Client]) -> None:
    alice, bob = tenants
    of_others = of_own = 0
    for _ in range(PAIRS):
        prompt = fresh_prompt()
        assert alice.ask(prompt)[1:] == (PROMPT, 0)
        known, fresh = bob.pair(prompt, fresh_prompt())
        assert known[1:] == fresh[1:] == (PROMPT, 0)
        of_others += known.seconds < fresh.seconds
        known, fresh = bob.pair(prompt, fresh_prompt())
        assert known[1:] == (1, PROMPT - 1)
        assert fresh[1:] == (PROMPT, 0)
        of_own += known.seconds < fresh.seconds
    assert chance_of(of_others, PAIRS) > CHANCE, f"{of_others} of {PAIRS} were faster"
    assert of_own > PAIRS / 2
    assert chance_of(of_own, PAIRS) < CHANCE, f"{of_own} of {PAIRS} were faster"


@pytest.mark.slow
def test_a_salt_narrows_what_is_found_and_widens_it_for_nobody(tenants: list[Client]) -> None:
    alice, bob = tenants
    prompt = fresh_prompt()
    nothing, all_of_it = (PROMPT, 0), (1, PROMPT - 1)
    assert alice.ask(prompt, cache_salt="x")[1:] == nothing
    assert alice.ask(prompt, cache_salt="x")[1:] == all_of_it
    for salt in ("x", "", "alice", "alicex", "alice:x", "alice\0x"):
        assert bob.ask(prompt, cache_salt=salt)[1:] == nothing, salt
    assert alice.ask(prompt)[1:] == nothing
    assert alice.ask(prompt, cache_salt="")[1:] == all_of_it
    assert alice.ask(prompt, cache_salt="y")[1:] == nothing
    for client in tenants:  # what a balancer goes by is none
        client.http.headers[AFFINITY] = "one"
    assert alice.ask(prompt, cache_salt="y")[1:] == all_of_it
    assert bob.ask(prompt, cache_salt="y")[1:] == nothing
