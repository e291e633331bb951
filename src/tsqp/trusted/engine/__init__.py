"""Prompts in, tokens out: forward passes, sequences, sampling."""
