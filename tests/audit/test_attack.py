"""The attacks read captures in clear and, from masked ones, no more than from noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.arith.expand import BLOCK_ROWS, AesKeyStream, expand
from tsqp.arith.modulus import P
from tsqp.audit.attack import Attack, SequentialInversion, VocabularyMatch, attack_depth, noise_rows
from tsqp.audit.capture import Capture
from tsqp.audit.public_model import PublicModel
from tsqp.audit.view import View
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, MultiplyPads, Product

PROMPT = random_tokens(40, seed=3)
PREFIX = 4  # tokens that the attacker knows
FAMILIES = ["llama", "mistral-window", "qwen3"]


def checkpoint_of(family: str) -> Checkpoint:
    return open_checkpoint(str(tiny_model(family).directory))


@cache
def open_view(family: str) -> View:
    """What a worker sees in clear of one run, which starts it: the same view for every test."""
    capture = Capture()
    directory = str(tiny_model(family).directory)
    with LLM(
        directory, protection="open", compute=ComputeConfig(dtype="float32", threads=1), connect=capture.connect
    ) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
    return View(capture, checkpoint_of(family).config)


def product_view(family: str, *, masked: bool) -> View:
    """What the worker of a private mode sees, made from the rows in clear by the formulas of docs/masking.md."""
    checkpoint, in_clear = checkpoint_of(family), open_view(family)
    capture = Capture()
    capture.record(Frames(encode(Hello(PROTOCOL_VERSION, "0" * 64, "float32", "field"))))
    pads = np.random.Generator(np.random.PCG64(7))
    for layer in range(checkpoint.config.num_layers):
        x = in_clear.rows(("qkv", layer)).numpy()
        xq = np.rint(x / (np.abs(x).max(axis=1, keepdims=True) / 32_639)).astype(np.int64)
        words = ((xq + pads.integers(0, P, xq.shape)) % P).astype("<u4") if masked else xq.astype("<i2")
        call = Product(layer, "qkv", layer, len(x), 4 if masked else 2)
        capture.record(Frames(encode(call), [memoryview(words.tobytes())]))
    return View(capture, checkpoint.config)


def attacks(family: str) -> list[Attack]:
    checkpoint = checkpoint_of(family)
    model = PublicModel(checkpoint, attack_depth(checkpoint.config))
    assert model.depth == 1
    return [VocabularyMatch(model), SequentialInversion(model, PROMPT[:PREFIX], [1, 2, 3])]


def share(attack: Attack, view: View) -> float:
    return matching(attack.recover(view.rows(("qkv", attack.layer))[PREFIX : len(PROMPT)]))


def matching(tokens: Sequence[int]) -> float:
    assert len(tokens) == len(PROMPT) - PREFIX
    return sum(a == b for a, b in zip(tokens, PROMPT[PREFIX:], strict=True)) / len(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_clear_are_the_prompt(family: str) -> None:
    view = open_view(family)
    assert [share(attack, view) for attack in attacks(family)] == [1.0, 1.0]


def test_integers_in_clear_are_the_prompt() -> None:
    view = product_view("llama", masked=False)
    assert [share(attack, view) for attack in attacks("llama")] == [1.0, 1.0]


def test_masked_rows_are_no_more_than_noise() -> None:
    view = product_view("llama", masked=True)
    one_token = 1 / (len(PROMPT) - PREFIX)
    for attack in attacks("llama"):
        noise = matching(attack.recover(noise_rows(len(PROMPT) - PREFIX, 64)))
        assert share(attack, view) <= noise + one_token
        assert noise <= 4 * one_token


def test_a_dealer_reads_pads() -> None:
    config = checkpoint_of("llama").config
    capture = Capture()
    capture.record(Frames(encode(Hello(PROTOCOL_VERSION, "0" * 64, "float32", "field"))))
    keys = bytes(range(64))
    capture.record(Frames(encode(MultiplyPads(1, "qkv", 0, 2)), [memoryview(keys)]))
    view = View(capture, config)
    pads = np.empty((BLOCK_ROWS, 64), np.uint32)
    expand(AesKeyStream(keys[32:]), pads)
    rows = view.rows(("qkv", 0))
    assert (view.keys, view.calls, rows.shape) == (2, 1, (2 * BLOCK_ROWS, 64))
    signed = pads.astype(np.int64)
    signed[signed > P // 2] -= P
    assert torch.equal(rows[BLOCK_ROWS:], torch.from_numpy(signed.astype(np.float32)))
    assert view.words().modulus == 256
    assert not len(view.rows(("qkv", 1)))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "cohere2"])
def test_the_public_model_is_the_model(family: str) -> None:
    model = PublicModel(checkpoint_of(family), 1)
    seen = torch.nn.functional.normalize(open_view(family).rows(("qkv", 1)), dim=1)
    context = model.read(torch.tensor(PROMPT[:20]))
    wrong = (PROMPT[20] + 1) % 320
    both = model.next_inputs(context, torch.tensor([wrong, PROMPT[20]]))
    torch.testing.assert_close(both[1], seen[20], rtol=0, atol=1e-5)
    assert not torch.allclose(both[0], seen[20], atol=1e-2)
    model.take(context, 1)
    torch.testing.assert_close(model.next_inputs(context, torch.tensor(PROMPT[21:22]))[0], seen[21], rtol=0, atol=1e-5)
