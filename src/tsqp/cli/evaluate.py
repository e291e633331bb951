"""``tsqp eval``: the quality of a mode, as a figure that can be held beside another mode's."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tsqp.cli.arguments import JsonLine, read_text
from tsqp.cli.one_adapter import one_adapter
from tsqp.cli.options import RunOptions
from tsqp.errors import NumericError, OptionError, PromptError
from tsqp.progress import Progress, counted, unseen

if TYPE_CHECKING:
    import torch

    from tsqp.api.llm import LLM

eval_app = App(name="eval", help="Measure the quality of a mode.")

LogitsOf = Callable[[Sequence[int]], "torch.Tensor"]


@dataclass(frozen=True)
class Window:
    """Tokens ``first`` to ``end`` of a text go through the model together; those from ``scored`` on count."""

    first: int
    scored: int
    end: int


@eval_app.command
def perplexity(
    *,
    text: Annotated[Path, Parameter(help="A file of UTF-8 text, taken as it is: no chat template.")],
    tokens: Annotated[int | None, Parameter(help="Use the first tokens only; all when not given.")] = None,
    window: Annotated[int, Parameter(help="Tokens that go through the model together, at most its context.")] = 1024,
    stride: Annotated[
        int, Parameter(help="New tokens in each window after the first; the rest is their context.")
    ] = 512,
    run: RunOptions = RunOptions(),
    json_output: JsonLine = False,
) -> None:
    """Measure the perplexity of a text: e to the mean negative log probability of each token after those before it."""
    from rich.console import Console

    from tsqp.cli.open_llm import open_llm
    from tsqp.cli.report import announce
    from tsqp.progress_bar import progress_bar

    words, lora = read_text(text, "--text"), one_adapter(run)
    check_windows(window, stride)
    console = Console(stderr=True)
    with open_llm(run, silent=json_output) as llm:
        announce(llm, console)
        with progress_bar(console, silent=json_output) as progress:
            result = measure(llm, words, tokens=tokens, window=window, stride=stride, lora=lora, progress=progress)
    if json_output:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name in ("perplexity", "tokens", "seconds", "dtype", "wire_dtype", "protection", "partition"):
        value = result[name]
        sys.stdout.write(f"{name:12} {value:.4f}\n" if isinstance(value, float) else f"{name:12} {value}\n")


def measure(
    llm: LLM,
    text: str,
    *,
    tokens: int | None,
    window: int,
    stride: int,
    lora: str | None = None,
    progress: Progress = unseen,
) -> dict[str, object]:
    """The perplexity of a text, and the mode it was measured in. Raises OptionError, PromptError, ChannelError."""
    check_windows(window, stride)
    ids = llm.tokenizer.encode(text)[:tokens]
    if len(ids) < 2:
        raise PromptError("a perplexity needs a text of two tokens or more")
    start = time.perf_counter()
    value = text_perplexity(partial(llm.logits, lora=lora), ids, window, stride, progress)
    plan, session = llm.plan, llm.session
    return {
        "perplexity": value,
        "tokens": len(ids) - 1,
        "seconds": time.perf_counter() - start,
        "window": window,
        "stride": stride,
        "protection": plan.protection.name,
        "partition": None if plan.partition is None else plan.partition.name,
        "transport": None if session is None else session.transport,
        "dtype": plan.linear_dtype,
        "wire_dtype": plan.crossing,
        "device": "cpu" if session is None else session.welcome.device,
        "lora": lora,
    }


def text_perplexity(
    logits_of: LogitsOf, ids: Sequence[int], window: int, stride: int, progress: Progress = unseen
) -> float:
    """Perplexity of tokens 1 to the last, each after as much of the text before it as its window holds.

    Raises NumericError when the logits are not numbers.
    """
    import torch

    total = 0.0
    for part in counted(list(windows(len(ids), window, stride)), "measuring windows of the text", progress):
        logits = logits_of(ids[part.first : part.end])  # (T, vocab_size), row t after token t
        before = logits[part.scored - part.first - 1 : -1].float()
        wanted = torch.tensor(ids[part.scored : part.end])
        total += float(torch.nn.functional.cross_entropy(before, wanted, reduction="none").double().sum())
    mean = total / (len(ids) - 1)
    if not math.isfinite(mean):
        raise NumericError("the logits are not numbers: broken weights, too narrow a --dtype or a broken worker")
    return math.exp(mean)


def windows(count: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over ``count`` tokens that score every token but the first exactly once."""
    scored = 1
    first = 0
    while scored < count:
        end = min(first + window, count)
        yield Window(first, scored, end)
        scored = end
        first += stride


def check_windows(window: int, stride: int) -> None:
    """Raises OptionError for windows that would leave tokens out."""
    if window < 2:
        raise OptionError(f"the window must be at least 2 tokens, not {window}")
    if not 1 <= stride < window:
        raise OptionError(f"the stride must be at least 1 and less than the window of {window}, not {stride}")
