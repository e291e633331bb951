"""The Python API: one object that holds a model, its worker and the line between them."""

from __future__ import annotations

import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tsqp.api.adapters import NO_ADAPTERS, load_adapters
from tsqp.api.answer import Answer, Completion, Delta, Ends
from tsqp.api.arena import arena_for
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig, is_roster
from tsqp.api.dealer import Connect, Dealer, DealerRoster, client_keys
from tsqp.api.kernel_cache import keep_loops
from tsqp.api.places import Place, Standing, StartedHere
from tsqp.api.plan import Plan
from tsqp.api.roster_place import RosterPlace
from tsqp.api.rosters import dialling_dealers, worker_roster
from tsqp.api.worker_state import WorkerState
from tsqp.checkpoint import locate, open_checkpoint, stored_dtype
from tsqp.checkpoint.contents import read_line
from tsqp.config.protection import ProtectionName
from tsqp.cores import cores
from tsqp.errors import ChannelError, OptionError, PromptError, TsqpWarning, WorkerLost, model_closed
from tsqp.launch.local import LocalWorker
from tsqp.progress import Progress, Timings, unseen
from tsqp.tee.hardening import harden_process
from tsqp.tee.memory import lock_memory, swap_bytes
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.stats import Stats
from tsqp.trusted.tap import Taps
from tsqp.trusted.text.conversation import Messages
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer
from tsqp.wire.channel import Channel
from tsqp.wire.transport import connect as connect_to
from tsqp.wire.transport.keys import ClientKeys
from tsqp.wire.transport.users import user_id

if TYPE_CHECKING:
    import torch

    from tsqp.api.links import Link
    from tsqp.api.pads import Filling
    from tsqp.api.supervisor import Supervisor
    from tsqp.checkpoint.base import Checkpoint
    from tsqp.config.model import ModelConfig
    from tsqp.trusted.engine.engine import Engine
    from tsqp.trusted.engine.limits import Limits
    from tsqp.trusted.engine.sampling import Sampler
    from tsqp.trusted.private import Guard
    from tsqp.trusted.remote.connection import Connection

Prompt = str | Sequence[int]


