"""The Python API: what is asked of an open model, from prompts to answers."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from tsqp.api.answer import Answer, Completion, Delta, Ends
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.dealer import Connect
from tsqp.api.open_model import OpenModel
from tsqp.api.plan import Plan
from tsqp.config.protection import ProtectionName
from tsqp.errors import OptionError, PromptError, WorkerLost, model_closed
from tsqp.progress import Progress, unseen
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.text.conversation import Messages
from tsqp.trusted.text.tokenizer import TextStream
from tsqp.wire.transport import connect as connect_to

if TYPE_CHECKING:
    import torch

    from tsqp.api.pads import Filling
    from tsqp.trusted.engine.limits import Limits
    from tsqp.trusted.engine.sampling import Sampler

Prompt = str | Sequence[int]


class LLM(OpenModel):
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
        run = RunConfig(model, protection, worker or WorkerConfig(), guard or GuardConfig(), compute or ComputeConfig())
        super().__init__(run, connect, announce, pads_progress, progress, limits, taps)

    @classmethod
    def of(cls, run: RunConfig, **hooks: Any) -> LLM:
        """The same, of a configuration that is one value; ``hooks``: the other arguments."""
        return cls(
            run.model, protection=run.protection, worker=run.worker, guard=run.guard, compute=run.compute, **hooks
        )

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
        encoded = [self.encode(prompt, raw=raw, **template_args) for prompt in batch]
        go_on = [self.goes_on(prompt, raw=raw, **template_args) for prompt in batch]
        for index, delta in self._run(encoded, go_on, params or SamplingParams(), lora=lora, patient=True):
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
        tokens = self.encode(prompt, raw=raw, **template_args)
        goes_on = self.goes_on(prompt, raw=raw, **template_args)
        for _, delta in self._run([tokens], [goes_on], params or SamplingParams(), lora=lora):
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
        for _, delta in self._run([tokens], [False], params or SamplingParams(), lora=lora, salt=""):
            yield delta

    def logits(self, prompt: Prompt, *, lora: str | None = None) -> torch.Tensor:
        """Logits after every token of a raw prompt, float32 (T, vocab_size)."""
        tokens = self.encode(prompt, raw=True)
        self._refuse_closed()
        return self.engine.logits(tokens, lora)

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
        return raw or not isinstance(prompt, str) or not self.tokenizer.makes_turns(template_args)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise model_closed()

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
            self.engine.check_prompt(prompt)
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
        prompts: Sequence[list[int]],
        go_on: Sequence[bool],
        params: SamplingParams,
        *,
        lora: str | None,
        salt: str | None = None,
        patient: bool = False,
    ) -> Iterator[tuple[int, Delta]]:
        """The pieces of every answer, each with the index of its prompt. For the rest see ``Engine.add_request``."""
        from tsqp.trusted.engine.caller import Caller

        begun = self.new_answers(prompts, params, go_on=go_on)
        self._refuse_closed()
        try:
            with Caller(self.engine) as caller:
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
