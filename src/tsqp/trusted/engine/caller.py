"""A caller that waits for its requests in its own thread: the caller makes the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.request import ChoosesTokens, Output
from tsqp.trusted.engine.sampling_params import SamplingParams


class Caller:
    """Requests of one caller: add them, then iterate over their outputs, in the order they come.

    A context manager: what has not ended when it is left is aborted. Several callers, also of several threads, move
    each other's requests.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._arrived = deque[Output]()
        self._places: dict[int, int] = {}  # of the requests that have not ended, by number
        self._added = 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: str | None = None,
        patient: bool = False,
        sampler: ChoosesTokens | None = None,
        adapter: str | None = None,
    ) -> None:
        """One more request. Raises as ``Engine.add_request``."""
        deliver = self._arrived.append
        number = self._engine.add_request(
            prompt, params, salt=salt, patient=patient, sampler=sampler, deliver=deliver, adapter=adapter
        )
        self._places[number] = self._added
        self._added += 1

    def __iter__(self) -> Iterator[tuple[int, Output]]:
        """Outputs, each with the place of its request among those added.

        Raises as ``Engine.step``, and the error of a request.
        """
        while self._places:
            while not self._arrived:
                self._engine.step_unless(lambda: bool(self._arrived))
            output = self._arrived.popleft()
            place = self._places.get(output.request)
            if place is None:
                continue  # of a request that was stopped
            if output.finish_reason is not None:
                del self._places[output.request]
            if output.error is not None:
                raise output.error
            yield place, output

    def stop(self, output: Output) -> None:
        """End the request of an output as complete, for instance at a stop string."""
        if self._places.pop(output.request, None) is not None:
            self._engine.stop(output.request)

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._places:
            self._engine.abort(number)
        self._places.clear()
