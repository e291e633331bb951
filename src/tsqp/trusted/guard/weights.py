"""What the guard holds of one linear group: its scales, its bound on activations, its check vectors.

Covers: no sum of products can leave the range of the field (test_weights.py); check vectors are fresh for
every connection, uniform and overwritten at the end (test_hostile.py). Does not cover: whether these are
the weights the user meant; ``--model-digest`` does. Assumes: weights come from this side's own checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tsqp.arith.expand import KEY_BYTES, AesKeyStream, expand
from tsqp.arith.field import MAX_SMALL, Array, FieldWeights
from tsqp.arith.loops import row_sums
from tsqp.arith.modulus import MAX_CENTRED, P
from tsqp.arith.product import DigitKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.arith.row_threads import row_threads
from tsqp.arith.secret_memory import secret_array
from tsqp.config.groups import GroupKey, group_label
from tsqp.errors import ProductMismatch, ReplyRangeError, UnsupportedModel
from tsqp.trusted.guard import kernels

LEAST_LIMIT = 127  # 8 bits


@dataclass(frozen=True, repr=False)
class GuardedGroup:
    """One group with N = out_features, K = in_features.

    ``limit``: activations are integers within ±limit. ``scales``, ``bias`` float32 (N,). ``bounds`` int64 (s + 1,):
    the s slices of the N features that workers send, each checked by itself. ``check_vectors`` uint32 (k, N), and
    ``projections`` uint32 (s·k, K): of each slice, check_vectors · Wq mod p over its features alone. ``weights``: Wq,
    None where a dealer multiplies.
    """

    key: GroupKey
    limit: int
    scales: Array
    bias: Array
    check_vectors: Array
    bounds: Array
    projections: Array
    weights: FieldWeights | None

    @classmethod
    def of(
        cls, key: GroupKey, weights: Int8Weights, kernel: DigitKernel | None, *, checks: int, slices: Sequence[int] = ()
    ) -> GuardedGroup:
        """Raises UnsupportedModel.

        ``kernel``: multiplies pads by Wq, None where a dealer does; ``checks``: check vectors; ``slices``: where each
        slice ends, but for the last one, which ends at N.
        """
        wq, scales, bias = weights
        vectors, bounds = secret_array((checks, len(wq))), np.array([0, *slices, len(wq)], np.int64)
        expand(AesKeyStream(os.urandom(KEY_BYTES)), vectors)
        projections = secret_array(((len(slices) + 1) * checks, wq.shape[1]))
        row_threads().run(kernels.project_weights, len(projections), wq.numpy(), vectors, bounds, projections, least=2)
        limit, bias = activation_limit(key, wq), torch.zeros(len(wq)) if bias is None else bias
        kept = None if kernel is None else FieldWeights.of(wq, kernel)
        return cls(key, limit, scales.numpy(), bias.numpy(), vectors, bounds, projections, kept)

    @property
    def in_features(self) -> int:
        return int(self.projections.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.check_vectors.shape[1])

    def check_products(self, x: Array, y: Array) -> None:
        """Freivalds' check of pads' products y = x·Wqᵀ mod p: x uint32 (T, K), y uint32 (T, N), both private memory.

        Raises ReplyRangeError, ProductMismatch.
        """
        if not (y < P).all():
            raise ReplyRangeError("products of pads are out of range: whoever made them cheats, or is broken")
        expected, found = (np.empty((len(x), len(one)), np.uint32) for one in (self.projections, self.check_vectors))
        row_threads().run(kernels.project, len(x), x, self.projections, expected, least=2)
        row_threads().run(kernels.project, len(x), y, self.check_vectors, found, least=2)
        # One party has made all of y: the sum over its slices is what there is to be found.
        if not (expected.reshape(len(x), -1, found.shape[1]).sum(1) % P == found).all():
            raise ProductMismatch("products of pads are wrong: whoever made them cheats, or is broken")

    def forget(self) -> None:
        """Overwrite the check vectors with ones that nobody knows and that do not belong together.

        Nothing passes then but zeros for numbers whose sum is 0 mod p; and the line is dead by now.
        """
        # Not with zeros: x·0 = y·0 would accept everything.
        expand(AesKeyStream(os.urandom(KEY_BYTES)), self.check_vectors)
        self.projections.fill(1)


Groups = Mapping[GroupKey, GuardedGroup]


def activation_limit(key: GroupKey, wq: torch.Tensor) -> int:
    """q_max: with activations within it no product leaves ±(p − 1)/2. Raises UnsupportedModel below 8 bits."""
    sums, norms = np.empty((2, len(wq)), np.int32)
    row_threads().run(row_sums, len(wq), wq.numpy(), sums, norms, least=2)
    limit = min(MAX_SMALL, MAX_CENTRED // max(1, int(norms.max())))
    if limit < LEAST_LIMIT:
        raise UnsupportedModel(
            f"the weights of {group_label(key)} leave {limit} levels for activations, private modes need "
            f"{LEAST_LIMIT}: use protection open or local"
        )
    return limit
