"""An engine whose decoders come and go: no request notices, and where none comes every request hears of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trusted.engine.fakes import FakeDecoder, alone, fake_engine
from tsqp.errors import ChannelError, CheckFailed, NumericError, ProductMismatch, WorkerLost
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.request import Output
from tsqp.trusted.engine.sampling_params import SamplingParams

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
PARAMS = [
    SamplingParams(max_tokens=7),
    SamplingParams(max_tokens=9, temperature=1.0, seed=1),
    SamplingParams(max_tokens=5),
]


class RemoteDecoder(FakeDecoder):
    """Whose caches are lost with it: those of another are not its own."""

    caches_on_worker = True

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def new_cache(self) -> Any:
        self.made.append(super().new_cache())
        return self.made[-1]

    def forward(self, batch: Any) -> Any:
        assert all(any(cache is own for own in self.made) for cache in batch.caches)
        return super().forward(batch)


class FakeLine:
    """Hands out decoders of a kind; ``nobody``: there is none to be had."""

    def __init__(self, kind: type[FakeDecoder] = FakeDecoder) -> None:
        self.kind = kind
        self.made = [kind()]
        self.lost: list[Exception] = []
        self.nobody: ChannelError | None = None
        self.passes = 0
        self.given_up: list[BaseException] = []
        self.ask = False

    def decoder(self) -> FakeDecoder:
        if self.nobody is not None:
            raise self.nobody
        if len(self.lost) == len(self.made):
            self.made.append(self.kind())
        return self.made[-1]

    def look(self) -> bool:
        return self.ask

    def passed(self) -> None:
        self.passes += 1

    def gave_up(self, error: BaseException) -> None:
        self.given_up.append(error)

    def mends(self, error: Exception) -> bool:
        if isinstance(error, CheckFailed):
            return False
        self.lost.append(error)
        return True


def engine_of(line: FakeLine, **options: Any) -> Engine:
    return fake_engine(line.made[0], line=line, **options)


def ask(engine: Engine) -> list[list[Output]]:
    outputs: list[list[Output]] = [[] for _ in PROMPTS]
    for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.add_request(prompt, params, deliver=outputs[number].append)
    return outputs


@pytest.mark.parametrize("kind", [FakeDecoder, RemoteDecoder])
@pytest.mark.parametrize("prefill_rows", [2, 32])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_lost_passes_change_no_token(kind: type[FakeDecoder], prefill_rows: int, every: int) -> None:
    """Every so many passes one is lost once everything was written."""
    line = FakeLine(kind)
    engine = engine_of(line, limits=Limits(prefill_rows=prefill_rows))
    outputs, steps = ask(engine), 0
    while engine.has_work():
        steps += 1
        loses = steps % (every + 1) == 0
        if loses:
            line.decoder().fail = WorkerLost("went away")
        given = engine.step()
        assert not (loses and given)
    assert [[output.token for output in one] for one in outputs] == [
        alone(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    assert len(line.lost) == len(line.made) - 1 + (len(line.lost) == len(line.made))
    counts = engine.counts()
    assert (counts.ended["length"], counts.kv_bytes) == (len(PROMPTS), 0)
    assert (counts.preemptions > 0) == (kind is RemoteDecoder)


def test_who_loses_a_cache_keeps_the_place_in_the_queue() -> None:
    line = FakeLine(RemoteDecoder)
    engine = engine_of(line, limits=Limits(running=2))
    ask(engine)
    engine.step()
    line.decoder().fail = WorkerLost("went away")
    engine.step()
    engine.step()
    scheduler = engine._books.scheduler
    assert [request.id for request in scheduler._running.values()] == [0, 1]
    assert engine.counts().preemptions == 2


def test_kept_caches_outlive_a_decoder_unless_they_were_the_workers() -> None:
    found = []
    for kind in (FakeDecoder, RemoteDecoder):
        line, prompt = FakeLine(kind), list(range(1, 21))
        engine = engine_of(line)
        engine.add_request(prompt, SamplingParams(max_tokens=2), salt="")
        while engine.has_work():
            engine.step()
        line.lost.append(WorkerLost("went away"))
        engine.add_request([*prompt, 30], SamplingParams(max_tokens=2), salt="")
        while engine.has_work():
            engine.step()
        found.append(engine.counts().found_tokens)
    assert found == [20, 0]


def test_where_no_decoder_comes_every_request_ends_with_the_error() -> None:
    line = FakeLine()
    engine = engine_of(line)
    outputs = ask(engine)
    engine.step()
    line.nobody = WorkerLost("no worker within 60 s")
    assert engine.step() == []
    for one in outputs:
        assert one[-1].error is line.nobody
        assert one[-1].finish_reason == "error"
    assert not engine.has_work()
    for call in (lambda: engine.logits([1, 2]), lambda: list(engine.generate([[1]], SamplingParams()))):
        with pytest.raises(WorkerLost) as caught:
            call()
        assert caught.value is line.nobody
    line.nobody = None
    assert [output.token for _, output in engine.generate([PROMPTS[0]], PARAMS[0])] == alone(PROMPTS[0], PARAMS[0])


def test_what_is_not_mended_is_raised_and_nothing_has_changed() -> None:
    line = FakeLine()
    engine = engine_of(line)
    ask(engine)
    for error in (ProductMismatch("wrong"), NumericError("not numbers")):
        line.made[-1].fail = error
        with pytest.raises(type(error)):
            engine.step()
        assert engine.counts().running == len(PROMPTS)
    assert not line.lost


def test_completed_passes_are_told_and_no_others() -> None:
    line = FakeLine()
    engine = engine_of(line)
    ask(engine)
    engine.step()
    line.made[-1].fail = WorkerLost("went away")
    engine.step()
    assert line.passes == 1
    assert [str(error) for error in line.given_up] == ["went away"]
    engine.step()
    assert (line.passes, len(line.given_up)) == (2, 1)


def test_without_requests_a_decoder_is_asked_for_where_there_is_something_to_mend() -> None:
    line = FakeLine()
    engine = engine_of(line)
    line.lost.append(WorkerLost("went away"))
    engine.mend()
    assert engine.step() == []
    assert engine.decoder is line.made[0]
    line.ask = True
    engine.mend()
    assert engine.decoder is line.made[1]
    fake_engine().mend()  # nothing to lose
