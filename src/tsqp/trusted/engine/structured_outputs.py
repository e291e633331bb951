"""What form an answer must have, as a caller says it. ``trusted/text/grammar.py`` makes a grammar of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp.errors import OptionError

MAX_CHARACTERS = 1 << 16  # of a schema, an expression or a grammar: what it takes to read them grows with it
MAX_CHOICES = 1024
KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form that an answer must have: exactly one of these.

    ``json``: a JSON schema, as a mapping or as the text of one. ``json_object``: any JSON object. ``regex``: a regular
    expression of the whole answer, as Rust writes them: classes such as ``\\d`` are Unicode's, and there is no
    look-around. ``choice``: one of these strings. ``grammar``: a context-free grammar in llguidance's dialect of Lark,
    with a rule ``start``. JSON is written without white space between its parts, so that no answer consists of it.

    Raises OptionError for a value of the wrong kind, and for none or several of them. A schema, an expression or a
    grammar is read where its tokenizer is known: ``Tokenizer.grammar``.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise OptionError(
                f"structured_outputs must be exactly one of {', '.join(KINDS)}, not {len(given)} of them",
                fields=("structured_outputs",),
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))  # a value: it is compared and hashed
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.json_object is False:
            text = _text(self.kind, getattr(self, self.kind))
            if self.grammar is not None and "%llguidance" in text:
                raise _wrong("grammar", "without options of the library: a line %llguidance")
        elif self.json_object is not True:
            raise _wrong("json_object", "True or False")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        text, schema = _text("json", schema), _parsed(schema)
    else:
        text = ""
    if not isinstance(schema, Mapping):
        raise _wrong("json", "a JSON schema: an object")
    if not text:
        try:
            text = json.dumps(dict(schema), allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise _wrong("json", "a JSON schema of plain data") from None
    return _text("json", text)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = error.pos + 1
    except (ValueError, RecursionError):
        raise _wrong("json", "JSON that is not nested too deeply, with numbers that are not too long") from None
    raise _wrong("json", f"JSON: look at character {where}")


def _choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise _wrong("choice", "a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _wrong("choice", f"a list of 1 to {MAX_CHOICES} strings")
    listed = tuple(_text("choice", choice) for choice in choices)
    _text("choice", "".join(listed))  # all together too
    return listed


def _text(name: str, value: object) -> str:
    """Text that is not empty, not too long, and Unicode."""
    if not isinstance(value, str):
        raise _wrong(name, "text")
    if not 1 <= len(value) <= MAX_CHARACTERS:
        raise _wrong(name, f"text of 1 to {MAX_CHARACTERS} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong(name, "Unicode text")
    return value


def _wrong(name: str, what: str) -> OptionError:
    field = f"structured_outputs.{name}"
    return OptionError(f"{field} must be {what}", fields=(field,))
