"""What an onlooker sees of one answer is what an audit finds of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.api.mortal import MortalRecorder, living, plain_worker
from tests.families import tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.audit.attack import VocabularyMatch, noise_rows
from tsqp.audit.capture import Capture
from tsqp.audit.onlooker import PICTURE_BYTES, Look, Onlooker
from tsqp.audit.prompt import AuditPrompt, audit_prompt
from tsqp.audit.public_model import PublicModel
from tsqp.audit.report import Attacker, Exposure
from tsqp.audit.uniformity import chi_square_p
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.trusted.tap import Tap, Taps
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Product

MODEL = str(tiny_model("llama").directory)
TEXT = "attack at dawn, and say nothing"
PRIVATE: tuple[ProtectionName, ...] = ("verified", "masked")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(MODEL)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.text_format())


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> AuditPrompt:
    return audit_prompt(tokenizer, TEXT)


@pytest.fixture(scope="module")
def attacker(checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: AuditPrompt) -> Attacker:
    return Attacker(checkpoint, tokenizer, prompt)


@contextmanager
def opened(mode: ProtectionName, capture: Capture) -> Iterator[LLM]:
    """A model with taps, all of whose line is captured on its own as well."""
    mortal = plain_worker(model=MODEL) if mode == "open" else MortalRecorder(model=MODEL)
    with (
        living(mortal) as address,
        LLM(
            MODEL,
            protection=mode,
            worker=address,
            guard=GuardConfig(pads_ahead=0) if mode == "masked" else None,
            compute=ComputeConfig(dtype="float32" if mode == "open" else "auto", threads=1),
            connect=capture.connect,
            taps=True,
        ) as llm,
    ):
        yield llm


def answered(mode: ProtectionName, prompt: AuditPrompt, keep_bytes: int = 1 << 24) -> tuple[Tap, Capture]:
    """One answer, as a tap has it and as a capture of the same line."""
    capture = Capture()
    with opened(mode, capture) as llm:
        assert llm.taps is not None
        tap = llm.taps.new(range(prompt.user.start, prompt.user.stop), keep_bytes)
        llm.engine.add_request(prompt.ids, SamplingParams(max_tokens=8, ignore_eos=True), tap=tap)
        while llm.engine.has_work():
            llm.engine.step()
    return tap, capture


@pytest.mark.parametrize("mode", ["open", *PRIVATE])
def test_the_numbers_are_those_of_an_audit_of_the_same_answer(
    mode: ProtectionName, checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: AuditPrompt, attacker: Attacker
) -> None:
    tap, capture = answered(mode, prompt)
    found: Exposure = attacker.examine(capture)
    look: Look = Onlooker(checkpoint, tokenizer).look(tap, prompt.user_ids)
    recovery = found.recoveries[0]
    assert look.uniformity_p == found.uniformity_p
    assert look.recovered_text == recovery.recovered_text
    assert look.recovered_fraction == recovery.recovered_fraction
    assert look.noise_fraction == recovery.noise_fraction
    assert tap.calls == found.calls
    assert tap.bytes_seen == found.bytes_seen - len(encode(capture.messages[0].message))
    if mode == "masked":
        assert look.recovered_text != TEXT
        assert look.recovered_fraction <= look.noise_fraction + 1 / len(prompt.user_ids)
        assert found.uniformity_p > 1e-6
    else:
        assert (look.recovered_text, look.recovered_fraction) == (TEXT, 1.0)
        assert found.uniformity_p < 1e-9
    uneven = chi_square_p(look.picture.counts, look.picture.expected)
    assert uneven > 1e-6 if mode == "masked" else uneven < 1e-9
    assert look.picture.counts.sum() == sum(view_words(tap))


def view_words(tap: Tap) -> list[int]:
    """How many words each kept payload has."""
    size = {"verified": 2, "masked": 4, "open": 4}
    digits = [seen.message.digits for seen in tap.messages if isinstance(seen.message, Product)]
    item = size["open"] if not digits else {2: size["verified"], 4: size["masked"]}[digits[0]]
    return [len(payload) // item for seen in tap.messages for payload in seen.payloads or ()]


@pytest.mark.parametrize("keep_bytes", [0, 9_000])
def test_the_users_rows_are_attacked_whatever_else_was_kept(
    keep_bytes: int, checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: AuditPrompt
) -> None:
    tap, _ = answered("verified", prompt, keep_bytes)
    look = Onlooker(checkpoint, tokenizer).look(tap, prompt.user_ids)
    assert (look.recovered_text, look.recovered_fraction) == (TEXT, 1.0)
    assert look.picture.width == 64
    rows = len(prompt.ids) + 1 if keep_bytes else len(prompt.user_ids)  # the step after the prompt just fits as well
    assert len(look.picture.pixels) == rows * 64
    assert (look.uniformity_p is None) == (keep_bytes == 0)
    assert tap.kept_bytes <= keep_bytes < tap.bytes_seen


def test_a_picture_is_the_highest_bits_row_by_row(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    taps = Taps()
    tap = taps.new()
    generator = np.random.default_rng(1)
    sent = generator.integers(0, 2**31 - 1, (1_100, 64), dtype=np.uint32)
    hello = encode(Hello(PROTOCOL_VERSION, "0" * 64, "float32", "field"))
    with tap.listening(0):
        for first, layer in ((0, 0), (0, 1), (700, 0)):
            rows = sent[first : first + 700]
            call = encode(Product(1, "qkv", layer, len(rows), 4))
            tap.record(Frames(call, [memoryview(rows.astype("<u4").tobytes())]), hello)
    picture = Onlooker(checkpoint, tokenizer).look(tap, ()).picture
    shown = PICTURE_BYTES // 64
    assert picture.pixels == (sent[:shown] >> 23).astype(np.uint8).tobytes()
    assert (picture.width, picture.counts.sum()) == (64, (700 + 1_100) * 64)
    assert picture.expected.sum() == pytest.approx(1.0)
    assert picture.expected[255] < picture.expected[0]


def test_nothing_sent_is_nothing_seen(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    look = Onlooker(checkpoint, tokenizer).look(Taps().new(range(3)), (1, 2, 3))
    assert (look.uniformity_p, look.recovered_text, look.recovered_fraction, look.noise_fraction) == (None, "", 0, 0)
    assert (look.picture.pixels, look.picture.counts.sum(), len(look.picture.expected)) == (b"", 0, 256)


def test_block_by_block_is_the_whole_table(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PublicModel(checkpoint, 0)
    ((first, table),) = model.first_inputs()
    rows = torch.cat((noise_rows(150, 64), 3 * table[[0, 63, 64, 319]]))
    expected = (rows @ table.T).argmax(dim=1).tolist()
    assert (first, expected[-4:]) == (0, [0, 63, 64, 319])
    for size in (1, 64, 100):
        monkeypatch.setattr("tsqp.audit.public_model.BLOCK_TOKENS", size)
        assert VocabularyMatch(model).recover(rows) == expected
