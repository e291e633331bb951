"""How likely the library says that texts are: what lm-eval has to get from the server. Run by the product's Python.

    echo '{"model": DIRECTORY, "asked": [[[TOKEN, ...], FIRST], ...]}' | .venv/bin/python -m conformance.scores

For each, the sum of the log-probabilities of the tokens from FIRST on, and whether each is the likeliest in its place.
"""

from __future__ import annotations

import json
import sys

from tsqp import LLM, SamplingParams


def main() -> None:
    """Reads what is asked, prints a list of pairs."""
    told = json.load(sys.stdin)
    prompts = [tokens for tokens, _ in told["asked"]]
    with LLM(told["model"]) as llm:
        completions = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1))
    scores = []
    for (_, first), completion in zip(told["asked"], completions, strict=True):
        entries = [entry for entry in (completion.prompt_logprobs or ())[first:] if entry is not None]
        scores.append((sum(one.logprob for one in entries), all(one.logprob == one.top[0][1] for one in entries)))
    sys.stdout.write(json.dumps(scores) + "\n")


if __name__ == "__main__":
    main()
