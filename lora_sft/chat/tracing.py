"""Messages and a chat template → the text, and for every character the message that it was written for.

The template is compiled once, in transformers' own sandboxed environment, with three changes to its syntax tree: every
piece of the template's own text asks which message is being written when it is used, every loop says at each turn
which message that is, and `~` keeps what it joins. The strings of the messages are `Traced`: they carry the message
of each of their characters through concatenation, slicing, stripping, splitting, replacing, joining and filters.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, SupportsIndex

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

NOBODY = -1
"""Origin of a character that was written for no message (a preamble, the tools)."""


class Trace:
    """What is being written right now. One for each rendering."""

    def __init__(self) -> None:
        self.message = NOBODY  # index of the message whose turn in a loop it is
        self.saved: list[int] = []
        self.indices: dict[int, int] = {}  # id of a message → its index

    def template_origin(self) -> int:
        """Origin of a character of the template's own: even numbers; those of a message's own words are odd."""
        return NOBODY if self.message == NOBODY else 2 * self.message


def own_words(index: int) -> int:
    """Origin of a character that stands in a message."""
    return 2 * index + 1


class Traced(str):
    """Text that knows the origin of each of its characters; every method of `str` that makes text keeps it."""

    origins: list[int]
    trace: Trace

    def __new__(cls, text: str, origins: list[int], trace: Trace) -> "Traced":
        self = super().__new__(cls, text)
        self.origins, self.trace = origins, trace
        return self

    def _part(self, start: int, stop: int) -> "Traced":
        return Traced(str.__getitem__(self, slice(start, stop)), self.origins[start:stop], self.trace)

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self.origins + origins_of(other, self.trace), self.trace)

    def __radd__(self, other: str) -> "Traced":
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(str(other), self), origins_of(other, self.trace) + self.origins, self.trace)

    def __mul__(self, times: SupportsIndex) -> "Traced":
        return Traced(str.__mul__(self, times), self.origins * times.__index__(), self.trace)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> "Traced":
        origins = self.origins[key]
        return Traced(str.__getitem__(self, key), origins if isinstance(key, slice) else [origins], self.trace)

    def __iter__(self) -> Iterator["Traced"]:
        return (self._part(index, index + 1) for index in range(len(self)))

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self._part(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Traced":
        return self._part(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Traced":
        return self._part(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _pieces(self, pieces: Sequence[str]) -> list["Traced"]:
        """Parts of this text that stand in it in this order → the same parts, traced."""
        found, position = [], 0
        for piece in pieces:
            position = self.index(piece, position)
            found.append(self._part(position, position + len(piece)))
            position += len(piece)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Traced"]:  # type: ignore[override]
        pieces = str.split(self, sep, maxsplit)
        if sep is None:
            return self._pieces(pieces)
        found, position = [], 0
        for piece in pieces:
            found.append(self._part(position, position + len(piece)))
            position += len(piece) + len(sep)
        return found

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Traced"]:  # type: ignore[override]
        pieces = str.rsplit(self, sep, maxsplit)
        found, position = [], len(self)
        for piece in reversed(pieces):
            position = self.rindex(piece, 0, position) if sep is None else position - len(piece)
            found.append(self._part(position, position + len(piece)))
            position -= 0 if sep is None else len(sep)
        return found[::-1]

    def splitlines(self, keepends: bool = False) -> list["Traced"]:  # type: ignore[override]
        found, position = [], 0
        for whole, shown in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            found.append(self._part(position, position + len(shown)))
            position += len(whole)
        return found

    def partition(self, sep: str) -> tuple["Traced", "Traced", "Traced"]:
        return self._cut(self.find(sep), sep, at_end=True)

    def rpartition(self, sep: str) -> tuple["Traced", "Traced", "Traced"]:
        return self._cut(self.rfind(sep), sep, at_end=False)

    def _cut(self, found: int, sep: str, at_end: bool) -> tuple["Traced", "Traced", "Traced"]:
        if found < 0:
            nothing = self._part(0, 0)
            return (self, nothing, nothing) if at_end else (nothing, nothing, self)
        end = found + len(sep)
        return self._part(0, found), self._part(found, end), self._part(end, len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Traced":
        if not old:
            return self._same(str.replace(self, old, new, count))
        # What is put in stands for what it replaces.
        found, position, left = self._part(0, 0), 0, count.__index__()
        while left and (place := self.find(old, position)) >= 0:
            owner = self.origins[place]
            found = found + self._part(position, place) + Traced(str.__str__(new), [owner] * len(new), self.trace)
            position, left = place + len(old), left - 1
        return found + self._part(position, len(self))

    def join(self, parts: Iterable[str]) -> "Traced":
        return join(parts, self, self.trace)

    def _same(self, text: str) -> "Traced":
        """Text made out of this one, character for character if the length is the same."""
        if len(text) == len(self):
            return Traced(text, self.origins, self.trace)
        owner = max(self.origins, default=self.trace.template_origin())
        return Traced(text, [owner] * len(text), self.trace)

    def upper(self) -> "Traced":
        return self._same(str.upper(self))

    def lower(self) -> "Traced":
        return self._same(str.lower(self))

    def title(self) -> "Traced":
        return self._same(str.title(self))

    def capitalize(self) -> "Traced":
        return self._same(str.capitalize(self))

    def swapcase(self) -> "Traced":
        return self._same(str.swapcase(self))

    def casefold(self) -> "Traced":
        return self._same(str.casefold(self))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> "Traced":
        return self._same(str.expandtabs(self, tabsize))


def origins_of(text: str, trace: Trace) -> list[int]:
    """The origins of traced text; of other text the message that is being written now."""
    return text.origins if isinstance(text, Traced) else [trace.template_origin()] * len(text)


def join(parts: Iterable[Any], separator: str, trace: Trace) -> Traced:
    """`separator.join(parts)`, traced."""
    texts: list[str] = []
    origins: list[int] = []
    between = origins_of(separator, trace)
    for number, part in enumerate(parts):
        if number and separator:
            texts.append(str.__str__(separator))
            origins += between
        part = part if isinstance(part, str) else str(part)
        texts.append(part)
        origins += origins_of(part, trace)
    return Traced("".join(texts), origins, trace)


class _Marks(NodeTransformer):
    """Adds the three kinds of calls to a template's syntax tree."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return _call("_here", nodes.Const(node.data))

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [
            _call("_here", self.visit(child)) if isinstance(child, nodes.Const) else self.visit(child)
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("_join", nodes.List(node.nodes))

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        names = [name.name for name in node.target.find_all(nodes.Name)] if isinstance(node.target, nodes.Tuple) else []
        names = names or ([node.target.name] if isinstance(node.target, nodes.Name) else [])
        node.body = [nodes.ExprStmt(_call("_turn", nodes.Name(name, "load"))) for name in names] + node.body
        return [nodes.ExprStmt(_call("_enter")), node, nodes.ExprStmt(_call("_leave"))]

    def visit_Assign(self, node: nodes.Assign) -> list[nodes.Node]:
        """`{% set message = messages[i] %}` is a turn too, inside a loop."""
        self.generic_visit(node)
        if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Getitem):
            return [node, nodes.ExprStmt(_call("_turn_in_loop", nodes.Name(node.target.name, "load")))]
        return [node]


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


