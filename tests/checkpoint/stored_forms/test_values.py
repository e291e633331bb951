"""What each form's numbers stand for: against the form's own library, and number by number from its layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.safetensors_files import SINGLE_FILE, SafetensorsFiles
from tsqp.checkpoint.stored_forms import QuantisedMatrix, base, stored_form
from tsqp.checkpoint.stored_forms.packing import unpacked, unpacked_part

from .references import FORMS, packed

VECTORS = sorted((Path(__file__).parent / "vectors").iterdir())


@pytest.mark.parametrize("directory", VECTORS, ids=lambda directory: directory.name)
def test_a_checkpoint_of_the_forms_own_library_is_read_as_the_library_reads_it(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    expected = json.loads((directory / "expected.json").read_text())
    assert len(expected) == 7
    for name, (dtype, digest) in expected.items():
        tensor = checkpoint.tensor(name)
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest() == digest, name
    assert sum(checkpoint.stored_as().values()) == len(expected) + 5


def matrix_of(form: str, directory: Path, outputs: int, inputs: int) -> tuple[QuantisedMatrix, torch.Tensor]:
    stored, expected = FORMS[form].make(np.random.default_rng(3), outputs, inputs)
    save_file({f"x.{name}": tensor.contiguous() for name, tensor in stored.items()}, directory / SINGLE_FILE)
    parsed = stored_form({"quantization_config": FORMS[form].quantisation}, "config.json")
    assert parsed is not None
    matrix = parsed.matrix(SafetensorsFiles(directory), "x", (outputs, inputs))
    assert matrix is not None
    used = {name for name in stored if name != "weight_format"}  # how a kernel wants its rows
    assert set(matrix.parts) == {f"x.{name}" for name in used}
    return matrix, expected


@pytest.mark.parametrize("form", FORMS)
def test_each_number_is_what_the_layout_says(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiple = FORMS[form].multiple
    outputs, inputs = (64, 96) if multiple == 32 else (33, 48) if "nf4" not in form else (33, 45)
    matrix, expected = matrix_of(form, tmp_path, outputs, inputs)
    assert matrix.dtype == expected.dtype
    assert torch.equal(matrix.rows(0, outputs), expected)
    for first, end in ((0, 1), (5, 9), (outputs - 7, outputs), (4, 4)):
        assert torch.equal(matrix.rows(first, end), expected[first:end])
    monkeypatch.setattr(base, "CHUNK", 7 * inputs)  # rows in parts
    assert torch.equal(matrix.rows(3, outputs), expected[3:])


def test_rows_ask_for_no_more_than_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory between two steps is bounded by ``CHUNK``, whatever the matrix."""
    matrix, _ = matrix_of("gptq-shuffled", tmp_path, 64, 96)
    monkeypatch.setattr(base, "CHUNK", 4 * 96)
    asked: list[tuple[int, int]] = []

    def dequantised(first: int, end: int) -> torch.Tensor:
        asked.append((first, end))
        return matrix.dequantised(first, end)

    QuantisedMatrix(matrix.parts, matrix.shape, matrix.dtype, matrix.recipe, dequantised).rows(10, 20)
    assert asked == [(10, 14), (14, 18), (18, 20)]


@given(st.integers(1, 8), st.integers(1, 70), st.data())
def test_packed_numbers_come_back(bits: int, count: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    words = torch.from_numpy(packed(np.array([numbers, numbers[::-1]]), bits))
    assert unpacked(words, bits, count).tolist() == [numbers, numbers[::-1]]
    assert unpacked(words.t(), bits, count, axis=0).t().tolist() == [numbers, numbers[::-1]]
    first = data.draw(st.integers(0, count))
    end = data.draw(st.integers(first, count))
    assert unpacked_part(words, bits, first, end).tolist() == [numbers[first:end], numbers[::-1][first:end]]
