"""One checkpoint's weights, for each numeric path that a client asks for: read when it first does, then kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from tsqp.arith.product import DigitKernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import DtypeName, NumericPath, PlainDtype, WireDtype
from tsqp.config.shard import Shard, check_within
from tsqp.errors import OptionError
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend, Devices
from tsqp.untrusted.backends.device import backend_for, many_devices
from tsqp.untrusted.backends.many import ManyDevices
from tsqp.untrusted.compiled import Compiler
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights
from tsqp.untrusted.paths.many import ManyOperators
from tsqp.untrusted.paths.many_weights import ManyWeights, check_features, load_field, load_plain
from tsqp.untrusted.paths.plain import Operators
from tsqp.wire.payload import wire_format

PathWeights = ModelWeights | FieldWorkerWeights


class Store(Protocol):
    """What a worker serves, and what it computes on."""

    @property
    def backend(self) -> Devices: ...

    @property
    def fingerprint(self) -> str: ...

    def prepare(self, path: NumericPath) -> PathWeights | ManyWeights:
        """The weights of one path. The first time takes as long as reading them does.

        Raises CheckpointError; OptionError for another path than ``field`` where a shard is held.
        """

    def operators(self, path: NumericPath, wire: WireDtype) -> Operators | FieldOperators | ManyOperators:
        """What computes the calls of a connection that asked for a path and a wire format."""


class WeightStore:
    """``dtype`` is that of the float path. ``kernel`` multiplies 8-bit digits; a self-test chooses it unless given.

    ``backend`` is that of the device, unless given. ``shard`` is what of the model is read, and then for the field path
    alone; all for None. Raises OptionError for a shard that the model does not have.
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
        shard: Shard | None = None,
    ) -> None:
        if shard is not None:
            check_within(shard, checkpoint.config)
        self.backend = backend or backend_for(device)
        self.fingerprint = checkpoint.fingerprint()
        self._checkpoint = checkpoint
        self._dtype: DtypeName = dtype
        self._device = device
        self._kernel = kernel
        self._compiler = compiler
        self._shard = shard
        self._prepared: dict[NumericPath, PathWeights] = {}

    def prepare(self, path: NumericPath) -> PathWeights:
        """See Store."""
        if path not in self._prepared:
            self._prepared[path] = self._load(path)
        return self._prepared[path]

    def operators(self, path: NumericPath, wire: WireDtype) -> Operators | FieldOperators:
        """See Store."""
        weights = self.prepare(path)
        if isinstance(weights, FieldWorkerWeights):
            return FieldOperators(weights, self.backend)
        return Operators(weights, wire_format(wire), self.backend)

    def _load(self, path: NumericPath) -> PathWeights:
        check_path(self._shard, path)
        if path == "field":
            return FieldWorkerWeights.load(
                self._checkpoint, self._device, kernel=self._kernel, backend=self.backend, shard=self._shard
            )
        compute: PlainDtype = self._dtype if path == "float" else path
        weights = ModelWeights.load(self._checkpoint, compute, self._device, kernel=self._kernel)
        if self._compiler is None:
            return weights
        groups = self._compiler.compiled(weights.groups, one_row=self.backend.compiles_one_row)
        if not self.backend.captures:  # the host's layers have loops of their own
            return replace(weights, groups=groups)
        kernels = self._compiler.kernels(weights.config, weights.dtype, weights.device)
        return replace(weights, groups=groups, kernels=kernels)


class ManyStore:
    """The same over several devices. Raises OptionError for more devices than a group has output features."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: DtypeName,
        devices: ManyDevices,
        *,
        kernel: DigitKernel | None = None,
        shard: Shard | None = None,
    ) -> None:
        if shard is not None:
            check_within(shard, checkpoint.config)
        check_features(checkpoint.config, len(devices.backends), shard)
        self.backend = devices
        self.fingerprint = checkpoint.fingerprint()
        self._checkpoint = checkpoint
        self._dtype: DtypeName = dtype
        self._kernel = kernel
        self._shard = shard
        self._prepared: dict[NumericPath, ManyWeights] = {}

    def prepare(self, path: NumericPath) -> ManyWeights:
        """See Store."""
        if path not in self._prepared:
            self._prepared[path] = self._load(path)
        return self._prepared[path]

    def operators(self, path: NumericPath, wire: WireDtype) -> ManyOperators:
        """See Store."""
        return ManyOperators(self.prepare(path), wire, self.backend)

    def _load(self, path: NumericPath) -> ManyWeights:
        check_path(self._shard, path)
        if path == "field":
            return load_field(self._checkpoint, self.backend, self._kernel, self._shard)
        return load_plain(self._checkpoint, self._dtype if path == "float" else path, self.backend, self._kernel)


def store_on(
    checkpoint: Checkpoint,
    dtype: DtypeName,
    devices: Sequence[torch.device],
    compiler: Compiler | None = None,
    shard: Shard | None = None,
) -> WeightStore | ManyStore:
    """A store on one device or several, which compile nothing. Raises OptionError."""
    if len(devices) > 1:
        return ManyStore(checkpoint, dtype, many_devices(devices), shard=shard)
    return WeightStore(checkpoint, dtype, devices[0], compiler=compiler, shard=shard)


def check_path(shard: Shard | None, path: NumericPath) -> None:
    """Raises OptionError for a path that a worker of a shard does not have."""
    if shard is not None and path != "field":
        raise OptionError(f"it holds shard {shard}, which is for the private modes: it has no {path} path")