class TracedTemplate:
    """A chat template compiled to be traced. Use `compile_traced`, which keeps them."""

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.plain = _compile_jinja_template(source)
        environment = self.plain.environment.overlay()
        assert isinstance(environment, ImmutableSandboxedEnvironment)
        self._trace = Trace()
        environment.globals = {
            **environment.globals,
            "_here": self._here,
            "_join": lambda parts: join(parts, "", self._trace),
            "_turn": self._turn,
            "_turn_in_loop": lambda value: self._turn(value) if self._trace.saved else None,
            "_enter": self._enter,
            "_leave": self._leave,
        }
        environment.filters = {
            **environment.filters,
            "join": self._join_filter,
            "tojson": self._tojson,
            "string": lambda value: value if isinstance(value, str) else str(value),
        }
        environment.concat = lambda parts: join(parts, "", self._trace)  # type: ignore[method-assign]
        tree = _Marks().visit(environment.parse(source))
        code = environment.compile(tree)
        self.template = Template.from_code(environment, code, environment.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Traced:
        """The text with the origin of each character."""
        self._trace = trace = Trace()
        copies = [_traced_message(message, index, trace) for index, message in enumerate(messages)]
        trace.indices = {id(copy): index for index, copy in enumerate(copies)}
        context = self.template.new_context({**variables, "messages": copies})
        pieces = []
        for piece in self.template.root_render_func(context):
            pieces.append(
                piece
                if isinstance(piece, Traced)
                else Traced(str(piece), [trace.template_origin()] * len(piece), trace)
            )
        return join(pieces, "", trace)

    def plain_text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text as transformers renders it."""
        return str(self.plain.render(**{**variables, "messages": list(messages)}))

    def _here(self, text: Any) -> Any:
        return Traced(text, [self._trace.template_origin()] * len(text), self._trace) if type(text) is str else text

    def _turn(self, value: Any) -> str:
        index = self._trace.indices.get(id(value))
        if index is not None:
            self._trace.message = index
        return ""

    def _enter(self) -> str:
        self._trace.saved.append(self._trace.message)
        return ""

    def _leave(self) -> str:
        self._trace.message = self._trace.saved.pop()
        return ""

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> Traced:
        parts = (
            value
            if attribute is None
            else [item[attribute] if isinstance(item, Mapping) else getattr(item, attribute) for item in value]
        )
        return join(parts, d, self._trace)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> Traced:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        owner = max(_owners(value), default=self._trace.template_origin())
        return Traced(text, [owner] * len(text), self._trace)


def _owners(value: Any) -> Iterator[int]:
    """Origins of all text in a value."""
    if isinstance(value, Traced):
        yield from value.origins[:1]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _owners(key)
            yield from _owners(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _owners(item)


def _traced_message(message: Mapping[str, Any], index: int, trace: Trace) -> dict[str, Any]:
    """A copy whose strings are traced, all but the role: who speaks is the template's to write."""

    def copy(value: Any) -> Any:
        if isinstance(value, str):
            return Traced(value, [own_words(index)] * len(value), trace)
        if isinstance(value, Mapping):
            return {copy(key): copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(item) for item in value]
        return value

    return {key: (item if key in ("role", "name") else copy(item)) for key, item in message.items()}


@lru_cache(maxsize=64)
def compile_traced(source: str) -> TracedTemplate:
    """A template compiled to be traced; the same source is compiled once."""
    return TracedTemplate(source)
