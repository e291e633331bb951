"""From captured rows back to text, by somebody who has the public checkpoint and knows the chat template.

Both attacks take rows (n, hidden_size) that are the input of a layer's qkv product for consecutive tokens, up to any
positive scale of each row, and give n token ids: right or wrong, there is always an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from tsqp.arith.modulus import P
from tsqp.audit.public_model import PublicModel
from tsqp.audit.view import centred
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig

SHORTLIST = 64
MAX_DEPTH = 2
TABLE_PRODUCTS = 1e12  # multiplications that the table of a deep layer may cost: seconds, up to a minute


class Attack(Protocol):
    """``layer``: whose input it reads."""

    name: str
    layer: int

    def recover(self, rows: torch.Tensor) -> list[int]:
        """The tokens that rows (n, hidden_size), float32, are taken for."""


class VocabularyMatch:
    """The nearest token of the vocabulary, by the angle. At layer 0 a row is a token's embedding, normed and scaled."""

    name = "vocabulary match"
    layer = 0

    def __init__(self, model: PublicModel) -> None:
        self._model = model

    def recover(self, rows: torch.Tensor) -> list[int]:
        nearest, tokens = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.int64)
        for first, table in self._model.first_inputs():
            near, index = (rows @ table.T).max(dim=1)
            nearer = near > nearest
            nearest = torch.where(nearer, near, nearest)
            tokens = torch.where(nearer, first + index, tokens)
        return tokens.tolist()


class SequentialInversion:
    """Token by token: of a few likely ones, the one that the model itself turns into the row that was seen.

    With all tokens before it known, a row of any layer is a function of its token alone, which can be tried: SipIt
    (Nikolaou et al. 2025, arXiv:2510.15511, §4). Instead of the whole vocabulary, the ``SHORTLIST`` tokens are tried
    that come nearest after ``prefix``, the public text in front of the prompt.
    """

    name = "sequential inversion"

    def __init__(self, model: PublicModel, prefix: Sequence[int], likely: Sequence[int]) -> None:
        """``likely`` stands in for an empty prefix when tokens are listed: any text of some tokens."""
        self.layer = model.depth
        self._model = model
        self._prefix = torch.tensor(prefix, dtype=torch.int64)
        context = self._prefix if len(prefix) else torch.tensor(likely, dtype=torch.int64)
        self._table = model.deep_inputs(model.read(context))

    def recover(self, rows: torch.Tensor) -> list[int]:
        rows = F.normalize(rows, dim=1)
        near = (rows @ self._table.T).topk(min(SHORTLIST, len(self._table)), dim=1).indices
        context = self._model.read(self._prefix)
        tokens = []
        for row, candidates in zip(rows, near, strict=True):
            best = int((self._model.next_inputs(context, candidates) @ row).argmax())
            self._model.take(context, best)
            tokens.append(int(candidates[best]))
        return tokens


def attack_depth(config: ModelConfig) -> int:
    """A deeper layer whose table can be made in the time of an audit."""
    weights = sum(group.in_features * group.out_features for group in linear_groups(config).values())
    layer = weights - config.hidden_size * config.vocab_size  # without the LM head
    affordable = int(TABLE_PRODUCTS / (layer * config.vocab_size))
    return min(max(1, affordable), MAX_DEPTH, config.num_layers - 1)


def noise_rows(rows: int, columns: int) -> torch.Tensor:
    """Uniform elements of F_p, centred: what an attack makes of these is guessing. The same ones each time."""
    generator = np.random.Generator(np.random.PCG64(0))
    return centred(generator.integers(0, P, (rows, columns), dtype=np.uint32))
