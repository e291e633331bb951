"""A product with a bias is one operator, in the form that torch's CUDA build gives to a product with an epilogue."""

from __future__ import annotations

import pytest
import torch

from tests.families import tiny_model
from tests.model.launches import Launches
from tsqp.checkpoint import open_checkpoint
from tsqp.model.linear import load_group, prepared


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("part", [None, 1])
@pytest.mark.parametrize("way", ["fresh", "out", "prepared"])
def test_a_bias_is_added_by_the_product_itself(rows: int, part: int | None, way: str) -> None:
    """cuBLAS adds it where it is a vector and the result lies closely: another form copies the bias first."""
    linear = load_group(open_checkpoint(str(tiny_model("llama-biases").directory)), ("qkv", 0), torch.float32)
    first, end = linear.group.part_rows(part)
    x, out = torch.randn(rows, linear.group.in_features), torch.empty(rows, end - first)
    work = prepared(linear, x, part, out)
    with Launches() as launches:
        if way == "prepared":
            work()
        else:
            out = linear.product(x, part, out=None if way == "fresh" else out)
    assert launches.names == ["addmm"]
    bias, _, weight = launches.arguments[0]
    assert bias.dim() == 1
    assert bias.is_contiguous()
    assert weight.t().is_contiguous()
    assert out.is_contiguous()
