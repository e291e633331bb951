"""The Python API: one object that holds a model, its worker and the line between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from tsqp.api.answer import Answer, Completion, Delta
from tsqp.api.dealer import Dealer
from tsqp.api.guard_config import GuardConfig
from tsqp.api.kernel_cache import kernel_cache_directory
from tsqp.api.plan import Plan, refuse_unused
from tsqp.checkpoint import locate, open_checkpoint, stored_dtype
from tsqp.errors import ChannelError, OptionError, PromptError, TsqpWarning, WorkerLost
from tsqp.launch.local import LocalWorker
from tsqp.tee.hardening import harden_process
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats
from tsqp.trusted.text.conversation import Messages
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer
from tsqp.wire.channel import Channel
from tsqp.wire.transport import connect
from tsqp.wire.transport.keys import ClientKeys

if TYPE_CHECKING:
    import torch

    from tsqp.api.pads import Filling
    from tsqp.checkpoint.base import Checkpoint
    from tsqp.trusted.engine.engine import Engine
    from tsqp.trusted.private import Guard
    from tsqp.trusted.remote.session import WorkerSession

Prompt = str | Sequence[int]
Given = Mapping[str, object]  # what was given, by name
Dial = Callable[[], Channel]


class LLM:
    """A model split between this process and a worker.

    ``model``: a directory, a ``.gguf`` file, a Hub id, ``default`` or ``synthetic:NAME``. ``protection`` must be
    stated: ``masked`` (the worker sees uniform noise and cannot cheat), ``verified`` (it sees the activations, and
    cannot cheat), ``open`` (it sees them, and is believed) or ``local`` (no worker). ``guard``: how products are
    checked and where pads come from, in the first two; both need partition ``linear`` and choose the numbers
    themselves, and this process gives up core dumps and being attached to for good. ``worker``: the address of a
    running one; None starts one beside this process with ``device`` and stops it on ``close``. ``dtype``: what this
    side computes in, and the worker if it is started here; ``auto`` is float32 for weights stored so and bfloat16 for
    all others; ``int8`` makes the worker compute its linear layers in integers. ``wire_dtype``: what
    crosses the line, by default what this side computes in. ``prefill_chunk``: the most rows that cross the layers
    together, as ``micro_batches`` parts in turn. ``compiled_kernels``: element-wise operators compiled by numba, kept
    in ``kernel_cache`` (a directory, ``auto`` or ``off``). ``compiled_worker``: a worker started here compiles its
    products, for which it needs a C++ compiler. ``threads``: CPU threads of each side; None leaves torch's setting here
    and gives the worker all cores. ``deadline_s``: the longest wait for one reply. ``security`` and
    ``insecure_plain_tcp``: how tcp is protected. ``announce`` is called with what was asked for, checked, before
    anything is fetched, started or sent. ``wrap_channel`` may put something in front of the worker's channel, as
    ``tsqp audit`` does to see what crosses, and ``wrap_dealer`` in front of the dealer's. ``pads_progress``: told how
    far it is, while ``warm_pads`` fills the pool.

    Forward passes of several threads take turns, and so do several streams that are open at once.

    Raises InputError, CheckpointError, ChannelError, PadError. Use it as a context manager, or call ``close``.
    """

    def __init__(
        self,
        model: str,
        *,
        protection: str,
        guard: GuardConfig | None = None,
        partition: str = "linear",
        worker: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        wire_dtype: str | None = None,
        prefill_chunk: int = 2048,
        micro_batches: int = 1,
        compiled_kernels: bool = True,
        kernel_cache: str = "auto",
        compiled_worker: bool = False,
        threads: int | None = None,
        deadline_s: float = 300.0,
        security: ClientKeys | None = None,
        insecure_plain_tcp: bool = False,
        announce: Callable[[Plan], None] | None = None,
        wrap_channel: Callable[[Channel], Channel] | None = None,
        wrap_dealer: Callable[[Channel], Channel] | None = None,
        pads_progress: Callable[[Filling], None] | None = None,
    ) -> None:
        check = partial(
            Plan.check,
            dtype=dtype,
            protection=protection,
            partition=partition,
            wire_dtype=wire_dtype,
            prefill_chunk=prefill_chunk,
            micro_batches=micro_batches,
            compiled_kernels=compiled_kernels,
            threads=threads,
            deadline_s=deadline_s,
        )
        self.plan = check()
        of_tcp = {"security": security, "insecure_plain_tcp": insecure_plain_tcp}
        self._refuse_unused(worker, {"wire_dtype": wire_dtype}, {"compiled_worker": compiled_worker}, of_tcp)
        self._options = GuardConfig.of(self.plan.protection, guard)
        self._dealer = Dealer.check(self._options, worker, security)
        if announce is not None:
            announce(self.plan)
        if self.plan.protection.checked and not harden_process().undumpable:
            warnings.warn(
                "the memory of this process can be read by its user: PR_SET_DUMPABLE failed", TsqpWarning, stacklevel=2
            )
        self.stats = Stats()
        self._session: WorkerSession | None = None
        self._guard: Guard | None = None
        self._local_worker: LocalWorker | None = None
        with ExitStack() as stack:
            model = locate(model)
            if dtype == "auto":
                self.plan = check(stored=stored_dtype(model))
            if self._options.pads_empty == "refuse":
                self._prepare_torch(kernel_cache)
                self._check_pool(open_checkpoint(model))
            if self.plan.partition is not None and worker is None:
                started = LocalWorker(
                    model, device=device, dtype=self.plan.worker_dtype, threads=threads, compiled=compiled_worker
                )
                self._local_worker = stack.enter_context(started)
            self._prepare_torch(kernel_cache)

            def dial() -> Channel:
                address = str(worker) if self._local_worker is None else self._local_worker.wait_ready()
                channel = connect(address, security=security, insecure_plain_tcp=insecure_plain_tcp)
                return channel if wrap_channel is None else wrap_channel(channel)

            dial_dealer = None if self._dealer is None else partial(self._dealer.dial, wrap_dealer)
            checkpoint = open_checkpoint(model)
            self._engine = self._build_engine(checkpoint, dial, dial_dealer, stack)
            if self._guard is not None and self._guard.filler is not None:
                if self._options.warm_pads:
                    from tsqp.api.pads import fill

                    fill(self._guard.filler, checkpoint.spec, pads_progress)
                self._guard.filler.start()
            self._resources = stack.pop_all()

    def _refuse_unused(self, worker: str | None, of_a_worker: Given, of_one_started_here: Given, of_tcp: Given) -> None:
        """Raises OptionError for what was given and would play no part."""
        name = self.plan.protection.name
        if self.plan.partition is None:
            refuse_unused(f"protection {name} uses no worker", {"worker": worker, **of_a_worker, **of_one_started_here})
        if self.plan.protection.checked:
            refuse_unused("the private modes do not use torch.compile", of_one_started_here)
        if worker is None or not worker.startswith("tcp://"):
            refuse_unused("there is no worker with a tcp address", of_tcp)
        if worker is not None:
            refuse_unused("the worker is not started here", of_one_started_here)

    def _check_pool(self, checkpoint: Checkpoint) -> None:
        from tsqp.api.pads import check_pool

        check_pool(checkpoint.spec, self._options)

    def _prepare_torch(self, kernel_cache: str) -> None:
        """Load torch, which takes a second or two: only now, so that a worker started before does it meanwhile."""
        import torch

        from tsqp.arith.jit import enable_cache

        kernels = kernel_cache_directory(kernel_cache) if self.plan.compiled_kernels else None
        if kernels is not None:
            enable_cache(kernels)
        if self.plan.threads is not None:
            torch.set_num_threads(self.plan.threads)

    def _build_engine(self, checkpoint: Checkpoint, dial: Dial, dial_dealer: Dial | None, stack: ExitStack) -> Engine:
        from tsqp.api.assemble import build_local_engine, build_private_engine, build_split_engine

        self.tokenizer = Tokenizer(checkpoint.text_format())
        ends = self.tokenizer.eos_token_ids
        if self.plan.partition is None:
            return build_local_engine(checkpoint, self.plan, ends, self.stats)
        if self.plan.protection.checked:
            engine, self._session, self._guard = build_private_engine(
                checkpoint, self.plan, self._options, dial, dial_dealer, ends, self.stats
            )
            stack.callback(self._session.close)
            stack.callback(self._guard.close)
            return engine
        engine, self._session = build_split_engine(checkpoint, self.plan, self.plan.partition, dial, ends, self.stats)
        stack.callback(self._session.close)
        return engine

    @property
    def session(self) -> WorkerSession | None:
        """The connection to the worker; None at ``local``."""
        return self._session

    @property
    def guard(self) -> Guard | None:
        """What checks products, and the pads; None where nothing is checked."""
        return self._guard

    @property
    def guard_options(self) -> GuardConfig:
        """What was asked for about checks and pads; the defaults where nothing was."""
        return self._options

    @property
    def dealer(self) -> Dealer | None:
        """Who makes the pads' products; None where this process does, or there are none."""
        return self._dealer

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker started here."""
        return None if self._local_worker is None else self._local_worker.pid

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        **template_args: object,
    ) -> list[Completion]:
        """Answer all prompts together, as one batch.

        A prompt of text becomes the user's turn of the checkpoint's chat template when it has one; ``template_args``
        are variables of that template, such as ``enable_thinking=False``. No part of the prompt becomes a control
        token, unless ``raw``: then the text is taken as it is, and so are the control tokens written in it. Token ids
        are taken as they are. Raises PromptError, OptionError and PadsExhausted before anything is sent, NumericError,
        ChannelError.
        """
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        batch: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        completions: dict[int, Completion] = {}
        for index, delta in self._run(batch, params or SamplingParams(), raw, template_args):
            if delta.completion is not None:
                completions[index] = delta.completion
        return [completions[index] for index in range(len(batch))]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False, **template_args: object
    ) -> Iterator[Delta]:
        """Answer one prompt piece by piece; see ``generate``."""
        for _, delta in self._run([prompt], params or SamplingParams(), raw, template_args):
            yield delta

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, **template_args: object
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece. Nothing in a message becomes a control token.

        ``template_args`` are variables of the chat template: ``tools`` and ``documents``, lists of mappings, and what
        else it knows. Raises PromptError when the checkpoint has no chat template, or when it refuses the conversation.
        """
        yield from self.stream(self.tokenizer.encode_chat(messages, **template_args), params)

    def logits(self, prompt: Prompt) -> torch.Tensor:
        """Logits after every token of a raw prompt, float32 (T, vocab_size)."""
        return self._engine.logits(self._tokens(prompt, True, {}))

    def close(self) -> None:
        """Leave the worker, and stop it if it was started here. Closing twice is allowed."""
        self._resources.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, prompt: Prompt, raw: bool, template_args: Given) -> list[int]:
        if template_args and (raw or not isinstance(prompt, str)):
            raise OptionError(f"the prompt is not put into a chat template: leave out {', '.join(template_args)}")
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt.strip():
            raise PromptError("the prompt is empty: give some text")
        return self.tokenizer.encode(prompt) if raw else self.tokenizer.encode_prompt(prompt, **template_args)

    def _run(
        self, prompts: Sequence[Prompt], params: SamplingParams, raw: bool, template_args: Given
    ) -> Iterator[tuple[int, Delta]]:
        answers = [
            Answer(self._tokens(prompt, raw, template_args), TextStream(self.tokenizer, params.stop))
            for prompt in prompts
        ]
        if self._guard is not None and self._guard.filler is not None:
            from tsqp.api.pads import check_prompts

            check_prompts(sum(len(answer.prompt) for answer in answers), self._options, self._guard.filler)
        try:
            generation = self._engine.generate([answer.prompt for answer in answers], params)
            for new in generation:
                delta = answers[new.sequence].extend(new.token, new.finish_reason)
                if delta.completion is not None:
                    generation.stop(new.sequence)
                yield new.sequence, delta
        except WorkerLost as error:
            raise self._explained(error) from None

    def _explained(self, error: WorkerLost) -> ChannelError:
        """A lost worker that was started here can say how it ended."""
        if self._local_worker is None or self._session is None or self._session.channel.address not in str(error):
            return error  # not ours, or it was the dealer
        return WorkerLost(f"{error}: {self._local_worker.last_words()}")
