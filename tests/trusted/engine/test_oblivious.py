"""The oblivious sampler: the tokens of the other one, by reads and writes that no logit changes."""

from __future__ import annotations

import ast
import inspect
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tsqp import SamplingParams
from tsqp.model.oblivious_loops import count_tokens
from tsqp.trusted.engine import oblivious, sampling
from tsqp.trusted.engine.logprobs import token_logprobs
from tsqp.trusted.engine.oblivious import ObliviousSampler, kept_weights, kth_largest, nucleus, oblivious_logprobs
from tsqp.trusted.engine.sampling import Sampler

VOCAB = 40
# Few values make ties; some are far apart; some are nothing beside the largest; zeros have two signs.
LOGITS = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2.0**-23, 2.5, -3.0, 9.0, -80.0, -1e30, -np.inf, 1e-40])
    | st.floats(-20, 20, width=32),
    min_size=VOCAB,
    max_size=VOCAB,
).filter(lambda values: max(values) > -1e29)
WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-300, 1e-16, 1e-9, 0.1, 0.1 + 2.0**-50, 0.25, 0.5, 1.0]) | st.floats(0.0, 1.0),
    max_size=80,
).map(lambda values: np.array([*values, 1.0]))
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.0]),
        "top_k": st.integers(0, VOCAB + 3),
        "top_p": st.floats(0.0, 1.0, exclude_min=True),
        "min_p": st.floats(0.0, 1.0, exclude_max=True),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 0.4]),
        "presence_penalty": st.sampled_from([-0.5, 0.0, 1.0]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        "logprobs": st.integers(0, 20),
    },
)


class Only:
    """A grammar that allows the same tokens again and again."""

    def __init__(self, tokens: set[int]) -> None:
        self._allowed = np.isin(np.arange(VOCAB), sorted(tokens))

    def allowed(self) -> NDArray[np.bool_]:
        return self._allowed

    def accept(self, token: int) -> None:
        assert self._allowed[token]

    def reset(self) -> None:
        """It has no beginning."""


@given(
    st.lists(LOGITS, min_size=1, max_size=4),
    PARAMS,
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
)
def test_every_token_and_log_probability_is_that_of_the_other_sampler(
    rows: list[list[float]], given_params: dict[str, Any], seed: int, prompt: list[int], allowed: set[int] | None
) -> None:
    params = SamplingParams(seed=seed, **given_params)
    if allowed is not None:  # one of them has to be possible
        rows = [[max(value, -1e6) for value in row] for row in rows]
    matchers = [None if allowed is None else Only(allowed)] * 2
    samplers = [Sampler(params, matcher=matchers[0]), ObliviousSampler(params, matcher=matchers[1])]
    text = list(prompt)
    for row in rows:
        logits = torch.tensor(row)
        before = logits.clone()
        first, second = (one.choose(logits, text) for one in samplers)
        assert first == second
        assert torch.equal(logits, before)
        text.append(first)
    assert samplers[0].logprobs == samplers[1].logprobs


@given(LOGITS, st.integers(1, VOCAB), st.sampled_from([np.float32, np.float64]))
def test_the_kth_largest_is_found(values: list[float], k: int, dtype: Any) -> None:
    scores = np.array(values, dtype)
    assert kth_largest(scores, k) == np.sort(scores)[-k]


@given(WEIGHTS, st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
@example(np.ones(64), 0.5)
@example(np.array([0.25, 0.25, 1.0, 0.5]), 0.75)  # the mass is reached exactly
@example(np.array([0.0, 1.0]), 1 - 2.0**-53)
@example(np.array([0.5, 1.0]), 5e-324)
def test_the_nucleus_is_that_of_the_other_sampler(weights: NDArray[np.float64], top_p: float) -> None:
    assert np.flatnonzero(nucleus(weights, top_p)).tolist() == sampling.nucleus(weights, top_p).tolist()


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999999])
def test_the_same_of_a_whole_vocabulary(top_p: float) -> None:
    scores = np.random.default_rng(3).normal(size=128_256).astype(np.float32) * 3
    params = SamplingParams(temperature=1.1, top_p=top_p, top_k=5000)
    weights = kept_weights(scores, params)
    ids, others = sampling.narrowed(scores, params)
    assert ids is not None
    assert np.flatnonzero(weights).tolist() == ids.tolist()
    assert weights[ids].tobytes() == others.tobytes()


