from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.checkpoint import gguf_forms
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_forms import dequantised, form_of
from tsqp.checkpoint.gguf_loops import LOOPS
from tsqp.errors import UnsupportedModel

from .gguf_blocks import FORMS, numbers, random_blocks
from .gguf_bytes import gguf_bytes, tensor


def test_the_forms_tried_here_are_all_that_the_package_dequantises() -> None:
    """One that a later version brings shows here, and needs random blocks."""
    read = {kind.name for kind in GGMLQuantizationType if form_of(kind.value) is not None}
    assert read == {*FORMS, "F32", "F16", "BF16"}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_package(tmp_path: Path, form: str) -> None:
    blocks = random_blocks(form, 6, 512)
    content = gguf_bytes((), [tensor("w", (512, 6), GGMLQuantizationType[form].value)], blocks.tobytes())
    (tmp_path / "m.gguf").write_bytes(content)
    file, expected = GgufFile(tmp_path / "m.gguf"), numbers(form, blocks)
    assert expected.isfinite().all()
    assert expected.abs().max() > 0
    assert torch.equal(file.tensor("w"), expected)
    assert torch.equal(file.rows("w", 2, 5), expected[2:5])


@pytest.mark.parametrize("form", LOOPS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5))
@settings(max_examples=20)
def test_loops_give_the_bits_of_the_package(form: str, seed: int, rows: int) -> None:
    """Random bits, so factors that are infinite, subnormal, negative or no numbers too."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[form]]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, 3 * size), dtype=np.uint8)
    blocks[0, :4] = np.frombuffer(seed.to_bytes(4, "little"), np.uint8)  # hypothesis likes zeros and ones
    out = np.full((rows, 3 * block), 7, np.float32)
    LOOPS[form](blocks, out, 0, rows)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, GGMLQuantizationType[form])
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    out[:] = 7
    LOOPS[form](blocks, out, rows - 1, rows)
    assert (out[: rows - 1] == 7).all()


@pytest.mark.parametrize("form", ["Q4_K", "Q5_1"])
def test_large_tensors_take_the_loop_where_there_is_one(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_forms, "_WORTH_COMPILING", 1024)
    blocks = random_blocks(form, 64, 256)
    found = form_of(GGMLQuantizationType[form].value)
    assert found is not None
    assert torch.equal(torch.from_numpy(dequantised(found, blocks)), numbers(form, blocks))


@pytest.mark.parametrize(("number", "named"), [(9, "Q8_1"), (15, "Q8_K"), (26, "I32"), (28, "F64"), (999, "type 999")])
def test_other_forms_are_refused_by_name_when_a_file_is_opened(tmp_path: Path, number: int, named: str) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes((), [tensor("w", (256,), number)], bytes(1 << 12)))
    with pytest.raises(UnsupportedModel, match=f"w is stored as {named}, which is not implemented"):
        GgufFile(tmp_path / "m.gguf")


def test_factors_that_are_no_numbers_give_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Whoever quantises finds them; numpy's words would be about no line of the user's."""
    blocks = np.zeros((2, 34), np.uint8)
    blocks[:, 1] = 0x7C  # infinite, times zero
    (tmp_path / "m.gguf").write_bytes(gguf_bytes((), [tensor("w", (32, 2), 8)], blocks.tobytes()))
    assert GgufFile(tmp_path / "m.gguf").tensor("w").isnan().all()
    assert not recwarn.list
