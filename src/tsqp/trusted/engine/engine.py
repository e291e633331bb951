"""Many requests, one model: each step is one forward pass over the next rows of those whose turn it is.

``docs/serving.md`` says who comes first, what a request holds, and why an answer does not depend on its company.

Two locks. The one for passes, here, is held as long as a pass takes. The one of ``Books`` is held for an instant; it is
never waited for by ``abort`` and ``stop``, which a finaliser may call in the middle of anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tsqp.config.model import ModelConfig
from tsqp.errors import ChannelError, InputError, OptionError, PromptError, TsqpError
from tsqp.model.batch import Batch
from tsqp.model.pending import run
from tsqp.trusted.engine.books import Books, ReservesPads
from tsqp.trusted.engine.counts import Counts
from tsqp.trusted.engine.forward_pass import ForwardPass
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.line import Line, PassDecoder
from tsqp.trusted.engine.logprobs import token_logprobs
from tsqp.trusted.engine.oblivious import ObliviousSampler, compile_loops, oblivious_logprobs
from tsqp.trusted.engine.request import ChoosesTokens, Output, Request
from tsqp.trusted.engine.sampling import Sampler
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.scheduler import Scheduler, Shares
from tsqp.trusted.engine.turns import Turns
from tsqp.trusted.stats import Stats
from tsqp.trusted.tap import Tap


class Engine:
    """Runs requests through a decoder.

    ``eos_token_ids`` end an answer unless it ignores them. ``kv_memory``: bytes for caches, None for no bound.
    ``same_bits``: rows of prompts and rows of answers are told apart, so that logits do not depend on how they were
    computed. ``pads``: where a request reserves them, in a run that does not make missing ones. ``line``: where further
    decoders come from, should the worker of this one be lost. ``clock``: seconds, for how long steps take.
    ``adapters``: the names of those that requests may have.
    """

    def __init__(
        self,
        decoder: PassDecoder,
        eos_token_ids: tuple[int, ...],
        stats: Stats,
        *,
        limits: Limits | None = None,
        kv_memory: int | None = None,
        same_bits: bool = False,
        pads: ReservesPads | None = None,
        line: Line | None = None,
        clock: Callable[[], float] = time.perf_counter,
        adapters: Iterable[str] = (),
        oblivious: bool = False,
    ) -> None:
        limits = limits or Limits()
        most = getattr(decoder, "max_sequences", limits.running)
        self.decoder = decoder
        self.eos_token_ids = eos_token_ids
        self.stats = stats
        self.limits = replace(limits, running=min(limits.running, most))
        self._same_bits = same_bits
        self._line = line
        self._clock = clock
        self._adapters = tuple(adapters)
        self._oblivious = oblivious  # whether tokens are chosen by looks at the whole vocabulary
        if oblivious:
            compile_loops()
        scheduler = Scheduler(
            lambda: self.decoder.new_cache(),
            self.limits,
            kv_memory=kv_memory,
            same_bits=same_bits,
            whole_answers=pads is not None,
            tables_of=lambda length: tuple(rope.table_length(length) for rope in self.config.ropes),
        )
        self._books = Books(scheduler, pads)
        self._one_at_a_time = Turns()
        self._process = os.getpid()

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def busy(self) -> bool:
        """Whether a forward pass is under way."""
        return self._one_at_a_time.locked()

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return len(self._books.scheduler) > 0

    def counts(self) -> Counts:
        """Numbers of requests, tokens and bytes, all of one moment."""
        return self._books.counts()

    @property
    def most_promised(self) -> int | None:
        """Rows that pads can be promised to at once, for all requests together; None where none are promised.

        A request needs a row for each token of its prompt and of its answer but the last.
        """
        return self._books.most_promised

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises PromptError for a prompt that is empty, longer than the context or with unknown token ids."""
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token of text")
        if len(prompt) >= self.config.max_positions:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens; this model's context holds {self.config.max_positions}, "
                "the answer included: shorten the prompt"
            )
        if not all(0 <= token < self.config.vocab_size for token in prompt):
            raise PromptError(f"a token id is outside of the vocabulary of {self.config.vocab_size}")

    def check_adapter(self, name: str | None) -> None:
        """Raises OptionError for an adapter that this run has not."""
        if name is not None and name not in self._adapters:
            known = ", ".join(self._adapters) or "none, as compute.lora was not given"
            fields = () if self._adapters else ("compute.lora",)
            raise OptionError(f"there is no such adapter; this run has {known}", fields=fields)

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        tenant: str = "",
        salt: str | None = None,
        patient: bool = False,
        sampler: ChoosesTokens | None = None,
        deliver: Callable[[Output], None] | None = None,
        tap: Tap | None = None,
        adapter: str | None = None,
    ) -> int:
        """Put a request into the queue; its number. It is computed by ``step``.

        ``tenant``: who shares the engine fairly with others. ``salt``: the request may find what ended requests of the
        same tenant and salt have left, and leaves its own; None: neither, nor where log-probabilities of the prompt are
        asked for, since all of it is to be computed. ``patient``: nobody follows the answer as it grows, so prompts of
        others may hold it up. ``sampler``: one of its own, for this request alone; made of
        ``params`` when not given. ``deliver`` is called with each of its outputs, by whoever steps. ``tap``: listens to
        the passes of the request, which have no row of another; all of it is computed and nothing of it is left.
        ``adapter``: the name of the one that the request has.

        Raises PromptError; OptionError for an adapter that this run has not; InputError for a request that can never
        fit into the memory for caches, or never have its pads promised; QueueFull; PadsExhausted.
        """
        self._refuse_fork()
        self.check_prompt(prompt)
        self.check_adapter(adapter)
        request = Request(
            0,
            prompt,
            params,
            sampler or (ObliviousSampler if self._oblivious else Sampler)(params),
            max_positions=self.config.max_positions,
            eos_token_ids=self.eos_token_ids,
            look=oblivious_logprobs if self._oblivious else token_logprobs,
            tenant=tenant,
            scope=None if salt is None or tap is not None or params.prompt_logprobs is not None else (tenant, salt),
            patient=patient,
            deliver=deliver,
            tap=tap,
            adapter=adapter,
        )
        return self._books.add(request)

    def step(self) -> list[Output]:
        """One forward pass, if there is anything to compute; what came of it, which was also delivered.

        Steps of several threads take turns. Raises NumericError, PadsExhausted and any ChannelError; then no request
        has changed, and the step can be asked for again. InputError in a forked process.

        A step that loses its worker gives nothing, and the next one waits for another worker. Where none comes, all
        requests end with the error, which each is delivered.
        """
        self._refuse_fork()
        with self._one_at_a_time:
            return self._step()

    def step_unless(self, there: Callable[[], bool]) -> None:
        """A step, unless another thread's has meanwhile brought what the caller waits for. Raises as ``step``."""
        self._refuse_fork()
        with self._one_at_a_time:
            if not there():
                self._step()

    def between_passes(self, action: Callable[[], None]) -> None:
        """Do something for which no forward pass may be under way. Raises what it raises; InputError after a fork."""
        self._refuse_fork()
        with self._one_at_a_time:
            action()

    @contextmanager
    def without_passes(self, most_s: float) -> Iterator[None]:
        """No forward pass is under way within it, but for one that takes more than ``most_s``. At once after a fork."""
        mine = os.getpid() == self._process and self._one_at_a_time.wait(most_s)
        try:
            yield
        finally:
            if mine:
                self._one_at_a_time.end()

    def abort(self, number: int) -> None:
        """End a request; what it holds is free, or kept for its next turn, at once or after the pass under way.

        Never waits. A request that has ended already is left alone.
        """
        self._books.end_soon(number, "abort")

    def stop(self, number: int) -> None:
        """The same for a request whose answer is complete, for instance by a stop string."""
        self._books.end_soon(number, "stop")

    def fail(self, error: Exception) -> None:
        """End every request with an error, which each is delivered."""
        self._refuse_fork()
        with self._one_at_a_time:
            self._fail(error)

    def mend(self) -> None:
        """Wait for a worker if there is none: in idle time, so that the next request need not. Raises ChannelError."""
        self._refuse_fork()
        if self._line is not None:
            with self._one_at_a_time:
                if self._line.look():
                    self._have_decoder()

    def forget(self) -> None:
        """Let go of the caches that ended requests have left."""
        with self._books.open() as scheduler:
            scheduler.forget()

    def generate(
        self, prompts: Iterable[Sequence[int]], params: SamplingParams, adapter: str | None = None
    ) -> Iterator[tuple[int, Output]]:
        """Answer prompts together: the index of a prompt and an output of it, in the order they come.

        Raises before the first one as ``add_request``, later as ``step``; and the error of a request of its own.
        """
        from tsqp.trusted.engine.caller import Caller

        with Caller(self) as caller:
            for prompt in prompts:
                caller.add(prompt, params, patient=True, adapter=adapter)
            yield from caller

    def logits(self, prompt: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """Logits after every token of one prompt, float32 (T, vocab_size): for quality tests. Raises as ``step``."""
        self._refuse_fork()
        self.check_prompt(prompt)
        self.check_adapter(adapter)
        self._books.reserve(len(prompt))
        try:
            with self._one_at_a_time:
                while True:
                    self._have_decoder()
                    try:
                        caches = [self.decoder.new_cache()]
                        return self._forward(Batch([prompt], caches, every_row=True, adapters=[adapter]))
                    except ChannelError as error:
                        if self._line is None or not self._line.mends(error):
                            raise
        finally:
            self._books.release(len(prompt))

    def run(self, batch: Batch[Any]) -> torch.Tensor:
        """One forward pass; the passes of several threads take turns. Raises InputError in a forked process.

        A lost worker is an error here: whether the caches of the batch are still good is for its caller to know.
        """
        self._refuse_fork()
        with self._one_at_a_time:
            self._have_decoder()
            return self._forward(batch)

    def _forward(self, batch: Batch[Any]) -> torch.Tensor:
        """One forward pass, for who has the turn."""
        try:
            with torch.inference_mode():
                logits = run(self.decoder.forward(batch))
        except BaseException as error:
            if self._line is not None:
                self._line.gave_up(error)
            raise
        if self._line is not None:
            self._line.passed()
        return logits

    def _have_decoder(self) -> None:
        """A decoder whose worker is there; the lock for passes is held. Raises what ends all requests."""
        decoder = self.decoder if self._line is None else self._line.decoder()
        if decoder is not self.decoder:
            with self._books.open() as scheduler:
                self.decoder = decoder
                if getattr(decoder, "caches_on_worker", False):
                    scheduler.lose_caches()

    def _fail(self, error: Exception) -> None:
        """End every request; the lock for passes is held."""
        for request in self._books.end_all("error"):
            request.give(Output(request.id, None, "error", error))

    def _step(self) -> list[Output]:
        """See ``step``; the lock for passes is held."""
        if self.has_work():
            try:
                self._have_decoder()
            except TsqpError as error:
                self._fail(error)
                return []
        shares, copies, held = self._books.begin_step()
        given: dict[Request, Output] = {}
        try:
            self._copy_beginnings(copies, given)
            shares = {request: rows for request, rows in shares.items() if request not in given}
            if shares:
                self._pass(shares, given)
        except ChannelError as error:
            if self._line is None or not self._line.mends(error):
                raise
        finally:
            self._books.end_step(held, given)
            for request, output in given.items():
                request.give(output)
        return list(given.values())

    def _copy_beginnings(self, requests: Iterable[Request], given: dict[Request, Output]) -> None:
        """What requests were found to share becomes their own. What goes wrong is the request's own."""
        for request in requests:
            try:
                with torch.inference_mode():
                    request.copy_beginning()
            except Exception as error:
                given[request] = Output(request.id, None, "error", error)

    def _pass(self, shares: Shares, given: dict[Request, Output]) -> None:
        """The forward pass of a step, and the tokens that are chosen after it."""
        planned = ForwardPass(shares, same_bits=self._same_bits)
        answers, prompts = planned.decode_rows, planned.prefill_rows
        start = self._clock()
        with planned.tapped():
            logits = self._forward(planned.batch)
        self.stats.passed(start, self._clock(), prompts or [1] * answers, prefill=bool(prompts))
        planned.take(logits, given, self.stats)
        took_s = self._clock() - start
        with self._books.open() as scheduler:
            scheduler.measured(answers, sum(prompts), took_s)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:  # before anything that waits for a thread which the fork has left behind
            raise InputError("a model belongs to the process that opened it: open a new LLM after a fork")
