"""Ranges of fields for the OpenAPI document. They are checked where what is refused can be said in words."""

from __future__ import annotations

from typing import Any

import msgspec


def documented(**keywords: Any) -> msgspec.Meta:
    """Keywords of JSON Schema that nothing checks here; tests/server/test_openapi.py holds them to what is checked."""
    return msgspec.Meta(extra_json_schema=keywords)
