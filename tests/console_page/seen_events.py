"""What the event ``seen`` may say: of noise, of activations, and of too little."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from tests.console_page.fake_server import Named

WORDS = "What is the capital of France?"
GIBBERISH = "âĢ lum Ġwitness fjord}} obl Ġcalcium ##"
MODULUS = 2**31 - 1


def seen(byte_values: np.ndarray, expected: np.ndarray, **changes: Any) -> Named:
    """The event of these bytes, (rows, width) uint8; ``expected``: 256 shares."""
    value: dict[str, Any] = {
        "protection": "masked",
        "bytes_seen": 1_234_567,
        "calls": 121,
        "kept_bytes": 1_234_567,
        "uniformity_p": 0.42,
        "recovered_text": GIBBERISH,
        "recovered_fraction": 0.0,
        "noise_fraction": 0.0,
        "user_tokens": 7,
        "picture": base64.b64encode(byte_values.tobytes()).decode(),
        "picture_of": "qkv of layer 0",
        "picture_width": byte_values.shape[1],
        "histogram": np.bincount(byte_values.ravel(), minlength=256).tolist(),
        "histogram_expected": expected.tolist(),
        "pads_left": 4096,
        "checks": 121,
        "tokens": 32,
        "seconds": 1.9,
    }
    return Named("seen", {**value, **changes})


def noise(rows: int = 62, width: int = 576, **changes: Any) -> Named:
    """Uniform noise of a field whose modulus is close below a power of two: each byte is as frequent as another."""
    words = np.random.default_rng(1).integers(0, MODULUS, (rows, width))
    return seen((words >> 23).astype(np.uint8), np.full(256, 1 / 256), **changes)


def activations(rows: int = 62, width: int = 576, **changes: Any) -> Named:
    """Rows that have something in common, as those of a model have."""
    generator = np.random.default_rng(2)
    columns = generator.normal(0, 1, width) * (1 + 6 * (generator.random(width) > 0.97))
    rows_of_tokens = generator.normal(0, 0.6, (9, width))[generator.integers(0, 9, rows)]
    values = 127.5 + 14 * (columns + rows_of_tokens)
    open_of = {
        "protection": "open",
        "uniformity_p": 0.0,
        "recovered_text": WORDS,
        "recovered_fraction": 1.0,
        "pads_left": None,
        "checks": 0,
    }
    return seen(values.clip(0, 255).astype(np.uint8), np.full(256, 1 / 256), **{**open_of, **changes})
