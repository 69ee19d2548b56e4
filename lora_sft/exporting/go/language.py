"""A Go template's text and its data → what Go's text/template writes, for the part of the language that we generate.

Users have no Go toolchain, so the proof of an exported template needs this reader. It knows literal text, `{{-` and
`-}}`, `if`, `else if`, `else`, `range`, `break`, variables, fields, string and whole-number constants, and the
functions in `_FUNCTIONS`; anything else is an error. As in Go a string is UTF-8 bytes: `len` and `slice` count those.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

Value = Any
"""bytes (Go's string), int, bool, list or dict."""


class GoTemplateError(ValueError):
    """A template that Go would not take, or that uses what this reader does not know."""


class _Break(Exception):  # noqa: N818 - control flow, no error
    """`{{ break }}` was reached."""


@dataclass
class _Scope:
    """Variables; an inner block sees and may set those of the outer ones."""

    names: dict[str, Value]
    outer: "_Scope | None" = None

    def holder(self, name: str) -> dict[str, Value]:
        """The names among which this one is declared."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names
            scope = scope.outer
        raise GoTemplateError(f"undefined variable {name}")


Expression = Callable[[Value, _Scope], Value]


@dataclass
class _Block:
    """A list of statements, each of which appends to the output."""

    statements: list[Callable[[Value, _Scope, list[bytes]], None]] = field(default_factory=list)

    def run(self, dot: Value, scope: _Scope, out: list[bytes]) -> None:
        for statement in self.statements:
            statement(dot, scope, out)


def execute(template: str, data: Mapping[str, Any]) -> str:
    """What the template writes.

    Args:
        template: Go text/template source.
        data: the dot at the top; strings in it are str.

    Raises:
        GoTemplateError: a mistake in the template, or something that this reader does not know.
    """
    dot, out = _as_go(data), list[bytes]()
    _parsed(template).run(dot, _Scope({"$": dot}), out)
    return b"".join(out).decode("utf-8", "replace")


def _as_go(value: Any) -> Value:
    """str becomes bytes, all the way down."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Mapping):
        return {key: _as_go(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_go(item) for item in value]
    return value


# Functions


def _truth(value: Value) -> bool:
    return bool(value)


def _equal(first: Value, *others: Value) -> bool:
    for other in others:
        if type(first) is not type(other):
            raise GoTemplateError("eq: incompatible types for comparison")
    return any(first == other for other in others)


def _slice(value: Value, *bounds: int) -> Value:
    first, last = (bounds[0] if bounds else 0), (bounds[1] if len(bounds) > 1 else len(value))
    if not 0 <= first <= last <= len(value):
        raise GoTemplateError(f"slice: index out of range: {first}:{last} of {len(value)}")
    return value[first:last]


def _printf(form: bytes, text: bytes) -> bytes:
    """Only `%.Ns`: the first N runes; a byte that belongs to no rune counts as one."""
    known = re.fullmatch(rb"%\.(\d+)s", form)
    if not known:
        raise GoTemplateError(f"printf {form!r} is not known here")
    count = int(known.group(1))
    start = text[: 4 * count + 3].decode("utf-8", "surrogateescape")
    return start[:count].encode("utf-8", "surrogateescape")


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "not": lambda value: not _truth(value),
    "ge": lambda first, second: first >= second,
    "len": len,
    "slice": _slice,
    "index": lambda value, place: value[place],
    "printf": _printf,
}

# Reading

_TOKEN = re.compile(r'\s+|"(?:[^"\\\n]|\\.)*"|\d+|:=|[=|(),]|\$?\w*(?:\.\w+)+|\.|\$\w*|\w+')
_ESCAPE = re.compile(r'\\(?:([abfnrtv\\"])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))')
_PLAIN = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}
_SPACE = " \t\r\n"


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """("text", …) and ("action", …) in turn, trimmed."""
    place, trims = 0, False
    while place < len(template):
        start = template.find("{{", place)
        text = template[place:] if start < 0 else template[place:start]
        text = text.lstrip(_SPACE) if trims else text
        if start < 0:
            yield "text", text
            return
        end = _end_of_action(template, start + 2)
        inside = template[start + 2 : end]
        if re.match(r"-\s", inside):
            text, inside = text.rstrip(_SPACE), inside[1:]
        trims = re.search(r"\s-$", inside) is not None
        yield "text", text
        yield "action", (inside[:-1] if trims else inside).strip()
        place = end + 2


def _end_of_action(template: str, place: int) -> int:
    """Where the `}}` of an action stands; one inside a string does not count."""
    for found in re.compile(r'"(?:[^"\\\n]|\\.)*"|\}\}').finditer(template, place):
        if found.group() == "}}":
            return found.start()
    raise GoTemplateError("unclosed action")


@lru_cache(maxsize=32)
def _parsed(template: str) -> _Block:
    reader = _Reader(list(_pieces(template)))
    block, ended_by = reader.block()
    if ended_by:
        raise GoTemplateError(f"unexpected {{{{ {ended_by} }}}}")
    return block


