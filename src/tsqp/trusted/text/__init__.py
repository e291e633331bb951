"""Text and tokens: the tokenizer, chat templates, streams of text."""
