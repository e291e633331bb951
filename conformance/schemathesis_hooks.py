"""What schemathesis is told of this server: the name of its model, and that short answers will do."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

MOST = 4  # tokens
BOUNDS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Only where the field is right, or not there: what is to be refused stays as it is."""
    body, bound = case.body, BOUNDS.get(case.operation.path)
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["TSQP_MODEL"]
    if bound is not None:
        for name in (bound, "max_completion_tokens"):
            asked = body.get(name, 1)
            if asked is None or (type(asked) is int and asked > MOST):
                body[name] = MOST
        body.setdefault(bound, MOST)