class _Reader:
    """Pieces → statements."""

    def __init__(self, pieces: Sequence[tuple[str, str]]) -> None:
        self.pieces = iter(pieces)

    def block(self) -> tuple[_Block, str]:
        """Statements up to the `end` or `else …` that closes them; "" at the end of the template."""
        block = _Block()
        for kind, text in self.pieces:
            if kind == "text":
                if text:
                    block.statements.append(_writes(text.encode()))
                continue
            word = text.split(maxsplit=1)[0] if text else ""
            rest = text[len(word) :].strip()
            if word in ("end", "else"):
                return block, text
            if word == "if":
                block.statements.append(self._if(rest))
            elif word == "range":
                block.statements.append(self._range(rest))
            elif word == "break":
                block.statements.append(_breaks)
            elif not text.startswith("/*"):
                block.statements.append(_action(text))
        return block, ""

    def _if(self, condition: str) -> Callable[[Value, _Scope, list[bytes]], None]:
        test = _expression(condition)
        then, ended_by = self.block()
        otherwise = _Block()
        if ended_by.startswith("else if "):
            otherwise.statements.append(self._if(ended_by.removeprefix("else if ")))
        elif ended_by == "else":
            otherwise, ended_by = self.block()
        if not ended_by:
            raise GoTemplateError("if without end")

        def run(dot: Value, scope: _Scope, out: list[bytes]) -> None:
            (then if _truth(test(dot, scope)) else otherwise).run(dot, _Scope({}, scope), out)

        return run

    def _range(self, over: str) -> Callable[[Value, _Scope, list[bytes]], None]:
        names, colon, pipeline = over.partition(":=")
        variables = [name.strip() for name in names.split(",")] if colon else []
        items_of = _expression(pipeline if colon else over)
        body, ended_by = self.block()
        if ended_by != "end":
            raise GoTemplateError("range without end")

        def run(dot: Value, scope: _Scope, out: list[bytes]) -> None:
            found = items_of(dot, scope)
            for index, item in enumerate(range(found) if isinstance(found, int) else found):
                values = [index, item] if len(variables) == 2 else [item]
                try:
                    body.run(item, _Scope(dict(zip(variables, values, strict=False)), scope), out)
                except _Break:
                    return

        return run


def _writes(text: bytes) -> Callable[[Value, _Scope, list[bytes]], None]:
    return lambda dot, scope, out: out.append(text)


def _breaks(dot: Value, scope: _Scope, out: list[bytes]) -> None:
    raise _Break


def _action(text: str) -> Callable[[Value, _Scope, list[bytes]], None]:
    """`$name := …`, `$name = …`, or a value that is written."""
    assigned = re.match(r"(\$\w+)\s*(:?=)\s*", text)
    value = _expression(text[assigned.end() :] if assigned else text)

    def run(dot: Value, scope: _Scope, out: list[bytes]) -> None:
        found = value(dot, scope)
        if assigned is None:
            out.append(found if isinstance(found, bytes) else str(found).encode())
        else:
            name, sign = assigned.groups()
            (scope.names if sign == ":=" else scope.holder(name))[name] = found

    return run


def _expression(text: str) -> Expression:
    """A command: an operand, or a function and its operands."""
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if not found:
            raise GoTemplateError(f"cannot be read here: {text[place:]}")
        place = found.end()
        if found.group().strip():
            tokens.append(found.group())
    expression, rest = _command(tokens)
    if rest:
        raise GoTemplateError(f"unexpected {rest[0]} in {text}")
    return expression


def _command(tokens: list[str]) -> tuple[Expression, list[str]]:
    if not tokens:
        raise GoTemplateError("missing value")
    name, rest = tokens[0], tokens[1:]
    if name not in _FUNCTIONS and name not in ("and", "or"):
        return _operand(tokens)
    operands = []
    while rest and rest[0] != ")":
        operand, rest = _operand(rest)
        operands.append(operand)
    return _call(name, operands), rest


def _call(name: str, operands: list[Expression]) -> Expression:
    if name in ("and", "or"):

        def either(dot: Value, scope: _Scope) -> Value:
            found: Value = None
            for operand in operands:
                found = operand(dot, scope)
                if _truth(found) == (name == "or"):
                    break
            return found

        return either
    function = _FUNCTIONS[name]
    return lambda dot, scope: function(*(operand(dot, scope) for operand in operands))


def _operand(tokens: list[str]) -> tuple[Expression, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        inner, rest = _command(rest)
        if not rest or rest[0] != ")":
            raise GoTemplateError("unclosed parenthesis")
        after = rest[1:]
        if after and re.fullmatch(r"(\.\w+)+", after[0]):  # (index .Messages 0).Role
            return _fields(inner, after[0]), after[1:]
        return inner, after
    if token.startswith('"'):
        text = _unquoted(token)
        return (lambda dot, scope: text), rest
    if token.isdigit():
        number = int(token)
        return (lambda dot, scope: number), rest
    if token in ("true", "false"):
        return (lambda dot, scope: token == "true"), rest
    if token == ".":
        return (lambda dot, scope: dot), rest
    if token.startswith("$"):
        name, dotted, chain = token.partition(".")
        variable: Expression = lambda dot, scope: scope.holder(name)[name]  # noqa: E731
        return (_fields(variable, dotted + chain) if dotted else variable), rest
    if token.startswith("."):
        return _fields(lambda dot, scope: dot, token), rest
    raise GoTemplateError(f"{token} is not known here")


def _fields(of: Expression, chain: str) -> Expression:
    names = chain.strip(".").split(".")

    def value(dot: Value, scope: _Scope) -> Value:
        found = of(dot, scope)
        for name in names:
            found = found[name]
        return found

    return value


def _unquoted(token: str) -> bytes:
    def plain(found: re.Match[str]) -> str:
        letter, *codes = found.groups()
        return _PLAIN[letter] if letter else chr(int(next(code for code in codes if code), 16))

    return _ESCAPE.sub(plain, token[1:-1]).encode()


def quoted(text: str) -> str:
    """A Go string constant that stands for `text`, written in printable characters."""
    known = {symbol: "\\" + letter for letter, symbol in _PLAIN.items()}

    def shown(symbol: str) -> str:
        if symbol in known:
            return known[symbol]
        if symbol.isprintable():
            return symbol
        return f"\\u{ord(symbol):04x}" if ord(symbol) < 0x10000 else f"\\U{ord(symbol):08x}"

    return '"' + "".join(shown(symbol) for symbol in text) + '"'
