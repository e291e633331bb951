"""Weights and tokenizers from files: Hugging Face directories, GGUF, the Hub, the default model, synthetic shapes."""
