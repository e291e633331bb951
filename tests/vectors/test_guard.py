"""The guard's compiled loops against the vectors, which are of the formulas and not of these loops."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch

from tests.vectors import make
from tsqp.arith.modulus import P
from tsqp.errors import UnsupportedModel
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.pads import Ratchet
from tsqp.trusted.guard.weights import activation_limit

Array = np.ndarray[Any, np.dtype[Any]]
VECTORS: dict[str, list[dict[str, Any]]] = json.loads(make.FILE.read_text())
NO_PADS = np.empty((16, 0), np.uint32)
VERDICTS = {kernels.OK: "accept", kernels.MISMATCH: "ProductMismatch", kernels.OUT_OF_RANGE: "ReplyRangeError"}


def cases(section: str, **given: object) -> list[Any]:
    """Those of a section whose inputs are these."""
    return [
        pytest.param(case["in"], case["out"], id=str(number))
        for number, case in enumerate(VECTORS[section])
        if all(case["in"][name] == value for name, value in given.items())
    ]


def floats(texts: Any) -> Array:
    """Nested lists of hex, as float32."""
    return np.array(np.vectorize(lambda text: struct.unpack(">f", bytes.fromhex(text))[0], otypes=[np.float32])(texts))


def outputs(rows: int, projections: Array) -> tuple[Array, Array, Array]:
    """Scales, expected sums and verdicts, for a loop to write."""
    unseen = np.full(rows, kernels.UNSEEN, np.uint8)
    return np.empty(rows, np.float32), np.empty((rows, len(projections)), np.uint32), unseen


@pytest.mark.parametrize(("given", "expected"), [*cases("quantise", levels=127), *cases("quantise", levels=32_639)])
def test_activations(given: dict[str, Any], expected: dict[str, Any]) -> None:
    x = floats(given["x"])
    out, projections = np.empty(x.shape, np.int16), np.ones((1, x.shape[1]), np.uint32)
    scales, sums, verdicts = outputs(len(x), projections)
    limit = np.float32(given["levels"])
    kernels.quantise_and_mask(x, limit, projections, False, NO_PADS, out, scales, sums, verdicts, 0, len(x))
    assert out.tolist() == expected["digits"]
    assert make.hexes(scales) == expected["scales"]
    assert sums[:, 0].tolist() == (np.array(expected["digits"]).sum(axis=1) % P).tolist()
    assert set(verdicts) == {kernels.OK}


@pytest.mark.parametrize(("given", "expected"), cases("limit"))
def test_limit(given: dict[str, Any], expected: dict[str, Any]) -> None:
    whole, rest = divmod(given["norm"], 127)
    wq = torch.tensor([[127] * whole + [rest]], dtype=torch.int8)  # a row of that norm
    if expected["refused"]:
        with pytest.raises(UnsupportedModel, match="lm_head"):
            activation_limit(("lm_head", None), wq)
    else:
        assert activation_limit(("lm_head", None), wq) == expected["q_max"]


@pytest.mark.parametrize(("given", "expected"), cases("masked"))
def test_masked_row_there_and_back(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """The activations are the digits themselves: their largest is the limit, so that the scale is 1."""
    x = np.array(given["xq"], np.float32)
    limit, pads = np.float32(np.abs(x).max()), np.array(given["r"], np.uint32)
    wq = np.array(given["wq"])
    check_vectors = make.uniform("guard secrets", 2, len(wq)).astype(np.uint32)
    projections = (check_vectors.astype(object) @ wq.astype(object) % P).astype(np.uint32)
    out = np.empty(x.shape, np.uint32)
    scales, sums, verdicts = outputs(len(x), projections)
    kernels.quantise_and_mask(x, limit, projections, True, pads, out, scales, sums, verdicts, 0, len(x))
    assert out.tolist() == expected["x"]
    assert set(verdicts) == {kernels.OK}
    assert set(pads.flat) == {kernels.ERASED}

    reply, undo = np.array(expected["y"], np.uint32), np.array(expected["undo"], np.uint32)
    result = np.empty(reply.shape, np.float32)
    scaling = (floats(given["s_x"]), floats(given["s_w"]), floats(given["b"]))
    check = check_vectors, sums, np.array([0, len(wq)]), True, undo
    kernels.verify_and_unmask(reply, *check, scaling, result, verdicts, 0, len(x))
    assert make.hexes(result) == expected["result"]
    assert set(verdicts) == {kernels.OK}
    assert set(undo.flat) == {kernels.ERASED}


@pytest.mark.parametrize(("given", "expected"), cases("check"))
def test_check(given: dict[str, Any], expected: dict[str, Any]) -> None:
    check_vectors, projections = np.array(given["s"], np.uint32), np.array(expected["w_s"], np.uint32)
    x = (np.array(given["x"]) % P).astype(np.uint32)
    _, sums, verdicts = outputs(len(x), projections)
    kernels.project(x, projections, sums, 0, len(x))
    reply = np.array(given["y"]).astype(np.uint32)
    out, scales, per_column = np.empty(reply.shape, np.float32), np.ones(2, np.float32), np.ones(4, np.float32)
    check, scaling = (check_vectors, sums, np.array([0, 4]), False, NO_PADS), (scales, per_column, per_column)
    kernels.verify_and_unmask(reply, *check, scaling, out, verdicts, 0, len(x))
    found = {VERDICTS[verdict] for verdict in verdicts.tolist()}
    assert (found - {"accept"} or {"accept"}) == {expected["verdict"]}


@pytest.mark.parametrize(("given", "expected"), cases("ratchet"))
def test_ratchet(given: dict[str, Any], expected: dict[str, Any]) -> None:
    ratchet = Ratchet(bytes.fromhex(given["root"]))
    assert [ratchet.next_key().hex() for _ in range(given["steps"])] == expected["keys"]


def test_the_folded_vectors_of_a_group() -> None:
    case = VECTORS["check"][0]
    wq = torch.tensor(case["in"]["wq"], dtype=torch.int8)
    check_vectors = np.array(case["in"]["s"], np.uint32)
    projections = np.empty((len(check_vectors), wq.shape[1]), np.uint32)
    kernels.project_weights(wq.numpy(), check_vectors, np.array([0, len(wq)]), projections, 0, len(check_vectors))
    assert projections.tolist() == case["out"]["w_s"]


def test_a_fused_multiplication_would_be_found() -> None:
    """A compiler that adds the bias before it rounds the product gives other bits, somewhere in the vectors."""
    differing = 0
    for given, expected in ((case["in"], case["out"]) for case in VECTORS["masked"]):
        scaled = np.array(expected["exact"], np.float32) * floats(given["s_x"])[:, None]
        fused = scaled.astype(np.float64) * floats(given["s_w"]) + floats(given["b"])
        differing += int((fused.astype(np.float32) != floats(expected["result"])).sum())
    assert differing
