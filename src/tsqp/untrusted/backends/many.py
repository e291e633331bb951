"""Several CUDA devices of one worker: each has a backend, its streams and its graphs; they are waited for together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tsqp.untrusted.backends.base import NOTHING_QUEUED, Finish, Queued
from tsqp.untrusted.backends.columns import ColumnsBackend
from tsqp.untrusted.backends.cuda import CudaBackend


class ManyDevices:
    """See Devices. ``names`` are those of the devices, in order."""

    compiled_calls = False
    depth = CudaBackend.depth

    def __init__(self, backends: Sequence[ColumnsBackend], names: Sequence[str]) -> None:
        self.backends = backends
        self.names = names
        self._failed = 0
        self._after: list[Finish] = []

    @property
    def name(self) -> str:
        return ",".join(self.names)

    @property
    def failed(self) -> str:
        return self.names[self._failed]

    @contextmanager
    def using(self, device: int) -> Iterator[ColumnsBackend]:
        """The backend of one device, which is named for whatever fails in here."""
        try:
            yield self.backends[device]
        except Exception:
            self._failed = device
            raise

    @contextmanager
    def serving(self) -> Iterator[None]:
        with ExitStack() as stack:
            for backend in reversed(self.backends):  # so that the first is torch's current device
                stack.enter_context(backend.serving())
            yield

    def attach(self, peer: bytes, memory: memoryview) -> None:
        self.backends[0].attach(peer, memory)  # locked for all devices

    def detach(self, peer: bytes) -> None:
        self.settle()
        for backend in self.backends:
            backend.drain()  # no device copies in memory that the first one unlocks for all
        self.backends[0].detach(peer)

    def after(self, finish: Finish) -> None:
        """Have something done once the current call's products are there."""
        self._after.append(finish)

    def submit(self) -> Queued:
        after, self._after = self._after, []
        each = [backend.submit() for backend in self.backends]
        if not after and all(queued is NOTHING_QUEUED for queued in each):
            return NOTHING_QUEUED
        return AllQueued(self._wait, each, after)

    def settle(self) -> None:
        self.submit().wait()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return self.backends[0].is_out_of_memory(error)

    def works(self) -> bool:
        broken = [device for device, backend in enumerate(self.backends) if not backend.works()]
        if broken:
            self._failed = broken[0]
        return not broken

    def trim(self) -> None:
        for backend in self.backends:
            backend.trim()

    def close(self) -> None:
        self.settle()
        for backend in self.backends:
            backend.close()

    def _wait(self, each: Sequence[Queued]) -> None:
        """Wait for every device, whatever has failed on another; the first error is raised."""
        errors: list[tuple[int, Exception]] = []
        for device, queued in enumerate(each):
            try:
                queued.wait()
            except Exception as error:
                errors.append((device, error))
        if errors:
            self._failed, first = errors[0]
            raise first


class AllQueued:
    """See Queued: what one call has queued on ``each`` device, which ``wait`` waits for; what the host does then."""

    def __init__(
        self, wait: Callable[[Sequence[Queued]], None], each: Sequence[Queued], after: Sequence[Finish]
    ) -> None:
        self._wait, self._each, self._after = wait, each, after

    def done(self) -> bool:
        return all(queued.done() for queued in self._each)

    def wait(self) -> None:
        self._wait(self._each)
        for finish in self._after:
            finish()

    def stages(self) -> None:
        """See Queued: those of several devices are not told."""
