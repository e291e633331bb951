"""The secrets of a private run as the bytes that they would be in memory that a worker reads."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tsqp.arith.expand import expand
from tsqp.arith.modulus import P
from tsqp.trusted.guard import kernels, pads, pool

Array = np.ndarray[Any, np.dtype[Any]]


def forms(row: Array) -> list[bytes]:
    """A row of integers in every form that it might lie there."""
    return [row.astype(item).tobytes() for item in (np.int16, np.int32, np.float32)] + [
        (row % P).astype("<u4").tobytes()
    ]


def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Every row of every secret of a call from now on, by name; and of what is sent."""
    found: dict[str, list[bytes]] = defaultdict(list)
    real_mask, real_unmask, real_supply = kernels.quantise_and_mask, kernels.verify_and_unmask, pads.PadBlock.supply

    def send(
        x: Array, limit: Any, projections: Array, masked: bool, r: Array, out: Array, scales: Array, *rest: Any
    ) -> None:
        real_mask(x, limit, projections, masked, r, out, scales, *rest)
        x, out, scales = (one[slice(*rest[-2:])] for one in (x, out, scales))
        digits = np.clip(np.round(x / scales[:, None]), -limit, limit).astype(np.int64)
        found["xq"] += [form for row in digits for form in forms(row)]
        found["x"] += [row.tobytes() for row in x]
        found["check vectors"] += [row.tobytes() for row in projections]
        if len(scales) > 1:  # one float32 may be anywhere by chance
            found["scales"].append(scales.tobytes())
        found["sent"] += [row.tobytes() for row in out]

    def accept(
        reply: Array, check_vectors: Array, sums: Array, bounds: Array, masked: bool, products: Array, *rest: Any
    ) -> None:
        product = (reply.astype(np.int64) - (products.astype(np.int64) if masked else 0)) % P
        real_unmask(reply, check_vectors, sums, bounds, masked, products, *rest)
        found["check vectors"] += [row.tobytes() for row in check_vectors]
        found["product"] += [row.astype(np.uint32).tobytes() for row in product]

    def expand_and_record(stream: Any, out: Array) -> None:
        expand(stream, out)
        found["pads"] += [row.tobytes() for row in out]

    def supply(block: Any, products: Array) -> None:
        found["products of pads"] += [row.tobytes() for row in products]
        found["keys"].append(bytes(block._key))
        real_supply(block, products)

    for owner, name, with_record in (
        (kernels, "quantise_and_mask", send),
        (kernels, "verify_and_unmask", accept),
        (pads, "expand", expand_and_record),
        (pool, "expand", expand_and_record),
        (pads.PadBlock, "supply", supply),
    ):
        monkeypatch.setattr(owner, name, with_record)
    return found
