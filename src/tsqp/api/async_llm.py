"""The same API for asyncio: one thread steps the engine, and hands what came of each step to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from tsqp.api.answer import Answer, Completion, Delta, Ends
from tsqp.api.text_threads import on_text_thread
from tsqp.errors import ChannelError, TsqpError, model_closed
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.text.conversation import Messages

if TYPE_CHECKING:
    from tsqp.api.llm import LLM, Prompt
    from tsqp.api.worker_state import WorkerState
    from tsqp.trusted.engine.counts import Counts
    from tsqp.trusted.engine.engine import Engine
    from tsqp.trusted.engine.request import Output
    from tsqp.trusted.engine.sampling import Sampler
    from tsqp.trusted.tap import Tap


LOOK_S = 1.0  # without requests, how often to look whether the worker has gone

log = logging.getLogger("tsqp.workers")


class AsyncAnswer:
    """One answer under way: iterate over its pieces. ``abort`` ends it early, and so does leaving it as a context.

    Iterating raises what has ended the request: NumericError, any ChannelError.
    """

    def __init__(self, engine: Engine, answer: Answer) -> None:
        self._engine = engine
        self._answer = answer
        self.loop = asyncio.get_running_loop()
        self._arrived = asyncio.Queue[Delta | Exception | None]()  # None: there is no more
        self._number: int | None = None
        self.ended = asyncio.Event()  # the last piece is there, or there will be none

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt."""
        return tuple(self._answer.prompt)

    def begin(
        self,
        params: SamplingParams,
        sampler: Sampler,
        tenant: str,
        salt: str | None,
        patient: bool,
        tap: Tap | None = None,
        lora: str | None = None,
    ) -> None:
        """Put the request into the queue. Raises as ``Engine.add_request``."""
        self._number = self._engine.add_request(
            self._answer.prompt,
            params,
            tenant=tenant,
            salt=salt,
            patient=patient,
            sampler=sampler,
            deliver=self._deliver,
            tap=tap,
            adapter=lora,
        )

    def abort(self) -> None:
        """End the request; what it holds is free after the pass that is under way. Ended twice is allowed."""
        self._end(self._engine.abort)

    def stop(self) -> None:
        """The same, but the answer counts as complete: a conversation may go on with what was computed of it."""
        self._end(self._engine.stop)

    def _end(self, end: Callable[[int], None]) -> None:
        if self._number is not None:
            end(self._number)
        if not self.ended.is_set():
            self.ended.set()
            self._arrived.put_nowait(None)  # for a task that waits

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._arrived.empty() and self.ended.is_set():
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if arrived is None:
            raise StopAsyncIteration
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    async def __aenter__(self) -> AsyncAnswer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _deliver(self, output: Output) -> None:
        """Called by the thread that steps."""
        piece: Delta | Exception
        try:
            piece = self._answer.extend(output)
        except Exception as error:
            piece = error
        last = isinstance(piece, Exception) or piece.completion is not None
        if last and output.finish_reason is None:
            end = self._engine.abort if isinstance(piece, Exception) else self._engine.stop
            end(output.request)
        try:
            self.loop.call_soon_threadsafe(self._arrive, piece, last)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self._engine.abort(output.request)

    def _arrive(self, piece: Delta | Exception, last: bool) -> None:
        """Called by the event loop."""
        if not self.ended.is_set():
            self._arrived.put_nowait(piece)
        if last:
            self.ended.set()


