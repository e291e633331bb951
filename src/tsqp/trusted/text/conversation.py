"""A conversation as the plain data that a chat template sees."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tsqp.errors import OptionError, PromptError
from tsqp.trusted.text.traced import own_text


class ChatMessage(TypedDict):
    """One turn: ``role`` is system, user, assistant or tool. A mapping that has more keys is a turn too."""

    role: str
    content: str


Message = Mapping[str, object]
Messages = Sequence[Message] | Sequence[ChatMessage]

# A role of these is chosen from a list and says nothing: `'<|' + message.role + '|>'` may be the template's own text.
# Any other word in its place is the caller's, like a message's content.
ROLES = frozenset(
    ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "observation", "environment")
)

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# Names of a call's own parameters, which are no variables of a template.
RESERVED = ("messages", "prompt", "prompts", "params", "raw")
_MAX_DEPTH = 128  # of lists and mappings within each other; a template that writes them out recurses as deep
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing, the first is the usual one


def refuse_bad_name(name: str) -> None:
    """Raises OptionError for a name that no variable of a template can have."""
    if not _NAME.fullmatch(name):
        raise OptionError("the name of a template argument is made of letters, digits and underscores")
    if name in RESERVED:
        raise OptionError(f"a template argument cannot be called {name}")


def template_values(messages: Messages, arguments: Mapping[str, object]) -> dict[str, object]:
    """What a template sees. ``arguments`` may hold ``tools`` and ``documents``, each a list of mappings.

    Everything in it is text, number, truth value, None, list or mapping: an object of another kind would bring methods
    that a stranger's code could call. Raises PromptError for those and for what is nested too deeply, OptionError for
    names that no template can use.
    """
    for name in arguments:
        refuse_bad_name(name)
    values: dict[str, object] = {"tools": None, "documents": None, **_plain(arguments)}
    for name in ("tools", "documents"):
        listed = values[name]
        if listed is not None and not (isinstance(listed, list) and all(isinstance(item, dict) for item in listed)):
            raise OptionError(f"{name} must be a list of mappings")
    return {**values, "messages": [_message(message) for message in messages]}


def _message(message: object) -> dict[str, object]:
    """As transformers hands it on: keys without a value left out, reasoning under each name that templates read."""
    if not isinstance(message, Mapping):
        raise PromptError("a message must be a mapping with a role and a content")
    made: dict[str, object] = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((made[key] for key in _REASONING if key in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    role = made.get("role")
    if isinstance(role, str) and role in ROLES:
        made["role"] = own_text(role)
    return made


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise PromptError(f"a chat template takes data that is nested at most {_MAX_DEPTH} deep")
    match value:
        case None | bool():
            return value
        case str():  # also of a subclass, which may know more than a text should: a plain one is the user's
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(item, depth + 1) for key, item in value.items()}
        case list():
            return [_plain(item, depth + 1) for item in value]
        case tuple():
            return tuple(_plain(item, depth + 1) for item in value)
        case _:
            raise PromptError(f"a chat template takes plain data only, no {type(value).__name__}")
