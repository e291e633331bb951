"""What the guard holds of one linear group: its scales, its bound on activations, its check vectors.

Covers: no sum of products can leave the range of the field (test_weights.py); check vectors are fresh for
every connection, uniform and overwritten at the end (test_hostile.py). Does not cover: whether these are
the weights the user meant; ``--model-digest`` does. Assumes: weights come from this side's own checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tsqp.arith.expand import KEY_BYTES, AesKeyStream, expand
from tsqp.arith.field import MAX_SMALL, Array, FieldWeights
from tsqp.arith.loops import row_sums
from tsqp.arith.modulus import MAX_CENTRED, P
from tsqp.arith.product import DigitKernel
from tsqp.arith.row_threads import row_threads
from tsqp.config.groups import GroupKey
from tsqp.errors import ProductMismatch, ReplyRangeError, UnsupportedModel
from tsqp.trusted.guard import kernels

LEAST_LIMIT = 127  # 8 bits


@dataclass(frozen=True, repr=False)
class GuardedGroup:
    """One group with N = out_features, K = in_features.

    ``limit``: activations are integers within ±limit. ``scales``, ``bias`` float32 (N,). ``check_vectors`` uint32
    (k, N), ``projections`` uint32 (k, K): check_vectors · Wq mod p. ``weights``: Wq, None where a dealer multiplies.
    """

    key: GroupKey
    limit: int
    scales: Array
    bias: Array
    check_vectors: Array
    projections: Array
    weights: FieldWeights | None

    @classmethod
    def of(
        cls,
        key: GroupKey,
        wq: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        kernel: DigitKernel,
        *,
        checks: int,
        keep_weights: bool,
    ) -> GuardedGroup:
        """From Wq int8 (N, K), scales and bias float32 (N,). Raises UnsupportedModel.

        ``checks``: check vectors; ``keep_weights``: whether this side is to multiply by Wq.
        """
        check_vectors = np.empty((checks, len(wq)), np.uint32)
        expand(AesKeyStream(os.urandom(KEY_BYTES)), check_vectors)
        projections = np.empty((checks, wq.shape[1]), np.uint32)
        row_threads().run(kernels.project_weights, checks, wq.numpy(), check_vectors, projections, least=2)
        limit, bias = activation_limit(key, wq), torch.zeros(len(wq)) if bias is None else bias
        weights = FieldWeights.of(wq, kernel) if keep_weights else None
        return cls(key, limit, scales.numpy(), bias.numpy(), check_vectors, projections, weights)

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
        sums = [np.empty((len(x), len(self.check_vectors)), np.uint32) for _ in range(2)]
        for values, vectors, out in ((x, self.projections, sums[0]), (y, self.check_vectors, sums[1])):
            row_threads().run(kernels.project, len(x), values, vectors, out, least=2)
        if not (sums[0] == sums[1]).all():
            raise ProductMismatch("products of pads are wrong: whoever made them cheats, or is broken")

    def forget(self) -> None:
        """Overwrite the check vectors with ones that nobody knows and that do not belong together: no check passes."""
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
        name = key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
        raise UnsupportedModel(
            f"the weights of {name} leave {limit} levels for activations, private modes need {LEAST_LIMIT}: "
            "use protection open or local"
        )
    return limit
