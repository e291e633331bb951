"""Weights and tokenizers from files: Hugging Face directories, GGUF, the Hub, the default model, synthetic shapes."""

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.open import locate, open_checkpoint, stored_dtype

__all__ = ["Checkpoint", "TextFormat", "locate", "open_checkpoint", "stored_dtype"]
