"""What crosses the line in ``masked`` says how many tokens there are, and nothing else about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.adapters import write_adapter
from tests.dialling import dialling
from tests.families import random_tokens, tiny_model
from tests.trusted.guard.hostile import serve
from tests.trusted.guard.recorder import Recorder
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.api.llm import Prompt
from tsqp.arith.modulus import P
from tsqp.audit.uniformity import uniformity_p
from tsqp.audit.view import WordRows
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import group_keys
from tsqp.wire.channel import Channel
from tsqp.wire.codec import decode_reply, decode_to_worker
from tsqp.wire.messages import Done, Hello, Product

MODEL = str(tiny_model("llama-biases").directory)
PROMPT = random_tokens(20)
STEPS = 6


def record(
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    mode: ProtectionName = "masked",
    ahead: int = 64,
    adapters: Sequence[str] = (),
    lora: str | None = None,
) -> Recorder:
    """One answer, and all that it sent. ``adapters``: of the run; ``lora``: the one that answers."""
    recorders: list[Recorder] = []

    def wrap(channel: Channel) -> Recorder:
        recorders.append(Recorder(channel))
        return recorders[0]

    guard = GuardConfig(pads_ahead=ahead) if mode == "masked" else None
    with (
        serve(MODEL) as (_, address),
        LLM(
            MODEL,
            protection=mode,
            worker=address,
            guard=guard,
            compute=ComputeConfig(lora=tuple(adapters)),
            connect=dialling(wrap),
        ) as llm,
    ):
        completion = llm.generate([prompt], params or SamplingParams(max_tokens=STEPS), raw=True, lora=lora)[0]
    assert len(completion.token_ids) == STEPS
    return recorders[0]


SAMPLING = {
    "temperature": SamplingParams(max_tokens=STEPS, temperature=1.7, seed=3),
    "another seed": SamplingParams(max_tokens=STEPS, temperature=1.7, seed=123456789),
    "narrow": SamplingParams(max_tokens=STEPS, temperature=0.5, top_k=7, top_p=0.4, min_p=0.1, seed=1),
    "penalty": SamplingParams(max_tokens=STEPS, repetition_penalty=3.0),
    "stop": SamplingParams(max_tokens=STEPS, stop=("a string that never comes",), stop_token_ids=(318,)),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_changes_nothing_that_is_sent(name: str) -> None:
    assert record(PROMPT, SAMPLING[name]).sent == record(PROMPT).sent


@pytest.mark.parametrize("other", [random_tokens(20, seed=9), [0] * 20, [319] * 20], ids=["noise", "zeros", "last"])
def test_other_tokens_send_the_same_messages(other: list[int]) -> None:
    first, second = record(PROMPT), record(other)
    assert first.sent == second.sent
    assert [sizes for _, sizes in first.received] == [sizes for _, sizes in second.received]


def test_other_text_of_as_many_tokens_sends_the_same_messages() -> None:
    short, long = "éééé", "abcdefgh"  # a token is a byte
    assert len(short) != len(long)
    assert record(short).sent == record(long).sent


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_adapter(tmp_path_factory.mktemp("private") / "adapter", tiny_model("llama-biases"), rank=16))


@pytest.mark.parametrize("lora", [None, "adapter"], ids=["loaded", "used"])
def test_an_adapter_changes_nothing_that_is_sent(adapter: str, lora: str | None) -> None:
    """Calls, their order, their sizes and every control frame; what is in the payloads is noise as before."""
    bare, own = record(PROMPT), record(PROMPT, adapters=[adapter], lora=lora)
    assert own.sent == bare.sent
    assert [sizes for _, sizes in own.received] == [sizes for _, sizes in bare.received]
    words = np.frombuffer(b"".join(own.payloads), np.uint32).reshape(-1, 32)
    assert uniformity_p(WordRows([words], P)) > 1e-6


def test_where_rows_are_in_clear_an_adapter_shows_in_them(adapter: str) -> None:
    """So that the test above could fail: in ``verified`` later rows are of other activations. Sizes are the same."""
    bare, own = record(PROMPT, mode="verified"), record(PROMPT, mode="verified", adapters=[adapter], lora="adapter")
    assert own.sent == bare.sent
    assert own.payloads[0] == bare.payloads[0]  # the first product has the input of the plain model
    assert all(ours != theirs for ours, theirs in zip(own.payloads[1:], bare.payloads[1:], strict=True))
    assert record(PROMPT, mode="verified", adapters=[adapter]).payloads == bare.payloads


def test_more_tokens_do_send_other_messages() -> None:
    """So that the tests above could fail."""
    assert record(PROMPT).sent != record(PROMPT[:-1]).sent


@pytest.mark.parametrize("ahead", [0, 1000])
def test_what_is_kept_ahead_does_not_show(ahead: int) -> None:
    assert record(PROMPT, ahead=ahead).sent == record(PROMPT).sent


def test_the_same_prompt_is_other_noise_each_time() -> None:
    first, second = record(PROMPT), record(PROMPT)
    assert len(first.payloads) == len(second.payloads) == (4 * 2 + 1) * STEPS
    assert not set(first.payloads) & set(second.payloads)
    assert record(PROMPT, mode="verified").payloads == record(PROMPT, mode="verified").payloads


def test_a_call_is_its_id_group_layer_rows_and_digits() -> None:
    recorder = record(PROMPT)
    hello, *calls = [decode_to_worker(control) for control, _, _ in recorder.sent]
    assert isinstance(hello, Hello)
    assert Hello.__struct_fields__ == ("version", "fingerprint", "wire_dtype", "path")
    assert Product.__struct_fields__ == ("id", "group", "layer", "rows", "digits")
    groups = group_keys(open_checkpoint(MODEL).config)
    rows = [len(PROMPT)] * 8 + [1] * (1 + 9 * (STEPS - 1))  # the LM head is asked for the last row only
    for number, call in enumerate(calls):
        name, layer = groups[number % len(groups)]
        assert call == Product(number + 1, name, layer, rows[number], 4)
    assert len(calls) == len(groups) * STEPS


def test_payloads_are_four_bytes_a_number() -> None:
    recorder = record(PROMPT)
    spec_inputs = {"qkv": 64, "o": 64, "gate_up": 64, "down": 96, "lm_head": 64}
    outputs = {"qkv": 128, "o": 64, "gate_up": 192, "down": 64, "lm_head": 320}
    for control, sizes, reply in recorder.sent[1:]:
        call = decode_to_worker(control)
        assert isinstance(call, Product)
        assert sizes == (4 * call.rows * spec_inputs[call.group],)
        assert reply == 4 * call.rows * outputs[call.group]


def test_replies_are_a_time_of_the_worker_and_the_product() -> None:
    recorder = record(PROMPT)
    replies = [decode_reply(control) for control, _ in recorder.received[1:]]
    assert all(isinstance(reply, Done) for reply in replies)
    assert Done.__struct_fields__ == ("id", "busy_ns")
    assert [reply.id for reply in replies] == list(range(1, len(replies) + 1))
    assert [sizes for _, sizes in recorder.received[1:]] == [(reply,) for _, _, reply in recorder.sent[1:]]
