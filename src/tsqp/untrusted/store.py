"""One checkpoint's weights, for each numeric path that a client asks for: read when it first does, then kept."""

from __future__ import annotations

from dataclasses import replace

import torch

from tsqp.arith.product import DigitKernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import DtypeName, NumericPath, PlainDtype
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.device import backend_for
from tsqp.untrusted.compiled import Compiler
from tsqp.untrusted.paths.field import FieldWorkerWeights

PathWeights = ModelWeights | FieldWorkerWeights


class WeightStore:
    """``dtype`` is that of the float path. ``kernel`` multiplies 8-bit digits; a self-test chooses it unless given.

    ``backend`` is that of the device, unless given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: DtypeName,
        device: torch.device,
        *,
        kernel: DigitKernel | None = None,
        compiler: Compiler | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.backend = backend or backend_for(device)
        self.fingerprint = checkpoint.fingerprint()
        self._checkpoint = checkpoint
        self._dtype: DtypeName = dtype
        self._device = device
        self._kernel = kernel
        self._compiler = compiler
        self._prepared: dict[NumericPath, PathWeights] = {}

    def prepare(self, path: NumericPath) -> PathWeights:
        """The weights of one path. The first time takes as long as reading them does. Raises CheckpointError."""
        if path not in self._prepared:
            self._prepared[path] = self._load(path)
        return self._prepared[path]

    def _load(self, path: NumericPath) -> PathWeights:
        if path == "field":
            return FieldWorkerWeights.load(self._checkpoint, self._device, kernel=self._kernel, backend=self.backend)
        compute: PlainDtype = self._dtype if path == "float" else path
        weights = ModelWeights.load(self._checkpoint, compute, self._device, kernel=self._kernel)
        if self._compiler is None:
            return weights
        return replace(weights, groups=self._compiler.compiled(weights.groups, one_row=self.backend.compiles_one_row))
