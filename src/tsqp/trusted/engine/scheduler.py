"""Which rows the next forward pass has: who is admitted, who is prefilled, who loses its cache.

Decisions alone: no tensors, no threads, and no clock, as the scheduler is told how long steps have taken.
``docs/serving.md`` says what they are and why every request ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain, islice

from tsqp.errors import InputError, QueueFull
from tsqp.trusted.engine.counts import Counts
from tsqp.trusted.engine.fair_share import FairShare
from tsqp.trusted.engine.kv_budget import KVBudget
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.pace import PrefillPace
from tsqp.trusted.engine.prefixes import LEAST_ROWS, Prefixes
from tsqp.trusted.engine.request import Beginning, Cache, FinishReason, Request, ReusableCache
from tsqp.trusted.engine.same_prompts import SamePrompts

Shares = dict[Request, int]  # rows of the next pass, those of decode steps first


class Scheduler:
    """Requests that wait and that run.

    ``new_cache`` makes an empty cache. ``kv_memory``: bytes for all caches, None for no bound. ``same_bits``: a cache
    is kept up to the end of its prompt, as rows of an answer are not computed like rows of a prompt.
    ``whole_answers``: a request holds the memory for its whole answer from its admission on. ``tables_of``: the same
    for lengths of prompts whose positions are rotated alike; caches of others are not shared.
    """

    def __init__(
        self,
        new_cache: Callable[[], Cache],
        limits: Limits,
        *,
        kv_memory: int | None = None,
        same_bits: bool = False,
        whole_answers: bool = False,
        tables_of: Callable[[int], Hashable] = lambda length: 0,
    ) -> None:
        self._new_cache = new_cache
        self._limits = limits
        self._same_bits = same_bits
        self._whole_answers = whole_answers
        self._tables_of = tables_of
        self._budget = KVBudget(kv_memory)
        self._prefixes = Prefixes(self._budget)
        self._same = SamePrompts()
        self._fair = FairShare()
        self._pace = PrefillPace(limits.slowdown, limits.idle_rows)
        self._requests: dict[int, Request] = {}
        self._queues: dict[str, OrderedDict[int, Request]] = {}
        self._running: dict[int, Request] = {}  # in the order of admission
        self._was_apart = False  # the last pass was of a request with a tap
        self._paced: int | None = None  # rows of prompts that the pace gave to the last pass; None: nobody minds more
        self._owed_s = 0.0  # for how long a pass with more has held answers up, less what passes have taken since
        self._counts = Counts()

    def counts(self) -> Counts:
        """All numbers, as they are now."""
        counts = self._counts
        counts.running = len(self._running)
        counts.waiting = len(self._requests) - len(self._running)
        counts.kept_bytes = self._prefixes.size
        counts.kv_bytes = self._budget.used - self._prefixes.size
        counts.kv_limit = self._budget.limit
        return counts

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def get(self, number: int) -> Request | None:
        """A request that has not ended."""
        return self._requests.get(number)

    def check(self, request: Request) -> None:
        """Raises QueueFull; InputError for a request that would not fit alone."""
        waiting = len(self._requests) - len(self._running)
        if self._limits.waiting is not None and waiting >= self._limits.waiting:
            raise QueueFull(f"{waiting} requests wait already: ask again later")
        size = self._new_cache().bytes_for(request.end - 1)
        if not self._budget.fits_alone(size):
            raise InputError(
                f"keys and values of {request.end - 1} tokens, the answer included, take {size} bytes; "
                f"compute.kv_memory is {self._budget.limit}: raise it, or ask for fewer tokens",
                fields=("compute.kv_memory",),
            )

    def add(self, request: Request) -> None:
        """Put a request at the end of its tenant's queue. Raises as ``check``."""
        self.check(request)
        self._requests[request.id] = request
        self._queue_of(request)[request.id] = request
        can_share = request.scope is not None and request.prompt_length > LEAST_ROWS
        if can_share and isinstance(self._new_cache(), ReusableCache):
            self._same.add(self._scope_of(request), request)
        self._fair.enter(request.tenant)
        self._counts.added += 1

    def plan(self) -> Shares:
        """The rows of the next pass; empty where nothing is left to do.

        Before anything is written to a cache, copy the beginnings ``to_copy``. A request with a tap has passes of its
        own: every second one, while there are others.
        """
        shares = {} if self._was_apart else self._apart()
        self._was_apart = bool(shares)
        if shares:
            return shares
        shares = self._together()
        self._was_apart = not shares
        return shares or self._apart()

    def to_copy(self) -> list[Request]:
        """Running requests whose beginnings are still to be copied.

        Decisions are made under a lock that others wait for, and a copy may take long. What it is made of may be cut
        meanwhile, given up, or taken over by who goes on with it: until somebody writes to it, it holds what it held.
        """
        return [request for request in self._running.values() if request.beginning is not None]

    def _apart(self) -> Shares:
        """The rows of one running request with a tap; none where it has to wait."""
        tapped = [request for request in self._running.values() if request.tap is not None]
        if not tapped:
            return {}
        request = min(tapped, key=lambda one: (self._fair.given(one.tenant), one.id))
        if request.decoding:
            rows = 1 if self._make_room(request) else 0
        else:
            answers = self._answers()
            beside = any(not one.patient for one in answers)
            rows = request.most_rows
            if beside:
                rows = min(rows, self._rows_beside(len(answers)))
            elif rows > self._whole_rows:
                rows = self._limits.idle_rows
        if not rows:
            return {}
        self._fair.give(request.tenant, rows)
        return {request: rows}

    def _answers(self) -> list[Request]:
        """Those whose next rows are decode steps in one pass."""
        return [request for request in self._running.values() if request.decoding and request.tap is None]

    def _together(self) -> Shares:
        """The rows of all others; those whose turn it is are admitted."""
        shares: Shares = {}
        steps = self._answers()
        for request in steps:  # the one admitted first finds room first
            if request.id in self._running and self._make_room(request):
                shares[request] = 1
                self._fair.give(request.tenant, 1)
        self._share_prefill(shares, {request.id for request in steps})
        return shares

    def end(self, request: Request, reason: FinishReason) -> None:
        """A request has ended: what it holds is free, or kept for the next turn of its conversation.

        After an abort its prompt: the turn may have taken over what an earlier one left, and may be asked for again.
        """
        del self._requests[request.id]
        if self._running.pop(request.id, None) is None:
            self._unqueue(request)
        self._same.remove(request)
        self._fair.leave(request.tenant)
        self._counts.ended[reason] += 1
        cache = self._release(request)
        if request.scope is not None and reason != "error" and isinstance(cache, ReusableCache):
            if self._same_bits or reason == "abort":  # what thousands give up is one cache, if it is one prompt
                cache.truncate(request.prompt_length)
            self._prefixes.keep(self._scope_of(request), request.tokens[: cache.length], cache)

    def preempt(self, request: Request) -> None:
        """A running request loses its cache and waits again, before all others of its tenant."""
        del self._running[request.id]
        self._release(request)
        queue = self._queue_of(request)
        queue[request.id] = request
        queue.move_to_end(request.id, last=False)
        self._counts.preemptions += 1

    def lose_caches(self) -> None:
        """Every cache is gone: running requests wait again, in the order in which they were admitted."""
        for request in reversed(list(self._running.values())):
            self.preempt(request)
        self.forget()

    def forget(self) -> None:
        """Let go of all kept caches."""
        self._prefixes.clear()

    def unended(self) -> Iterator[Request]:
        """All requests that have not ended, in the order of arrival."""
        return iter(self._requests.values())

    def measured(self, answers: int, rows: int, seconds: float) -> None:
        """The step that was planned last, of so many decode rows and so many other rows, has taken so long."""
        if not self._was_apart:
            more = self._paced is not None and rows > self._paced
            self._owed_s = seconds if more else max(0.0, self._owed_s - seconds)
            self._pace.measured(answers, rows, seconds)
        elif rows:
            self._pace.measured_apart(len(self._answers()), rows, seconds)

    def count(self, request: Request, rows: int, *, new_tokens: int) -> None:
        """Count what a pass has computed of a request, and how many tokens were chosen after it."""
        before = request.computed - rows
        self._counts.prompt_tokens += max(0, min(request.computed, request.prompt_length) - before)
        self._counts.new_tokens += new_tokens

    def _share_prefill(self, shares: Shares, steps: set[int]) -> None:
        """Give prefill rows to those whose turn it is; admit who is next.

        A prompt that gets no more rows of this step may be passed by prompts of its tenant that are done with in it.
        """
        beside = any(not request.patient for request in shares)  # those who are patient mind no gaps
        if beside:
            left = self._rows_beside(len(shares))
            whole = max(left, self._rows_at_once(shares)) if left else 0
        else:
            left, whole = self._limits.idle_rows, self._whole_rows
        self._paced = left if beside else None
        taken, admits, served = 0, True, set(steps)
        passed: Request | None = None
        while taken < (whole if beside or passed is not None else left):
            request = self._next(shares, served, admits)
            if request is None or (passed is not None and request.tenant != passed.tenant):
                return
            if request.id not in self._running:
                if request.tap is None and taken >= left and taken + self._rest(request) > whole:
                    return
                if not self._admit(request):
                    admits = False  # nobody overtakes the one that does not fit
                    continue
            if request.tap is not None:
                continue
            rows = request.most_rows - shares.get(request, 0)
            is_cut = rows > left - taken and not (rows == request.rest and taken + rows <= whole)
            if is_cut:
                rows, passed = max(0, left - taken), request
                served.add(request.id)
            if rows:
                shares[request] = shares.get(request, 0) + rows
                taken += rows
                self._fair.give(request.tenant, rows)
            if is_cut and self._owed_s > 0:  # it is not held up in every step by those that pass it
                return

    @property
    def _whole_rows(self) -> int:
        """The most rows of prompts that are done with in one step where no answer is held up.

        A longer prompt is several steps: nobody joins in the middle of one, and nobody who leaves is heard.
        """
        return 2 * self._limits.idle_rows

    def _rows_beside(self, answers: int) -> int:
        """Rows of prompts beside so many decode rows; 0 where a step without any is to be measured."""
        fixed = self._limits.prefill_rows
        return self._pace.rows(answers) if fixed is None else fixed

    def _rows_at_once(self, shares: Shares) -> int:
        """Rows of the next step with which prompts may be done, beside the decode rows in ``shares``; 0 for none.

        Among several tenants for half of the time at most, as the sum of waits would let one who asks much stop others.
        """
        if self._limits.prefill_rows is not None:
            return 0
        begun = [request for request in self._running.values() if not request.decoding and request.tap is None]
        queued = chain.from_iterable(queue.values() for queue in self._queues.values())
        able = (request for request in queued if not self._same.held_back(request))
        places = islice(able, self._limits.running - len(self._running))
        waiting = [*begun, *(request for request in places if request.tap is None)]
        tenants = {request.tenant for request in (*shares, *waiting)}
        if not waiting or (self._owed_s > 0 and len(tenants) > 1):
            return 0
        return self._pace.at_once(len(shares), sum(map(self._rest, waiting)), len(waiting))

    def _rest(self, request: Request) -> int:
        """Rows that a request needs: of one that waits, without those that it will copy of one that runs."""
        shared = None if request.id in self._running else self._same.beginning(request)
        return request.rest if shared is None else len(request.tokens) - shared.length

    def _next(self, shares: Shares, steps: set[int], admits: bool) -> Request | None:
        """Of the tenants that have something to prefill or to admit, the first request of the one given least.

        One whose prompt another is yet to compute is passed over.
        """
        first: dict[str, Request] = {}
        for request in self._running.values():
            if request.tap is None and request.id not in steps and request.most_rows > shares.get(request, 0):
                first.setdefault(request.tenant, request)
        if admits and len(self._running) < self._limits.running:
            for tenant, queue in self._queues.items():
                able = next((request for request in queue.values() if not self._same.held_back(request)), None)
                if able is not None:
                    first.setdefault(tenant, able)
        return min(first.values(), key=lambda request: (self._fair.given(request.tenant), request.id), default=None)

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its cache, if the running ones leave room for it."""
        cache = self._new_cache()
        end = self._charged_end(request)
        size = cache.bytes_for(end)
        if not self._budget.fits(size - self._prefixes.size):
            return False
        begun = self._same.beginning(request) or self._begun(request, size)
        if isinstance(begun, Beginning):
            request.beginning = begun
        elif begun is not None:
            cache = begun
        if not self._fits_without_kept(cache.bytes_for(end)):
            cache = self._new_cache()  # the kept one was larger than what is needed
        cache.begin(request.prompt_length)
        request.cache, request.charge = cache, cache.bytes_for(end)
        self._counts.found_tokens += request.computed
        self._budget.charge(request.charge)
        self._unqueue(request)
        self._running[request.id] = request
        return True

    def _begun(self, request: Request, size: int) -> Cache | Beginning | None:
        """A cache with the beginning of a request, or what it is to be copied from, if one is kept in its scope."""
        if request.scope is None:
            return None
        # Where the kinds of rows differ, those of its answer are not to be taken from another one's prompt.
        most = min(len(request.tokens) - 1, request.prompt_length if self._same_bits else len(request.tokens))
        found = self._prefixes.find(self._scope_of(request), request.tokens[:most])
        if found is None:
            return None
        if found.whole or not self._budget.fits(size):
            return self._prefixes.take(found)
        return self._prefixes.beginning(found)

    def _scope_of(self, request: Request) -> Hashable:
        """Among whose caches a request may find its beginning: keys and values depend on its adapter."""
        return request.scope, request.adapter, self._tables_of(request.prompt_length)

    def _make_room(self, request: Request) -> bool:
        """Room for the next position of a running request; False where the request itself had to give way."""
        if request.cache is None:
            return False
        more = max(0, request.cache.bytes_for(len(request.tokens)) - request.charge)
        while not self._fits_without_kept(more):
            newest = next(reversed(self._running.values()))
            self.preempt(newest)
            if newest is request:
                return False
        request.charge += more
        self._budget.charge(more)
        return True

    def _fits_without_kept(self, size: int) -> bool:
        """Whether ``size`` more bytes fit, once as many kept caches as needed are gone."""
        while not self._budget.fits(size):
            if not self._prefixes.drop_oldest():
                return False
        return True

    def _charged_end(self, request: Request) -> int:
        """The positions that a request is charged for at its admission."""
        return request.end - 1 if self._whole_answers else len(request.tokens)

    def _release(self, request: Request) -> Cache | None:
        """Take a request's cache and what it is charged. A beginning that was not copied is let go."""
        cache, request.cache, request.beginning = request.cache, None, None
        self._budget.charge(-request.charge)
        request.charge = 0
        return cache

    def _queue_of(self, request: Request) -> OrderedDict[int, Request]:
        return self._queues.setdefault(request.tenant, OrderedDict())

    def _unqueue(self, request: Request) -> None:
        queue = self._queues[request.tenant]
        del queue[request.id]
        if not queue:
            del self._queues[request.tenant]
