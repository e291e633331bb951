"""Chat templates: what transformers' template environment knows, in a sandbox, with the origin of every character.

A template comes with the checkpoint: it is data of a stranger, so it runs in a sandbox, and sees plain data only.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from itertools import count
from typing import Any, cast

from jinja2 import (
    Environment,
    TemplateError,
    TemplateRuntimeError,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    nodes,
)
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, missing, pass_environment
from markupsafe import Markup

from tsqp.errors import PromptError
from tsqp.trusted.text.printable import printable
from tsqp.trusted.text.traced import Traced, TracedMarkup, is_own, join_traced, origin, own_text, traced

# What Python says of values by their kinds alone: the words that it has for values may be the prompt.
_KINDS = re.compile(
    r"'\w+' object is not (iterable|subscriptable|callable)"
    r"|can only concatenate \w+ \(not \"\w+\"\) to \w+"
    r"|unsupported operand type\(s\) for \S+: '\w+' and '\w+'"
)
_FILENAME = "<template>"  # what jinja2 calls a template that came as a string


class ChatTemplate:
    """A compiled template. Raises PromptError, with the line, for one that is not valid."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        failure = ""
        try:
            self._tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except Exception as error:  # a stranger's template can do anything to a compiler
            failure = self._explain(error)
        if failure:
            raise PromptError(failure)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        return frozenset(find_undeclared_variables(self._tree))

    @property
    def literal_text(self) -> str:
        """All text that stands in the template, apart by NUL: what it writes itself, and what it compares with."""
        written = {node.data for node in self._tree.find_all(nodes.TemplateData)}
        written |= {node.value for node in self._tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return "\0".join(sorted(written))

    def render(self, values: Mapping[str, object]) -> Traced:
        """The text of a conversation. Raises PromptError, which names the line and what is missing, never a value."""
        try:
            return cast(Traced, self._template.render(values))
        except Exception as error:  # a stranger's code can raise anything
            failure = self._explain(error)
        # Raised here and not in the handler: the error of the template may hold the prompt, and is not chained.
        raise PromptError(failure)

    def _explain(self, error: Exception) -> str:
        line = _line(error)
        where = "the chat template" if line is None else f"line {line} of the chat template"
        if isinstance(error, _Refusal):
            reason = f": {printable(error.reason)}" if error.reason else ""
            return f"the chat template refuses this conversation{'' if line is None else f' (line {line})'}{reason}"
        return f"{where} fails: {printable(self._what(error))}"

    def _what(self, error: Exception) -> str:
        """What went wrong, in words of the template alone: those of Python may repeat the prompt."""
        if isinstance(error, TemplateSyntaxError):
            return error.message or "a syntax error"  # made from the source alone
        if type(error) is UndefinedError and isinstance(error.message, Traced):
            return error.message  # _Absent made it
        if isinstance(error, TemplateRuntimeError):
            for kind, node in (("filter", nodes.Filter), ("test", nodes.Test)):
                known = self._environment.filters if kind == "filter" else self._environment.tests
                for used in self._tree.find_all(node):
                    if used.name not in known and f"{kind} named {used.name!r}" in str(error):
                        return f"there is no {kind} {used.name}"
        kinds = isinstance(error, TypeError) and _KINDS.fullmatch(str(error))
        return f"{type(error).__name__}: {kinds[0].replace('Traced', 'str')}" if kinds else type(error).__name__


def _line(error: Exception) -> int | None:
    """The line of the template where an error arose, the innermost of those that led there."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == _FILENAME]
    return lines[-1] if lines else None


class _Refusal(TemplateError):
    """The template called ``raise_exception``. ``reason``: its own words, with … for each part that is not its own."""

    def __init__(self, reason: object) -> None:
        super().__init__()
        self.reason = _own_words(reason) if isinstance(reason, Traced) else ""


def _own_words(text: Traced) -> str:
    words = ""
    for character, own in zip(str.__str__(text), origin(text), strict=True):
        words += character if own else "" if words.endswith("…") else "…"
    return "" if words == "…" else words


class _Absent(Undefined):
    """A value that is not there. Its error names it if the template does, not if the name was computed."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        name, owner = self._undefined_name, self._undefined_obj
        if name is None:
            return own_text(str(self._undefined_hint or "a value is undefined"))  # jinja2's own, of an empty sequence
        if owner is missing:
            return own_text(f"{str(name)!r} is undefined")
        kind = "str" if isinstance(owner, str) else type(owner).__name__
        # A number is no part of a text; a text that is not the template's own may be the prompt.
        shown = repr(name) if is_own(name) or isinstance(name, int) else "that was asked for"
        return own_text(f"a {kind} has no element {shown}")


class _CodeGenerator(CodeGenerator):
    """Jinja2's compiler, with every literal of the template marked as its own, and no step that forgets the marks."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.own_text({super()._output_const_repr(group)})"

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write("environment.traced(")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        self.write(_literal(node.as_const(frame.eval_ctx)))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:  # noqa: N802
        self.write("environment.getattr(")
        self.visit(node.node, frame)
        self.write(f", environment.own_text({node.attr!r}))")


def _literal(value: object) -> str:
    """Python source of a constant; jinja2 folds lists and mappings of constants into one."""
    match value:
        case Markup():  # of the filter `safe`: a kind of its own, which escapes what is added to it
            return f"environment.own_safe({str.__repr__(value)})"
        case str():
            return f"environment.own_text({str.__repr__(value)})"
        case tuple() | list():
            items = "".join(f"{_literal(item)}, " for item in value)
            return f"({items})" if isinstance(value, tuple) else f"[{items}]"
        case dict():
            return f"{{{''.join(f'{_literal(key)}: {_literal(item)}, ' for key, item in value.items())}}}"
        case float():
            return str(value)
        case _:
            return repr(value)


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: the assistant's words, marked for training; not changed."""

    tags = {"generation"}  # noqa: RUF012  (as the library declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The names and options of transformers' environment. Templates reach none of the attributes added here."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(join_traced)
    own_text = staticmethod(own_text)
    own_safe = staticmethod(lambda text: TracedMarkup(own_text(text)))
    traced = staticmethod(traced)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            undefined=_Absent,
            cache_size=0,
        )
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        self.filters["safe"] = TracedMarkup
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _PlainNamespace

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What ``text.format`` is in a template; of the template's own texts it keeps the origin of each part."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format" or not is_own(value.__self__):
            return wrapped

        def format_own(*args: Any, **kwargs: Any) -> str:
            text = str.__str__(wrapped(*args, **kwargs))
            known = join_traced(self._formatted(value.__self__, args, kwargs))
            return known if known == text else text  # a pattern of another kind: the text counts as the user's

        return format_own

    def _formatted(self, pattern: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[object]:
        """The parts of a formatted text, where no field has a width or another option."""
        formatter, automatic = SandboxedFormatter(self), count()
        for literal, field, _, _ in formatter.parse(pattern):
            yield own_text(literal)
            if field is not None:
                numbered = f"{next(automatic)}{field}" if field[:1] in ("", ".", "[") else field
                yield formatter.get_field(numbered, args, kwargs)[0]


def _refuse(message: object) -> None:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:  # the name that templates may use
    return datetime.now().strftime(format)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter that jinja2 brings escapes for HTML. The text counts as the user's, with all that it holds."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja2's own, which would forget the marks for want of a separator that has some."""
    parts = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    texts = [traced(part) for part in parts]
    separator = own_text("") if type(d) is str and not d else traced(d)
    return separator.join(texts)


class _Dict:
    """``dict`` for templates: callable, and no class whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """``namespace`` for templates: no name in it begins with an underscore, as Python's inner ones do."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name one of its values `self`
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_inner(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_inner(name)
        Namespace.__setitem__(self, name, value)


def _refuse_inner(name: object) -> None:
    from jinja2.exceptions import SecurityError

    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace has no names that begin with an underscore")
