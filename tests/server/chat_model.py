"""A tiny random model that can chat: a token for each byte, control tokens, a template with tools in Hermes' format."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from tokenizers import AddedToken

from tests.families import SHAPE, byte_tokenizer
from tsqp.checkpoint.base import TextFormat

CONTEXT = 2048
IM_START, IM_END = 256, 257
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call them as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('a system message comes first') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if thinking %}<think>{% endif %}{% endif %}"""


@cache
def chat_text_format() -> TextFormat:
    """Its tokenizer and its template, for tests that need no model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    return TextFormat(tokenizer.to_str(), (IM_END,), TEMPLATE, special_tokens={"eos_token": "<|im_end|>"})


@cache
def chat_model() -> Path:
    """Its directory; the same for every test."""
    import transformers

    torch.manual_seed(0)
    shape = {**SHAPE, "max_position_embeddings": CONTEXT, "eos_token_id": IM_END}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape)).eval().float()
    directory = Path(mkdtemp(prefix="tsqp-chat-"))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(chat_text_format().tokenizer_json, encoding="utf-8")
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
