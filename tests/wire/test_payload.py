"""Float payloads: their size follows from the shape, and what is written is what is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.arith.quantise import quantise_rows
from tsqp.config.dtype import DTYPE_NAMES, WIRE_DTYPES, WireDtype, payload_bytes
from tsqp.errors import ProtocolError
from tsqp.wire.payload import TORCH_DTYPES, wire_format

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@given(SHAPES, st.integers(0, 3))
def test_round_trip_at_any_address(wire: WireDtype, shape: tuple[int, ...], offset: int) -> None:
    if wire != "int8":
        offset *= 4  # memory to write tensors to is aligned
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    form = wire_format(wire)
    size = form.size(shape)
    assert size == payload_bytes(wire, shape)
    place = memoryview(bytearray(offset + size))[offset:]
    form.write(x, place)
    back = form.read(place, shape, torch.float32)
    if wire == "int8":
        digits, scales = quantise_rows(x.view(-1, shape[-1]))
        expected = (digits * scales.unsqueeze(1)).view(shape)
    else:
        expected = x.to(TORCH_DTYPES[wire]).float()
    assert torch.equal(back, expected)
    assert back.shape == x.shape


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("difference", [-1, 1])
def test_another_size_is_refused(wire: WireDtype, difference: int) -> None:
    form = wire_format(wire)
    with pytest.raises(ProtocolError, match="bytes"):
        form.read(memoryview(bytearray(form.size((3, 5)) + difference)), (3, 5), torch.float32)


def test_int8_is_half_of_bfloat16_and_a_scale_for_each_row() -> None:
    assert payload_bytes("int8", (10, 2048)) == payload_bytes("bfloat16", (10, 2048)) // 2 + 10 * 4
    assert set(WIRE_DTYPES) == {*DTYPE_NAMES, "int8"}
