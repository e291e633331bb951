"""The limits and switches of a server, one value that nothing changes once it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Everything has a default; the command line fills in what is said there. Times are in seconds, sizes in bytes."""

    strict_params: bool = False  # refuse fields that are unknown, rather than name them in a header
    max_n: int = 16  # choices for one prompt
    max_choices: int = 128  # answers of one request: prompts times choices
    max_body_bytes: int = 8 << 20  # of a request's body
    max_answer_tokens: int = 4096  # of a chat answer, where the request does not say
    keep_alive_s: float = 10.0  # the longest silence of a stream: then a comment is sent
    obfuscation: bool = True  # pad the events of a stream, unless a client asks for none
