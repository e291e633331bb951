"""``--compile``: the worker's linear products compiled by torch.compile, for shapes with any number of rows.

For int8 a compiled product is one loop before the sum and one after it, instead of a pass over memory for each step of
the quantiser and of the scaling; the numbers are the same. For float dtypes a product is one library call either way.

torch.compile writes C++ and loads what the compiler makes of it. It keeps both on disk: in a directory of this user
alone below the cache directory, not in torch's default under /tmp. Whoever can write there runs code in the worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tsqp.checkpoint.cache import cache_directory, code_directory
from tsqp.config.groups import GroupKey, LinearGroup
from tsqp.config.model import ModelConfig
from tsqp.errors import OptionError
from tsqp.model.int8 import Int8Linear, product_in_one
from tsqp.model.kernels import Kernels
from tsqp.model.linear import LinearProduct, LinearWeights
from tsqp.untrusted.fused_kernels import FusedKernels

Product = Callable[..., None]


class Compiler:
    """Compiles products once for all groups: a graph for one row and a graph for many."""

    def __init__(self) -> None:
        directory = code_directory("compiled-worker")
        if directory is None:
            raise OptionError(f"--compile needs a directory for its code: {cache_directory()} cannot be written")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
        os.environ["TRITON_CACHE_DIR"] = str(directory / "triton")
        import torch._dynamo.config
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1  # no pool of processes beside the worker
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # never uncompiled without saying so
        options: dict[str, Any] = {"dynamic": True, "fullgraph": True}
        self._compile = partial(torch.compile, **options)
        self._float: Product = self._compile(_float_product)
        self._int8: Product = self._compile(product_in_one)

    def compiled(self, groups: Mapping[GroupKey, LinearProduct], *, one_row: bool) -> dict[GroupKey, LinearProduct]:
        """The same groups with compiled products, each compiled before it is handed out.

        ``one_row``: also those of one row; otherwise these stay as they are.
        """
        wrapped: dict[GroupKey, LinearProduct] = {key: self._wrap(linear, one_row) for key, linear in groups.items()}
        with torch.inference_mode():
            for (_, layer), linear in wrapped.items():
                if layer in (0, None):
                    for rows in (1, 2, 3):  # one row is a graph of its own; the third shows that rows are dynamic
                        linear.product(linear.input(rows).zero_())
        return wrapped

    def kernels(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Kernels:
        """Norms and activations of the layers on a device, compiled before they are handed out."""
        kernels = FusedKernels(self._compile)
        with torch.inference_mode():
            kernels.warm_up(config, dtype, device)
        return kernels

    def _wrap(self, linear: LinearProduct, one_row: bool) -> LinearProduct:
        if isinstance(linear, Int8Linear):
            return CompiledInt8(linear, self._int8, one_row)
        if isinstance(linear, LinearWeights):
            return CompiledFloat(linear, self._float, one_row)
        return linear


@dataclass(frozen=True)
class CompiledInt8:
    """An ``Int8Linear`` by its compiled product."""

    linear: Int8Linear
    run: Product
    one_row: bool

    @property
    def group(self) -> LinearGroup:
        return self.linear.group

    def input(self, rows: int) -> torch.Tensor:
        return self.linear.input(rows)

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        linear = self.linear
        if x.shape[0] == 1 and not self.one_row:
            return linear.product(x, part, out=out)
        first, end = linear.group.part_rows(part)
        if out is None:
            out = torch.empty(x.shape[0], end - first, dtype=linear.dtype, device=x.device)
        bias = None if linear.bias is None else linear.bias[first:end]
        own = slice(first, end)
        self.run(x, linear.wq[own], linear.scales[own], linear.offsets[own], bias, linear.kernel, out)
        return out


@dataclass(frozen=True)
class CompiledFloat:
    """A ``LinearWeights`` by its compiled product."""

    linear: LinearWeights
    run: Product
    one_row: bool

    @property
    def group(self) -> LinearGroup:
        return self.linear.group

    def input(self, rows: int) -> torch.Tensor:
        return self.linear.input(rows)

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[0] == 1 and not self.one_row:
            return self.linear.product(x, part, out=out)
        first, end = self.linear.group.part_rows(part)
        if out is None:
            out = x.new_empty(x.shape[0], end - first)
        bias = None if self.linear.bias is None else self.linear.bias[first:end]
        self.run(x, self.linear.weight[first:end], bias, out)
        return out


def _float_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    out.copy_(F.linear(x, weight, bias))