class LLM:
    """A model split between this process and a worker.

    ``model``: a directory, a ``.gguf`` file, a Hub id, ``default`` or ``synthetic:NAME``. ``protection``: ``masked``
    (the worker sees uniform noise and cannot cheat), ``verified`` (it sees the activations, and cannot cheat), ``open``
    (it sees them, and is believed) or ``local`` (no worker). In the first two this process gives up core dumps and
    being attached to for good. ``worker``: how the worker is reached, or only the address of a running one; without an
    address one is started beside this process and stopped on ``close``. A worker that is lost is waited for, or another
    is asked, and answers go on; see ``worker_state``. ``guard``: how products are checked and where
    pads come from. ``compute``: what is computed where, in which numbers. ``connect`` opens the channels to worker and
    dealer; another than the default may see or change all that crosses, as ``tsqp audit`` does. ``announce`` is called
    with what was asked for, checked, before anything is fetched, started or sent. ``pads_progress`` is told how far it
    is, while ``warm_pads`` fills the pool; ``progress``, what else takes long until the model is open. ``limits``: how
    many requests are computed together. ``taps``: whether a request may have a tap, which shows what was sent to the
    worker for it; at partition ``linear``, and ``local``.

    Requests of several threads, and several streams that are open at once, are computed together, by whoever waits for
    one of them. ``AsyncLLM`` is the same for asyncio.

    Raises InputError, CheckpointError, ChannelError, PadError. Use it as a context manager, or call ``close``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        protection: ProtectionName = "masked",
        worker: WorkerConfig | str | Sequence[str] | None = None,
        guard: GuardConfig | None = None,
        compute: ComputeConfig | None = None,
        connect: Connect = connect_to,
        announce: Callable[[Plan], None] | None = None,
        pads_progress: Callable[[Filling], None] | None = None,
        progress: Progress = unseen,
        limits: Limits | None = None,
        taps: bool = False,
    ) -> None:
        model = os.fspath(model)
        if worker is not None and not isinstance(worker, WorkerConfig):
            worker = WorkerConfig(worker if isinstance(worker, str) else tuple(worker))
        self._closed = False
        run = RunConfig(model, protection, worker or WorkerConfig(), guard or GuardConfig(), compute or ComputeConfig())
        self.plan = Plan.of(run)
        self._dealer = Dealer.of(run) or DealerRoster.of(run)
        self._connect = connect
        self._limits = limits
        self.taps = self._new_taps() if taps else None
        self._security = client_keys(run.worker.key, run.worker.server_key)
        self._worker_user = None if run.worker.user is None else user_id(run.worker.user, "worker.user")
        if announce is not None:
            announce(self.plan)
        if self.plan.protection.checked and not harden_process().undumpable:
            warnings.warn(
                "the memory of this process can be read by its user: PR_SET_DUMPABLE failed", TsqpWarning, stacklevel=2
            )
        if run.compute.lock_memory:
            lock_memory()  # before there is anything to keep
        elif self.plan.protection.checked and swap_bytes():
            warnings.warn(
                "swap is on, and the memory of this process may be written there: add compute.lock_memory, or encrypt "
                "the swap",
                TsqpWarning,
                stacklevel=2,
            )
        self.stats = Stats()
        self._workers: Supervisor | None = None
        self._started: StartedHere | None = None
        self._adapters = NO_ADAPTERS
        with ExitStack() as stack:
            self.place = place = locate(model)  # where the checkpoint is, on this machine
            self.plan = Plan.of(run, stored_dtype(place))
            if run.guard.pads_empty == "refuse":
                self._prepare_torch()
                self._check_pool(open_checkpoint(place))
            if run.compute.lora:
                self._prepare_torch()
                self._adapters = load_adapters(run.compute.lora, open_checkpoint(place).config)
            places = self._places(place)
            for one in places:
                stack.callback(one.close)
            if self._started is not None:
                self._started.prepare()
            progress("loading libraries")
            self._prepare_torch()
            checkpoint, timings = open_checkpoint(place), Timings(progress)
            if checkpoint.left_out:
                parts = ", ".join(checkpoint.left_out)
                warnings.warn(f"{model}: only what is for text is read, not {parts}", TsqpWarning, stacklevel=2)
            self._engine = self._build_engine(checkpoint, places, stack, timings)
            timings.end()
            reading_s = sum(seconds for what, seconds in timings.seconds.items() if what.startswith("reading"))
            self.read_line = read_line(checkpoint, reading_s)  # what was read here, for a person
            self._adapters = self._adapters.without_numbers()
            if self.guard is not None and self.guard.filler is not None:
                if run.guard.warm_pads:
                    from tsqp.api.pads import fill

                    fill(self.guard.filler, checkpoint.config, pads_progress)
                self.guard.filler.start()
            stack.callback(self._engine.forget)
            self._resources = stack.pop_all()

    @classmethod
    def of(cls, run: RunConfig, **hooks: Any) -> LLM:
        """The same, of a configuration that is one value; ``hooks``: the other arguments."""
        return cls(
            run.model, protection=run.protection, worker=run.worker, guard=run.guard, compute=run.compute, **hooks
        )

    def _places(self, model: str) -> list[Place]:
        """Where workers are to be had, in turn; ``model`` is where the checkpoint is."""
        run = self.plan.run
        if self.plan.partition is None:
            return []
        if run.worker.addresses and is_roster(run.worker.addresses[0]):
            dial = partial(self._dial, pid=None)
            return [worker_roster(run, dial, lambda: open_checkpoint(model).config)]
        if run.worker.addresses:
            return [Standing(address, self._dial) for address in run.worker.addresses]
        self._started = StartedHere(
            lambda: LocalWorker(
                model,
                device=run.worker.device,
                dtype=self.plan.linear_dtype,
                threads=run.compute.threads,
                compiled=run.worker.compiled,
            ),
            self._dial,
            spare=run.worker.spare,
        )
        return [self._started]

    def _dial(self, address: str, pid: int | None, security: ClientKeys | None = None, sharing: int = 1) -> Channel:
        """A channel to a worker, which may still be loading over shm and cuda. Raises ChannelError.

        ``sharing``: see ``fitting_arena``.
        """
        worker, tcp = self.plan.run.worker, address.startswith("tcp://")
        channel = self._connect(
            address,
            security=security or (self._security if tcp else None),
            insecure_plain_tcp=worker.insecure_plain_tcp and tcp and security is None,
            arena_bytes=arena_for(address, worker.arena_bytes, pid, sharing),
            user=self._worker_user if address.startswith(("shm://", "cuda://")) else None,
        )
        return channel if self.taps is None else self.taps.wrap(channel)

    def _new_taps(self) -> Taps:
        """Raises OptionError for a roster, and for any partition but ``linear``."""
        partition = self.plan.partition
        if any(map(is_roster, self.plan.run.worker.addresses)):
            raise OptionError(
                "a tap shows the rows of one worker, and a roster names several: give one worker.address",
                fields=("worker.address",),
            )
        if partition is not None and partition.name != "linear":
            raise OptionError(
                f"a tap shows rows of linear layers: it needs compute.partition linear, not {partition.name}",
                fields=("compute.partition",),
            )
        return Taps(self._checks)

    def _checks(self) -> int:
        """Products that were checked so far."""
        guard = self.guard
        return 0 if guard is None else guard.counted()["products_checked"]

    def _check_pool(self, checkpoint: Checkpoint) -> None:
        from tsqp.api.pads import check_pool

        check_pool(checkpoint.config, self.plan.run.guard)

    def _prepare_torch(self) -> None:
        """Load torch, which takes a second or two: only now, so that a worker started before does it meanwhile."""
        import torch

        compute = self.plan.run.compute
        if compute.compiled_kernels:
            keep_loops(compute.kernel_cache)
        torch.set_num_threads(compute.threads or cores())

    def _build_engine(
        self, checkpoint: Checkpoint, places: list[Place], stack: ExitStack, progress: Progress
    ) -> Engine:
        from tsqp.api.assemble import build_local_engine
        from tsqp.api.links import SplitLinks
        from tsqp.api.private_links import PrivateLinks
        from tsqp.api.supervisor import Supervisor

        progress("reading the tokenizer")
        self.tokenizer = Tokenizer(checkpoint.text_format())
        ends = self.tokenizer.eos_token_ids
        links: PrivateLinks | SplitLinks
        dealers: RosterPlace | None = None
        if self.plan.partition is None:
            return build_local_engine(
                checkpoint, self.plan, ends, self.stats, stack, self._limits, progress, self._adapters
            )
        if self.plan.protection.checked:
            dial = None
            if self._dealer is not None:
                run, config = self.plan.run, checkpoint.config
                dial, dealers = dialling_dealers(self._dealer, run, self._connect, config, places)
            shards = places[0].shards() if isinstance(places[0], RosterPlace) else ()
            links = PrivateLinks(checkpoint, self.plan, dial, self.stats, progress, self._adapters, shards)
            stack.callback(links.close)
        else:
            links = SplitLinks(checkpoint, self.plan, self.plan.partition, self.stats, progress, self._adapters)
        self._workers = Supervisor(places, links, self.plan.run.worker.patience_s, dealers=dealers)
        stack.callback(self._workers.close)
        return links.engine(self._workers.open(progress).decoder, ends, self._limits, self._workers)

    @property
    def engine(self) -> Engine:
        """What runs requests, and single forward passes for benchmarks."""
        return self._engine

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self._engine.config

    @property
    def most_promised(self) -> int | None:
        """Tokens whose pads can be promised at once, with ``guard.pads_empty`` refuse; None where none are promised."""
        return self._engine.most_promised

    @property
    def adapters(self) -> Mapping[str, str]:
        """The SHA-256 of each adapter that requests may have, by its name."""
        return self._adapters.digests

    def run_digest(self, model_digest: str) -> str:
        """A digest of the model and of the adapters that requests may have: the model's own where there are none."""
        return self._adapters.run_digest(model_digest)

    @property
    def session(self) -> Connection | None:
        """The connection to the worker, or to several; None at ``local``, and while there is no worker."""
        link = self._link
        return None if link is None else link.session

    @property
    def guard(self) -> Guard | None:
        """What checks products, and the pads; None where nothing is checked, and while there is no worker."""
        link = self._link
        return None if link is None else link.guard

    @property
    def _link(self) -> Link | None:
        return None if self._workers is None else self._workers.link

    @property
    def worker_state(self) -> WorkerState | None:
        """Whether there is a worker, how often it was lost, and who was expelled; None at ``local``."""
        return None if self._workers is None else self._workers.state()

    def readmit(self, worker: str) -> None:
        """Ask a worker again that was expelled, by its name in ``worker_state``: for who knows that it is well."""
        if self._workers is not None:
            self._workers.readmit(worker)

    def stop_waiting(self) -> None:
        """Whoever waits for a worker waits no longer, and there is to be no other; any thread may call it."""
        if self._workers is not None:
            self._workers.stop()

    @property
    def dealer(self) -> Dealer | DealerRoster | None:
        """Who makes the pads' products; None where this process does, or there are none."""
        return self._dealer

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker started here."""
        return None if self._started is None else self._started.pid

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        lora: str | None = None,
        **template_args: object,
    ) -> list[Completion]:
        """Answer all prompts together.

        A prompt of text becomes the user's turn of the checkpoint's chat template when it has one; ``template_args``
        are variables of that template, such as ``enable_thinking=False``. No part of the prompt becomes a control
        token, unless ``raw``: then the text is taken as it is, and so are the control tokens written in it. Token ids
        are taken as they are. What answers either goes on with its text; what answers a turn is a text of its own
        (``docs/text.md`` §6). ``lora``: the name of the adapter that answers, one of ``compute.lora``; None: the model
        as it is. Raises PromptError, OptionError and PadsExhausted before anything is sent, NumericError,
        ChannelError.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        batch: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item, assignment]
        completions: dict[int, Completion] = {}
        for index, delta in self._run(batch, params or SamplingParams(), raw, template_args, lora=lora, patient=True):
            if delta.completion is not None:
                completions[index] = delta.completion
        return [completions[index] for index in range(len(batch))]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        lora: str | None = None,
        **template_args: object,
    ) -> Iterator[Delta]:
        """Answer one prompt piece by piece; see ``generate``."""
        for _, delta in self._run([prompt], params or SamplingParams(), raw, template_args, lora=lora):
            yield delta

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        lora: str | None = None,
        **template_args: object,
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece. Nothing in a message becomes a control token.

        A conversation that goes on is not computed again from its beginning, while memory allows.

        ``lora``: see ``generate``. ``template_args`` are variables of the chat template: ``tools`` and ``documents``,
        lists of mappings, and what else it knows. Raises PromptError when the checkpoint has no chat template, or when
        it refuses the conversation.
        """
        tokens = self.tokenizer.encode_chat(messages, **template_args)
        for _, delta in self._run([tokens], params or SamplingParams(), False, {}, lora=lora, salt="", turn=True):
            yield delta

    def logits(self, prompt: Prompt, *, lora: str | None = None) -> torch.Tensor:
        """Logits after every token of a raw prompt, float32 (T, vocab_size)."""
        tokens = self.encode(prompt, raw=True)
        self._refuse_closed()
        return self._engine.logits(tokens, lora)

    def encode(self, prompt: Prompt, *, raw: bool = False, **template_args: object) -> list[int]:
        """The tokens of a prompt, as ``generate`` takes it. Raises PromptError, OptionError."""
        if template_args and (raw or not isinstance(prompt, str)):
            raise OptionError(f"the prompt is not put into a chat template: leave out {', '.join(template_args)}")
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if not prompt.strip():
            raise PromptError("the prompt is empty: give some text")
        return self.tokenizer.encode(prompt) if raw else self.tokenizer.encode_prompt(prompt, **template_args)

    def goes_on(self, prompt: Prompt, *, raw: bool = False, **template_args: object) -> bool:
        """Whether an answer goes on with the text of a prompt, as ``encode`` takes it, or is a turn of its own.

        The first token of a text goes without its space in some vocabularies: in an answer only where it is a turn.
        """
        with_template = bool(template_args) or self.tokenizer.chat_template is not None
        return raw or not isinstance(prompt, str) or not with_template

    def _refuse_closed(self) -> None:
        if self._closed:
            raise model_closed()

    def explained(self, error: ChannelError) -> ChannelError:
        """The error, or a better one where more is known of the worker."""
        return error if self._workers is None else self._workers.explained(error)

    def ping(self) -> None:
        """One round trip to the worker, once no pass is under way; nothing where there is no worker to be.

        Raises any ChannelError, also while a lost worker is waited for.
        """
        if self._workers is not None:
            self._engine.between_passes(self._ping_link)

    def silent_s(self) -> float:
        """Seconds since the worker's last sign of life: a reply, or the end of a pass. 0 where there is no worker."""
        return 0.0 if self._workers is None else time.perf_counter() - self.stats.heard_s

    def _ping_link(self) -> None:
        session = self.session
        if session is None:
            raise WorkerLost("is lost, and another one is waited for")
        session.ping()

    def close(self) -> None:
        """Leave the worker, and stop it if it was started here. What is under way ends. Closing twice is allowed."""
        self._closed = True
        self._resources.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def new_answers(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        go_on: Sequence[bool] | None = None,
        ends: Ends | None = None,
    ) -> list[tuple[Answer, Sampler]]:
        """An answer that has not begun to each prompt, and what chooses its tokens.

        ``go_on``: for each, whether it does so with the text of its prompt; None: no. ``ends``: of the only one.

        Raises PromptError; OptionError for parameters that name tokens which the model has not, InputError for a form
        that is none.
        """
        from tsqp.trusted.engine.oblivious import ObliviousSampler
        from tsqp.trusted.engine.sampling import Sampler

        for prompt in prompts:
            self._engine.check_prompt(prompt)
        kind = ObliviousSampler if self.plan.oblivious else Sampler
        vocab_size, form = self.config.vocab_size, params.structured_outputs
        params.check_vocabulary(vocab_size)
        grammar = None if form is None else self.tokenizer.grammar(form, vocab_size)
        samplers = [kind(params, matcher=None if grammar is None else grammar.matcher()) for _ in prompts]
        return [
            (
                Answer(
                    prompt,
                    TextStream(self.tokenizer, params.stop, after=prompt if goes_on else ()),
                    None if params.logprobs is None else sampler.logprobs,
                    ends,
                ),
                sampler,
            )
            for prompt, sampler, goes_on in zip(prompts, samplers, go_on or [False] * len(prompts), strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        raw: bool,
        template_args: Mapping[str, object],
        *,
        lora: str | None,
        salt: str | None = None,
        patient: bool = False,
        turn: bool = False,
    ) -> Iterator[tuple[int, Delta]]:
        """The pieces of every answer, each with the index of its prompt. ``turn``: the prompts are conversations.

        ``lora``, ``salt``, ``patient``: see ``Engine.add_request``.
        """
        from tsqp.trusted.engine.caller import Caller

        encoded = [self.encode(prompt, raw=raw, **template_args) for prompt in prompts]
        go_on = [not turn and self.goes_on(prompt, raw=raw, **template_args) for prompt in prompts]
        begun = self.new_answers(encoded, params, go_on=go_on)
        self._refuse_closed()
        try:
            with Caller(self._engine) as caller:
                for answer, sampler in begun:
                    caller.add(answer.prompt, params, salt=salt, patient=patient, sampler=sampler, adapter=lora)
                for index, output in caller:
                    self._refuse_closed()
                    delta = begun[index][0].extend(output)
                    if delta.completion is not None:
                        caller.stop(output)
                    yield index, delta
        except WorkerLost as error:
            raise self.explained(error) from None


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Python's integers, of numpy's too. Raises PromptError, which shows none of the prompt."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise PromptError("a prompt is a text or a sequence of token ids, which are integers") from None