class AsyncLLM:
    """An ``LLM`` for asyncio. Requests are computed together, by one thread, however many tasks there are.

    ``tenant`` names whose a request is: tenants share the model fairly. ``salt`` says that the request may go on with
    what ended requests of the same tenant and salt have left in memory, and leaves its own; None: neither.

    The ``LLM`` belongs to this object from now on, and is closed by ``close``.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine = llm.engine
        self._open: set[AsyncAnswer] = set()
        self._closed = False
        self._pings = deque[Future[None]]()
        self._fault: str | None = None  # the kind of the last error in idle time that was none of ours
        self._wake = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tsqp-engine", daemon=True)
        self._thread.start()

    async def open(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        tenant: str = "",
        salt: str | None = None,
        tap: Tap | None = None,
        lora: str | None = None,
        ends: Ends | None = None,
        goes_on: bool | None = None,
        **template_args: object,
    ) -> AsyncAnswer:
        """Ask for one answer; returns once the request is in the queue. For the prompt see ``LLM.generate``.

        ``tap``: one of ``LLM.taps``, which then has what is sent to the worker for this request. ``lora``: see
        ``LLM.generate``. ``ends``: called with each piece by the thread that steps; where it says so, the answer is
        complete, and nothing more of it is computed. ``goes_on``: whether the answer does so with the text of the
        prompt; None: as ``LLM.goes_on`` says, so False is for the tokens of a conversation.

        Raises PromptError, InputError, QueueFull and PadsExhausted; ChannelClosed after ``close``.
        """
        tokens = await on_text_thread(self.llm.encode, prompt, raw=raw, **template_args)
        if goes_on is None:
            goes_on = self.llm.goes_on(prompt, raw=raw, **template_args)
        return await self._begin(
            tokens, params or SamplingParams(), tenant, salt, goes_on, tap=tap, lora=lora, ends=ends
        )

    async def open_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tenant: str = "",
        salt: str | None = "",
        lora: str | None = None,
        **template_args: object,
    ) -> AsyncAnswer:
        """The same for a conversation, see ``LLM.chat``; one that goes on is not computed again from its beginning."""
        tokens = await on_text_thread(self.llm.tokenizer.encode_chat, messages, **template_args)
        return await self._begin(tokens, params or SamplingParams(), tenant, salt, False, lora=lora)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        tenant: str = "",
        salt: str | None = None,
        lora: str | None = None,
        **template_args: object,
    ) -> AsyncIterator[Delta]:
        """Answer one prompt piece by piece. A task that is cancelled ends its request within a step."""
        asked = self.open(
            prompt,
            params,
            raw=raw,
            tenant=tenant,
            salt=salt,
            tap=None,
            lora=lora,
            ends=None,
            goes_on=None,
            **template_args,
        )
        async with await asked as answer:
            async for delta in answer:
                yield delta

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tenant: str = "",
        salt: str | None = "",
        lora: str | None = None,
        **template_args: object,
    ) -> AsyncIterator[Delta]:
        """Answer a conversation piece by piece."""
        asked = self.open_chat(messages, params, tenant=tenant, salt=salt, lora=lora, **template_args)
        async with await asked as answer:
            async for delta in answer:
                yield delta

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        tenant: str = "",
        salt: str | None = None,
        lora: str | None = None,
        **template_args: object,
    ) -> Completion:
        """Answer one prompt; several by ``asyncio.gather``. Nobody sees it grow, so other prompts may hold it up."""
        tokens = await on_text_thread(self.llm.encode, prompt, raw=raw, **template_args)
        goes_on = self.llm.goes_on(prompt, raw=raw, **template_args)
        asked = self._begin(tokens, params or SamplingParams(), tenant, salt, goes_on, patient=True, lora=lora)
        async with await asked as answer:
            async for delta in answer:
                if delta.completion is not None:
                    return delta.completion
        raise model_closed()

    async def ping(self) -> None:
        """A round trip to the worker, by the thread that steps; a step, where there is something to compute, is one.

        Raises any ChannelError; ChannelClosed after ``close``.
        """
        if self._closed:
            raise model_closed()
        asked = Future[None]()
        self._pings.append(asked)
        self._wake.set()
        await asyncio.wrap_future(asked)

    def counts(self) -> Counts:
        """Numbers of requests, tokens and bytes, all of one moment."""
        return self._engine.counts()

    @property
    def worker_state(self) -> WorkerState | None:
        """See ``LLM.worker_state``."""
        return self.llm.worker_state

    async def close(self, drain_s: float | None = None) -> None:
        """Take no more requests, wait for those under way, at most ``drain_s`` seconds, abort the rest, close the LLM.

        Who iterates over an aborted answer gets ChannelClosed, and so does at once who iterates in another loop.
        Closing twice is allowed.
        """
        self._closed = True
        loop = asyncio.get_running_loop()
        here = [answer for answer in self._open if answer.loop is loop]  # another loop may have ended
        waits = [asyncio.ensure_future(answer.ended.wait()) for answer in here]
        if waits:
            await asyncio.wait(waits, timeout=drain_s)
        for wait in waits:
            wait.cancel()
        for answer in here:
            if not answer.ended.is_set():
                answer._arrive(model_closed(), True)
                answer.abort()
        self._over.set()
        self._wake.set()
        self.llm.stop_waiting()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(None if kind is None else 0.0)

    async def _begin(
        self,
        tokens: list[int],
        params: SamplingParams,
        tenant: str,
        salt: str | None,
        goes_on: bool,
        *,
        patient: bool = False,
        tap: Tap | None = None,
        lora: str | None = None,
        ends: Ends | None = None,
    ) -> AsyncAnswer:
        ((begun, sampler),) = await on_text_thread(self.llm.new_answers, [tokens], params, go_on=[goes_on], ends=ends)
        if self._closed:
            raise model_closed()
        answer = AsyncAnswer(self._engine, begun)
        answer.begin(params, sampler, tenant, salt, patient, tap, lora)
        self._open = {one for one in self._open if not one.ended.is_set()} | {answer}
        self._wake.set()
        return answer

    def _run(self) -> None:
        """The thread: a step while there is something to do."""
        while not self._over.is_set():
            if self._engine.has_work():
                self._answer_pings(self._step)
            elif self._pings:
                self._answer_pings(self.llm.ping)
            elif self._wake.wait(LOOK_S):
                self._wake.clear()
            else:
                self._mend()
        with suppress(Exception):
            self._engine.fail(model_closed())  # who iterates in another loop than that of ``close``
        self._answer_pings(_refuse)

    def _mend(self) -> None:
        """Wait for a worker in idle time. Whatever fails, this thread goes on, since nobody else steps.

        The next request hears of it.
        """
        try:
            self._engine.mend()
        except TsqpError:
            pass
        except Exception as error:
            kind, before = type(error).__name__, self._fault
            self._fault = kind
            if kind != before:  # its text may be a worker's, or of what was computed
                log.error("while a worker was waited for: %s", kind, extra={"event": "wait_failed"})

    def _step(self) -> None:
        """One step. Raises what it raises, once each request has been told."""
        try:
            self._engine.step()
        except Exception as error:
            with suppress(Exception):
                self._engine.fail(self.llm.explained(error) if isinstance(error, ChannelError) else error)
            raise

    def _answer_pings(self, round_trip: Callable[[], None]) -> None:
        """Make a round trip, and tell those who have asked for one before it what came of it."""
        asked = [self._pings.popleft() for _ in range(len(self._pings))]
        waiting = [one for one in asked if one.set_running_or_notify_cancel()]
        try:
            round_trip()
        except Exception as error:
            for one in waiting:
                one.set_exception(error)
        else:
            for one in waiting:
                one.set_result(None)


def _refuse() -> None:
    raise model_closed()
