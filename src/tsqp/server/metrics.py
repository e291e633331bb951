"""Metrics for Prometheus: the names that vLLM has where there is one, so that its dashboards work, and ``tsqp:`` ones.

All that the engine counts is read at once, when metrics are asked for: added = waiting + running + ended, at every
moment. Times of answers are fed by endpoints, through ``Meters``.

No label depends on what a client sends: a label is kept for ever, so names that clients choose would fill the memory,
and whoever reads metrics may not be who may read them. Tenants are not labels either: an operator chooses their names,
but their figures side by side would tell one reader about all customers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tsqp.server.meters import Reason

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM

FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ANSWER_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class PrometheusMeters:
    """What endpoints tell, as histograms; and what the engine counts, see ``EngineCollector``."""

    def __init__(self, model: AsyncLLM, name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(model, name))

        def histogram(title: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(title, text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(name)

        self._endpoints = Counter(
            "tsqp:answers_begun", "Answers begun, by endpoint.", ["model_name", "endpoint"], registry=self.registry
        )
        self._answers = Counter(
            "tsqp:http_answers", "Answers begun, by status.", ["model_name", "status"], registry=self.registry
        )
        self._name = name
        self._first = histogram("vllm:time_to_first_token_seconds", "Time to the first token.", FIRST_TOKEN_S)
        self._token = histogram("vllm:inter_token_latency_seconds", "Time from one token to the next.", TOKEN_S)
        self._answer = histogram("vllm:e2e_request_latency_seconds", "Time of a whole answer.", ANSWER_S)
        self._prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer_tokens = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)

    def answered(self, status: int) -> None:
        """A request has an answer, whoever gives it. Statuses are our own and few."""
        self._answers.labels(self._name, str(status)).inc()

    def began(self, endpoint: str) -> None:
        """An answer is in the queue; ``endpoint`` is a constant of the route."""
        self._endpoints.labels(self._name, endpoint).inc()

    def first_token(self, seconds: float) -> None:
        """From ``began`` to the first token."""
        self._first.observe(seconds)

    def token(self, seconds: float) -> None:
        """From one token to the next."""
        self._token.observe(seconds)

    def ended(self, reason: Reason, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """An answer has ended. Reasons are counted by the engine."""
        self._answer.observe(seconds)
        self._prompt_tokens.observe(prompt_tokens)
        self._answer_tokens.observe(completion_tokens)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Engine, pads and worker, as they are when somebody asks."""

    def __init__(self, model: AsyncLLM, name: str) -> None:
        self._model = model
        self._label = {"model_name": name}

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the registry need not ask the engine when it is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield from self._of_engine()
        yield from self._of_worker()
        yield from self._of_pads()

    def _of_engine(self) -> Iterator[Metric]:
        counts = self._model.counts()
        used = counts.kv_bytes / counts.kv_limit if counts.kv_limit else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests that have a cache.", counts.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", counts.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the memory for keys and values in use, 0 to 1.", used)
        yield self._counter(
            "vllm:num_preemptions", "Requests that lost their cache to an older one.", counts.preemptions
        )
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", counts.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", counts.new_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in caches.", counts.found_tokens)
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=[*self._label, "finished_reason"]
        )
        for reason, count in counts.ended.items():
            ended.add_metric([*self._label.values(), reason], count)
        yield ended
        yield self._counter("tsqp:requests_added", "Requests that came into the queue.", counts.added)
        yield self._counter("tsqp:requests_refused", "Requests that the engine did not take.", counts.refused)
        yield self._gauge("tsqp:kv_bytes", "Bytes of keys and values of running requests.", counts.kv_bytes)
        yield self._gauge("tsqp:kept_kv_bytes", "Bytes of keys and values kept of ended requests.", counts.kept_bytes)

    def _of_worker(self) -> Iterator[Metric]:
        state = self._model.worker_state
        if state is None:
            return
        silent_s = self._model.llm.silent_s()
        yield self._gauge("tsqp:worker_up", "1 while there is a worker.", state.state == "ready")
        yield self._gauge("tsqp:worker_silent_seconds", "Time since the worker's last sign of life.", silent_s)
        yield self._gauge("tsqp:workers_expelled", "Workers and dealers that are not asked again.", len(state.expelled))
        yield self._counter("tsqp:worker_losses", "Sessions with workers that were lost.", state.losses)
        yield self._counter("tsqp:worker_reconnects", "Sessions after the first one.", state.reconnects)
        yield self._counter("tsqp:pauses", "Times that all answers waited for a worker.", state.pauses)
        yield self._counter("tsqp:paused_seconds", "Time in which all answers waited for a worker.", state.paused_s)
        yield self._counter("tsqp:failed_checks", "Products that were wrong.", state.failed_checks)

    def _of_pads(self) -> Iterator[Metric]:
        guard = self._model.llm.guard
        if guard is None:
            return
        figures = guard.report()
        checked = _number(figures["products_checked"])
        yield self._counter("tsqp:products_checked", "Products that were checked.", checked)
        if "pads_ready" in figures:
            yield self._gauge("tsqp:pads_ready", "Tokens of answers with pads ready.", _number(figures["pads_ready"]))
            ready = _number(figures["pads_ready_prompt"])
            yield self._gauge("tsqp:pads_ready_prompt", "Tokens of prompts with pads ready.", ready)
            yield self._gauge("tsqp:pads_ahead", "Tokens whose pads are to be ready.", _number(figures["pads_ahead"]))
            yield self._counter("tsqp:pads_used", "Rows of pads used.", _number(figures["pads_used"]))
            yield self._counter("tsqp:pads_missed", "Rows of pads made on the spot.", _number(figures["pads_missed"]))

    def _gauge(self, title: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(title, text, labels=list(self._label))
        family.add_metric(list(self._label.values()), float(value))
        return family

    def _counter(self, title: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(title, text, labels=list(self._label))
        family.add_metric(list(self._label.values()), float(value))
        return family


def _number(figure: object) -> float:
    return float(figure) if isinstance(figure, int | float) else 0.0


def metrics_route(meters: PrometheusMeters) -> Route:
    """``/metrics``."""

    async def page(_: Request) -> Response:
        return Response(meters.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    return Route("/metrics", page)
