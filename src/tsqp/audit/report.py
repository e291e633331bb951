"""What an audit finds, for a person and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsqp.audit.attack import (
    Attack,
    SequentialInversion,
    VocabularyMatch,
    attack_depth,
    noise_rows,
)
from tsqp.audit.capture import Capture, Captured
from tsqp.audit.prompt import AuditPrompt
from tsqp.audit.public_model import PublicModel
from tsqp.audit.uniformity import uniformity_p
from tsqp.audit.view import View
from tsqp.checkpoint.base import Checkpoint
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.wire.printable import printable

LEGEND = (
    "uniformity p: how often uniform noise looks at least this uneven; below 10^-6 the bytes are not noise",
    "recovered: the share of the prompt's tokens that an attack puts in their places; of noise: the same for fresh "
    "noise. Where they are alike, nothing was recovered",
)
LIKELY_TEXT = "This is a text, and it goes on like this: "


@dataclass(frozen=True)
class Recovery:
    """What one attack makes of a view: the share of the user's tokens at their places, and the text it reads.

    ``noise_fraction``: what the same attack makes of fresh noise. The fractions are 0 to 1.
    """

    attack: str
    layer: int
    recovered_fraction: float
    recovered_text: str
    noise_fraction: float


@dataclass(frozen=True)
class Exposure:
    """What one receiver could learn. ``keys``: pads that it was given the keys of, 16 rows each; a dealer's only."""

    bytes_seen: int
    calls: int
    keys: int
    uniformity_p: float
    recoveries: tuple[Recovery, ...]


@dataclass(frozen=True)
class ModeReport:
    """One protection: the worker's view, and the dealer's where there was one."""

    protection: str
    worker: Exposure
    dealer: Exposure | None = None

    def as_dict(self) -> dict[str, object]:
        """The first attack flat, the deeper one and the dealer's view beside it."""
        first, *deeper = (asdict(recovery) for recovery in self.worker.recoveries)
        return {
            "protection": self.protection,
            **first,
            "uniformity_p": self.worker.uniformity_p,
            "bytes_seen": self.worker.bytes_seen,
            "calls": self.worker.calls,
            "deeper": deeper,
            "dealer": None if self.dealer is None else asdict(self.dealer),
        }


class Attacker:
    """Somebody with the public checkpoint and all attacks, who knows the chat template but not the prompt."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: AuditPrompt) -> None:
        self._config = checkpoint.config
        self._tokenizer = tokenizer
        self._prompt = prompt
        model = PublicModel(checkpoint, attack_depth(checkpoint.config))
        likely = tokenizer.encode(LIKELY_TEXT)
        self._attacks: tuple[Attack, ...] = (
            VocabularyMatch(model),
            SequentialInversion(model, prompt.prefix, likely),
        )
        noise = noise_rows(len(prompt.user_ids), self._config.hidden_size)
        self._of_noise = [self._fraction(attack.recover(noise)) for attack in self._attacks]

    def report(self, protection: str, captured: Captured) -> ModeReport:
        """What each receiver of one run could learn."""
        dealer = None if captured.dealer is None else self.examine(captured.dealer)
        return ModeReport(protection, self.examine(captured.worker), dealer)

    def examine(self, capture: Capture) -> Exposure:
        """Run every attack and the test of uniformity on what one receiver saw."""
        view = View(capture, self._config)
        recoveries = (
            self._recovery(attack, view.rows(("qkv", attack.layer)), of_noise)
            for attack, of_noise in zip(self._attacks, self._of_noise, strict=True)
        )
        return Exposure(view.bytes_seen, view.calls, view.keys, uniformity_p(view.words()), tuple(recoveries))

    def _recovery(self, attack: Attack, rows: torch.Tensor, of_noise: float) -> Recovery:
        tokens = attack.recover(rows[self._prompt.user])
        return Recovery(attack.name, attack.layer, self._fraction(tokens), self._tokenizer.decode(tokens), of_noise)

    def _fraction(self, tokens: Sequence[int]) -> float:
        """The share of the user's tokens that are right; a dealer may have seen fewer rows than there are tokens."""
        wanted = self._prompt.user_ids
        return sum(a == b for a, b in zip(tokens, wanted, strict=False)) / len(wanted)


def print_report(reports: Sequence[ModeReport], console: Console) -> None:
    """A table for each receiver of each mode, and how to read them."""
    for report in reports:
        console.print(_table(f"{report.protection}, the worker", report.worker))
        if report.dealer is not None:
            console.print(_table(f"{report.protection}, the dealer", report.dealer))
    for line in LEGEND:
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def _table(receiver: str, found: Exposure) -> Table:
    keys = f", {found.keys:,} pad keys" if found.keys else ""
    seen = f"{receiver}: {found.bytes_seen:,} bytes in {found.calls:,} calls{keys}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.title = f"{seen}; uniformity p = {found.uniformity_p:.3g}"
    table.add_column("attack")
    table.add_column("layer", justify="right")
    table.add_column("recovered", justify="right")
    table.add_column("of noise", justify="right")
    table.add_column("text", overflow="fold")
    for recovery in found.recoveries:
        shares = (f"{recovery.recovered_fraction:.1%}", f"{recovery.noise_fraction:.1%}")
        # As Text: what is recovered is no markup, whatever it looks like.
        table.add_row(recovery.attack, f"{recovery.layer}", *shares, Text(printable(recovery.recovered_text)))
    return table