@given(LOGITS, st.integers(0, VOCAB - 1), st.integers(0, 20))
def test_log_probabilities_are_the_same(values: list[float], token: int, count: int) -> None:
    logits = torch.tensor(values)
    assert oblivious_logprobs(logits, token, count) == token_logprobs(logits, token, count)


@pytest.mark.parametrize(
    ("penalty", "passes"),
    [("presence_penalty", [0, 1, 1]), ("frequency_penalty", [0, 1, 1]), ("repetition_penalty", [5000, 0, 1, 1, 1, 1])],
)
def test_a_penalty_of_the_answer_alone_makes_no_pass_for_a_token_of_the_prompt(
    penalty: str, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, counted = [3] * 5000, list[int]()

    def counting(tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        counted.append(len(tokens))
        count_tokens(tokens, counts)

    monkeypatch.setattr(oblivious, "count_tokens", counting)
    options: dict[str, Any] = {penalty: 1.5}
    sampler, plain = (kind(SamplingParams(**options)) for kind in (ObliviousSampler, Sampler))
    for _ in range(3):
        logits = torch.randn(VOCAB)
        token = sampler.choose(logits, text)
        assert token == plain.choose(logits, text)
        text.append(token)
    assert counted == passes


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """An array that writes down what is done with it: operations, shapes, and the elements that are named."""

    seen: list[object]

    def __array_finalize__(self, source: object) -> None:
        self.seen = getattr(source, "seen", [])

    def _told(self, value: Any) -> Any:
        """What a watcher of memory sees of an argument."""
        if isinstance(value, (tuple, list)):
            return tuple(self._told(one) for one in value)
        return value.shape if isinstance(value, np.ndarray) else type(value).__name__

    def _watched(self, result: Any) -> Any:
        if isinstance(result, np.ndarray):
            watched = result.view(Watched)
            watched.seen = self.seen
            return watched
        return tuple(self._watched(one) for one in result) if isinstance(result, tuple) else result

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [one.view(np.ndarray) if isinstance(one, Watched) else one for one in inputs]
        if out is not None:
            options["out"] = tuple(one.view(np.ndarray) if isinstance(one, Watched) else one for one in out)
        result = getattr(ufunc, method)(*plain, **options)
        self.seen.append((ufunc.__name__, method, self._told(inputs), self._told(result)))
        return self._watched(result) if out is None else out[0]

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(function, (), args, kwargs)
        self.seen.append((function.__name__, self._told(args), self._told(result)))
        return self._watched(result)

    def _named(self, index: Any) -> None:
        self.seen.append(np.asarray(index).tolist() if isinstance(index, np.ndarray) else repr(index))

    def __getitem__(self, index: Any) -> Any:
        self._named(index)
        return self._watched(super().__getitem__(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._named(index)
        super().__setitem__(index, value)

    def argmax(self, *_: Any, **__: Any) -> Any:
        found = super().argmax()
        self.seen.append(("argmax",))
        return found


class WatchedLogits:
    """What a sampler is given in place of a tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.array = values.numpy().view(Watched)
        self.array.seen = []

    def numpy(self) -> Watched:
        return self.array


EVERY: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 0.7, "min_p": 0.1},
    {"logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "logit_bias": {3: 4.0}, "logprobs": 2},
]
DEPENDENT = [one for one in EVERY if len(one) > 1 or "logprobs" in one]  # the others pass over the vocabulary anyway


def trace_of(kind: type[Sampler], seed: int, text: Sequence[int], params: dict[str, Any]) -> list[object]:
    """What is done with the logits, and with what is made of them, for one token."""
    logits = WatchedLogits(torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3)
    kind(SamplingParams(seed=1, **params), prompt_tokens=2).choose(logits, text)  # type: ignore[arg-type]
    return logits.array.seen


@pytest.mark.parametrize("params", EVERY, ids="-".join)
def test_two_texts_of_equal_length_touch_the_same_memory(params: dict[str, Any]) -> None:
    traces = [trace_of(ObliviousSampler, seed, text, params) for seed, text in ((1, [3, 3, 7, 7]), (2, [9, 1, 2, 30]))]
    assert len(traces[0]) > 1
    assert traces[0] == traces[1]


@pytest.mark.parametrize("params", DEPENDENT, ids="-".join)
def test_without_the_option_they_do_not(params: dict[str, Any]) -> None:
    """So the watching sees what it is to see."""
    first, second = (trace_of(Sampler, seed, text, params) for seed, text in ((1, [3, 3, 7, 7]), (2, [9, 1, 2, 30])))
    assert first != second


HIDDEN = """
import ctypes, mmap, os, resource
import numpy as np
from tsqp.model.oblivious_loops import BLOCK, count_tokens, scan_rows
from tsqp.trusted.engine.oblivious import either, first_of, value_at

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
floats = 3 * PAGE // 8
no, yes, other = np.zeros(floats, bool), np.ones(floats, bool), np.ones(floats)

def scan(array, token):
    table, tokens = array.view(np.uint64).reshape(-1, 64), np.array([token // 64])
    masks, out = np.empty((1, 1, BLOCK), np.uint64), np.zeros((1, 1, 64), np.uint64)
    scan_rows(table, tokens, masks, out, 0, 1)

CASES = {
    "value_at": value_at,
    "first_of": lambda array, index: first_of(array.view(bool)),
    "either, the first": lambda array, index: either(no, array, other),
    "either, the second": lambda array, index: either(yes, other, array),
    "where": lambda array, index: np.where(no, array, other),
    "the scan of the embedding": scan,
    "the counts of penalties": lambda array, token: count_tokens(np.array([token]), array.view(np.int64)),
}
for work in CASES.values():
    work(np.zeros(floats), 0)  # what is compiled and imported is there
for name, work in CASES.items():
    for hidden in range(3):
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            memory = mmap.mmap(-1, 3 * PAGE)
            array = np.frombuffer(memory, np.float64)
            assert libc.mprotect(array.ctypes.data + hidden * PAGE, PAGE, 0) == 0
            work(array, 0 if hidden else floats - 1)
            os._exit(0)
        print(f"{name}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
"""


def test_every_page_is_read_whatever_is_looked_for() -> None:
    """Whoever reads a page that is hidden dies of it: what is looked for lies on another one."""
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, timeout=120, check=True)
    ends = [line.rpartition(": ") for line in done.stdout.splitlines()]
    read = {name: [int(end) for of, _, end in ends if of == name] for name, _, _ in ends}
    assert read.pop("where") == [0, 0, 0], "the test sees what is left out"
    assert len(read) == 6
    assert all(ended == [-signal.SIGSEGV] * 3 for ended in read.values()), read


def test_numpy_does_nothing_here_but_what_goes_over_everything() -> None:
    """``where`` reads what it takes, ``argmax`` and ``any`` of flags stop early, an index by flags reads some."""
    tree = ast.parse(inspect.getsource(oblivious))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    of_numpy = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np"
    }
    kinds = {"bool_", "dtype", "float64", "iinfo", "inf", "int32", "int64"}
    made = {"arange", "array", "full_like", "ones", "zeros"}
    assert of_numpy - kinds - made == {"bitwise_or", "count_nonzero", "cumsum", "floor"}
    assert not named & {
        "all",
        "any",
        "argmax",
        "argmin",
        "choose",
        "compress",
        "item",
        "nonzero",
        "searchsorted",
        "take",
    }
    assert not any(node.arg == "where" for node in ast.walk(tree) if isinstance(node, ast.keyword))
