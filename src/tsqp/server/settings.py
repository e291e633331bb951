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
    max_answer_tokens: int = 4096  # of an answer, where the request does not say
    keep_alive_s: float = 10.0  # the longest silence of a stream: then a comment is sent
    obfuscation: bool = True  # pad the events of a stream, unless a client asks for none
    max_head_bytes: int = 16 << 10  # of a request's first line and headers
    max_headers: int = 100
    head_s: float = 10.0  # for the first line and the headers to arrive
    body_s: float = 60.0  # for a body to arrive, after its headers
    stall_s: float = 60.0  # how long a client may take nothing of an answer
    max_connections: int = 512
    max_requests_per_key: int | None = None  # under way at once
    host: str = "127.0.0.1"  # the address that is listened on
    hosts: tuple[str, ...] = ()  # more host names that the server answers to
    origins: tuple[str, ...] = ()  # of pages that may use the server
    drain_s: float = 30.0  # for answers under way, once the server is told to end
    probe_s: float = 5.0  # for the round trip to the worker that readiness asks for
    console: bool = False  # a page at / that shows what the worker saw of an answer
