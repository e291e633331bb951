"""A matrix that several stored tensors stand for, and what finds those of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tsqp.checkpoint.safetensors_files import SafetensorsFiles
from tsqp.errors import CorruptCheckpoint

CHUNK = 1 << 20  # numbers that are dequantised at a time: what is between two steps stays small beside a matrix
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RowReader = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix W (out, in) of the model.

    ``parts`` are the tensors of the file that it is made of. ``dtype`` is what its numbers are rounded to. ``recipe``
    is how it is stored, for a person; with ``parts`` it says all that there is to know, so the fingerprint has it.
    ``dequantised(first, end)`` are rows first to end, of any float dtype that holds them exactly or in float32.
    """

    parts: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    recipe: str
    dequantised: RowReader

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Rows ``first`` to ``end`` in ``dtype``, (end - first, in). Other rows are not dequantised.

        Raises CorruptCheckpoint for parts whose contents cannot be.
        """
        rows = torch.empty(end - first, self.shape[1], dtype=self.dtype)
        step = max(1, CHUNK // self.shape[1])
        for start in range(first, end, step):
            stop = min(start + step, end)
            rows[start - first : stop - first] = self.dequantised(start, stop)  # rounds once
        return rows


class StoredForm(ABC):
    """How the matrices of one checkpoint are stored, from its ``quantization_config``.

    ``unused`` ends the names of tensors that serve the form's own kernels: scales of activations and of the KV cache.
    ``notes`` tell a person what of the configuration plays no part here. ``has_matrices``: whether any are quantised.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    notes: tuple[str, ...] = ()
    has_matrices: bool = True

    @abstractmethod
    def matrix(self, files: SafetensorsFiles, module: str, shape: tuple[int, int]) -> QuantisedMatrix | None:
        """The matrix ``module.weight`` if it is stored quantised; None if it is stored as it is, or not at all.

        What is stored decides; the configuration says how to read it. Only headers are looked at, and tensors of a few
        bytes. Raises CorruptCheckpoint or UnsupportedModel for parts that do not fit.
        """

    def unused_tensors(self, files: SafetensorsFiles, matrices: Mapping[str, QuantisedMatrix]) -> set[str]:
        """Stored tensors that are neither a part of a matrix nor of the model, and may be there.

        Raises CorruptCheckpoint for one that should play a part.
        """
        return {name for name in files.headers if self.unused and name.endswith(self.unused)}


def scaled(
    digits: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_of: torch.Tensor | None,
    *,
    inputs_first: bool = False,
) -> torch.Tensor:
    """(digit - zero) · scale in float32, rounded once: W (rows, in) from digits (rows, in).

    ``scales`` and ``zeros`` are (rows, groups); input i belongs to group ``group_of[i]``, to the only one for None.
    Digits and zeros are whole numbers or float8, so that their difference is exact. ``inputs_first``: all that is
    given is transposed.
    """
    axis = 0 if inputs_first else 1

    def spread(of_groups: torch.Tensor) -> torch.Tensor:
        wide = of_groups.to(torch.float32)
        return wide if group_of is None else wide.index_select(axis, group_of)

    values = digits.to(torch.float32)
    if zeros is not None:
        values = values - spread(zeros)
    values = values * spread(scales)
    return values.t() if inputs_first else values


def groups_of_inputs(inputs: int, size: int) -> torch.Tensor | None:
    """The group of each input where each ``size`` neighbours are one; None where there is one group."""
    return None if size >= inputs else torch.arange(inputs) // size


def stored_groups(files: SafetensorsFiles, name: str, groups: int) -> torch.Tensor:
    """The group of each input from a ``g_idx``, int64. Raises CorruptCheckpoint for one that there is not."""
    listed = files.read(name).long()
    if listed.numel() and not (int(listed.min()) >= 0 and int(listed.max()) < groups):
        raise CorruptCheckpoint(f"{files.place(name)} names groups outside of the {groups} that have scales")
    return listed
