"""Waits for a provider of quotes for a bounded time. docs/attestation.md, section 3.

A thread in the kernel cannot be stopped. One that hangs is left behind, and no other is started beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from tsqp.errors import ProviderFailed

if TYPE_CHECKING:
    from tsqp.tee.evidence import Kind, Quote
    from tsqp.tee.providers import Provider

T = TypeVar("T")

PATIENCE_S = 10.0  # a TDX quote crosses to an enclave of the host and back: some tenths of a second
THREAD_NAME = "tsqp-quote"


class BoundedProvider:
    """The same provider: one question at a time, each for at most ``patience_s`` seconds from its turn on.

    A question waits for its turn for as long. Methods may be called from any thread.
    """

    def __init__(self, provider: Provider, patience_s: float = PATIENCE_S) -> None:
        self._provider = provider
        self.patience_s = patience_s
        self._turn = Lock()
        self._asked: Future[Any] | None = None

    @property
    def name(self) -> str:
        """Of the provider."""
        return self._provider.name

    def kind(self) -> Kind:
        """Raises ProviderFailed."""
        return self._within(self._provider.kind)

    def quote(self, report_data: bytes) -> Quote:
        """Raises ProviderFailed, also where the provider does not answer in time."""
        return self._within(lambda: self._provider.quote(report_data))

    def _within(self, question: Callable[[], T]) -> T:
        if not self._turn.acquire(timeout=self.patience_s):
            raise ProviderFailed(self.name, "others are asking it", "ask again later, or less often")
        try:
            if self._asked is not None and not self._asked.done():
                raise ProviderFailed(self.name, "it has not answered an earlier question yet", "ask again later")
            answer: Future[T] = Future()
            self._asked = answer
            Thread(target=_ask, args=(question, answer), name=THREAD_NAME, daemon=True).start()
            return self._wait(answer)
        finally:
            self._turn.release()

    def _wait(self, answer: Future[T]) -> T:
        if not wait([answer], self.patience_s).done:
            remedy = "look at the log of the kernel and of the host"
            raise ProviderFailed(self.name, f"no answer within {self.patience_s:g} s", remedy)
        return answer.result()


def _ask(question: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(question())
    except BaseException as error:  # whatever it is, who asked is to have it
        answer.set_exception(error)
