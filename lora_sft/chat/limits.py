"""A template's syntax tree and environment → the same, with everything that it makes weighed and its time counted.

A chat template comes with a model, from anybody. Jinja's sandbox keeps it from running code, but not from looping for
ever or filling the memory, and where one operation takes minutes no clock in this process can stop it. So a value is
weighed when it is made, and refused before it is made where one step can make much out of little. Whatever makes one
is wrapped: operators, calls, filters, literals, and the putting together of text. `docs/reliability.md` has the cases.
"""

import re
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lora_sft.chat.traced import Traced
from lora_sft.errors import TemplateError

SOURCE = 2**18
"""Characters of a template; the longest published ones have a tenth of it."""
PARTS = 2**14
"""Of a template's syntax tree; the longest published one (Gemma 4's) has 1,379."""
WEIGHT = 2**20
"""Characters, and items of lists, that a value may have, beside four times what the messages hold."""
BITS = 4096
"""Of a whole number."""
SECONDS = 1.5
"""Of this thread's processor time, for one rendering; another second for every four million characters it is given."""
GROWTH = 2**29
"""Bytes by which the process may grow in one rendering."""
LOOK, STEP = 2**16, 2**6
"""Weight between two looks at clock and memory, and what a step weighs that makes nothing."""
AT_ONCE = 16
"""Operands of one `+` or `~` that are put together before they are weighed."""

HARMLESS = frozenset(
    ("length", "count", "trim", "first", "last", "default", "d", "string", "upper", "lower", "capitalize", "int")
)
"""Filters whose result is no larger than what they are given; some are written often."""
SLOW = frozenset(
    (
        *("striptags", "urlize", "wordwrap", "pprint", "xmlattr", "title", "wordcount", "urlencode"),
        *("sum", "unique", "groupby", "sort"),
    )
)
"""Filters that may take a square of the length."""
SHORT = 2**16
"""Weight that those may be given, beside what the messages hold."""

WIDENING = frozenset(
    (
        *("replace", "join", "expandtabs", "translate", "center", "ljust", "rjust", "zfill", "to_bytes"),
        *("format", "format_map"),
    )
)
"""Methods of strings and numbers that can make much out of little."""

METHODS = (BuiltinMethodType, MethodType, FunctionType)
"""What a method may be; the sandbox wraps `format` in a function."""

WIDENING_FILTERS = frozenset(
    (
        *("replace", "join", "indent", "tojson", "wordwrap", "format", "round", "sum", "center", "batch", "slice"),
        *("truncate", "xmlattr", "urlize"),
    )
)
"""Filters that can."""

WIDTHS = {
    "%": re.compile(r"%(?:\([^)%]{0,200}\))?([^%a-zA-Z]{0,40})"),
    "{": re.compile(r"\{([^{}]*)\}"),
}
"""The fields of the two kinds of format strings."""


class Limits:
    """What one template may use; `begin` starts the count of one rendering.

    Once it was refused it stays refused: the same template is rendered many times in a run.

    Attributes:
        left: what may be made until the clock and the memory are looked at again; counted down by whoever makes.
    """

    __slots__ = ("_allowed", "_given", "_known", "_looks", "_since", "left", "refusal")

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.left = LOOK
        self._given: Any = ()
        self._since: tuple[float, int] | None = None
        self._looks = 0
        self._allowed: int | None = None
        self._known: dict[int, tuple[Any, int]] = {}

    def take(self, tree: nodes.Template) -> None:
        """Looks at a template before it is compiled, which takes a while for each of its parts.

        Raises:
            TemplateError: it has too many.
        """
        found = sum(1 for _ in tree.find_all(nodes.Node))
        if found > PARTS:
            self.refuse(f"has {found:,} statements and expressions")

    def begin(self, given: Any) -> None:
        """A rendering of these messages and variables begins.

        Raises:
            TemplateError: an earlier one was refused.
        """
        if self.refusal:
            raise TemplateError(self.refusal)
        self.left, self._given, self._since, self._looks, self._allowed = LOOK, given, None, 0, None
        self._known.clear()

    def refuse(self, what: str) -> None:
        """Raises TemplateError, now and at every later `begin`."""
        self.refusal = (
            f"the chat template {what}, which no conversation needs, and was stopped; choose another with "
            "chat_template (`lora-sft templates` lists ours)"
        )
        raise TemplateError(self.refusal)

    @property
    def allowed(self) -> int:
        """The weight that a value may have in this rendering."""
        if self._allowed is None:
            self._allowed = WEIGHT + 4 * weight_of(self._given, {})
        return self._allowed

    def look(self, weight: int = 0) -> None:
        """Looks at the clock, the memory, and at a value of this weight that was made."""
        if weight > WEIGHT and weight > self.allowed:
            self.refuse(f"makes a value of more than {self.allowed:,} characters or items")
        if self.left > 0:
            return
        self.left, self._looks = LOOK, self._looks + 1
        now = (time.thread_time(), _bytes_held())
        self._since = since = self._since or now
        seconds = now[0] - since[0]
        if seconds > SECONDS and seconds > SECONDS + (self.allowed - WEIGHT) / 2**24:
            self.refuse(f"takes longer than {seconds:.0f} s")
        if now[1] - since[1] > GROWTH or (now[1] == 0 and self._looks * LOOK * 8 > GROWTH):
            self.refuse(f"takes more than {GROWTH / 2**20:.0f} MiB of memory")

    def made(self, value: Any) -> Any:
        """A value was made: it must not be too heavy, nor all of them together."""
        kind: type = type(value)
        weight = len(value) if kind is str or kind is Traced else self.weigh(value)
        self.left -= weight + STEP
        if self.left < 0 or weight > WEIGHT:
            self.look(weight)
        return value

    def expects(self, weight: float) -> None:
        """A value is about to be made that may have this weight."""
        if weight > 8 * WEIGHT and weight > 8 * self.allowed:
            self.refuse(f"would make a value of more than {8 * self.allowed:,} characters or items")

    def weigh(self, value: Any) -> int:
        """Characters and items in a value, each counted as often as it would be printed."""
        if isinstance(value, int):
            if value.bit_length() > BITS:
                self.refuse(f"makes a number of more than {BITS} bits")
            return 1
        return weight_of(value, self._known)


def weight_of(value: Any, known: dict[int, tuple[Any, int]]) -> int:
    """As `Limits.weigh`; `known` keeps the heavy ones, so that one in another is not counted anew."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        parts: Any = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return 1
    if id(value) in known:
        return known[id(value)][1]
    weight = 1 + sum(weight_of(part, known) for part in parts)
    if weight > 1000:
        known[id(value)] = (value, weight)
    return weight


def _bytes_held() -> int:
    """Memory of this process; 0 where the system does not tell as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


# --- the syntax tree ------------------------------------------------------------------------------------


class Weighed(NodeTransformer):
    """Sends everything that makes a value through `Limits`, by filters whose names no template can write."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_filter(nodes.Const(None), " tick")), *node.body]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        operands = _operands(node)
        if all(isinstance(one, nodes.Const) for one in operands):
            return node
        made = self.visit(operands[0])
        for number, operand in enumerate(operands[1:], 1):
            made = nodes.Add(made, self.visit(operand))
            if number % AT_ONCE == 0:
                made = _filter(made, " made")
        return _filter(made, " made")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        parts = [self.visit(part) for part in node.nodes]
        while len(parts) > AT_ONCE:
            parts = [_filter(nodes.Concat(parts[:AT_ONCE]), " made"), *parts[AT_ONCE:]]
        return _filter(nodes.Concat(parts), " made")

    def _operator(self, node: nodes.BinExpr) -> nodes.Expr:
        return _filter(self.visit(node.left), f" {type(node).__name__}", self.visit(node.right))

    visit_Mul = visit_Pow = visit_Mod = _operator

    def _literal(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        is_constant = all(isinstance(one, (nodes.Const, nodes.Pair)) for one in node.items) and all(
            isinstance(one.value, nodes.Const) for one in node.items if isinstance(one, nodes.Pair)
        )
        return node if is_target or is_constant else _filter(node, " made")

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        is_slice = isinstance(node.arg, nodes.Slice)
        self.generic_visit(node)
        return _filter(node, " took") if is_slice else node


def _operands(node: nodes.Node) -> list[nodes.Expr]:
    """`a + b + c` → a, b, c."""
    found: list[Any] = []
    while isinstance(node, nodes.Add):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _filter(value: Any, name: str, *others: Any) -> nodes.Filter:
    return nodes.Filter(value, name, list(others), [], None, None)


# --- the environment ------------------------------------------------------------------------------------


def limited(environment: ImmutableSandboxedEnvironment, limits: Limits) -> None:
    """Has an environment weigh what its templates make. Its trees must have been through `Weighed`.

    Filters whose names begin with `_` are ours, for tracing.
    """
    environment.filters = {
        name: one if name in HARMLESS or name.startswith("_") else _weighed_filter(name, one, limits)
        for name, one in environment.filters.items()
    } | _filters_of(limits)
    environment.globals = {name: one for name, one in environment.globals.items() if name != "lipsum"}
    environment.globals["namespace"] = _printed_as_a_name(environment.globals["namespace"])  # type: ignore[arg-type]
    put_together, is_safe = environment.concat, environment.is_safe_callable

    def limited_call(context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # As the sandbox's own, which would be one more call for each call.
        if not is_safe(function):
            raise SecurityError(f"{function!r} is not safely callable")
        if type(function) in METHODS and function.__name__ in WIDENING:
            args = _expect_of_method(limits, function, args, kwargs)
        value = context.call(function, *args, **kwargs)
        kind: type = type(value)
        if kind is bool:
            limits.left -= STEP
        elif kind is str or kind is Traced:
            limits.left -= len(value) + STEP
            if len(value) > WEIGHT:
                limits.look(len(value))
        else:
            return limits.made(value)
        if limits.left < 0:
            limits.look()
        return value

    def limited_concat(pieces: Any) -> str:
        if type(pieces) is not list:
            pieces = list(pieces)
        if len(pieces) > AT_ONCE:
            limits.expects(sum(map(len, pieces)))
        text = put_together(pieces)
        limits.left -= len(text)
        if limits.left < 0 or len(text) > WEIGHT:
            limits.look(len(text))
        return text

    # Attributes of this one environment, where compiled templates look for them.
    environment.call = limited_call  # type: ignore[method-assign]
    environment.concat = limited_concat  # type: ignore[method-assign]


def _printed_as_a_name(namespace: type) -> type:
    """A namespace may be changed after it was put into a value that was weighed, so what it holds is not printed."""
    return type("namespace", (namespace,), {"__repr__": lambda self: "<Namespace>"})


def _filters_of(limits: Limits) -> dict[str, Callable[..., Any]]:
    """What `Weighed` writes. Since they are passed the context, Jinja does not compute them while it compiles."""

    @pass_context
    def tick(_: Context, nothing: None) -> str:
        limits.left -= STEP
        if limits.left < 0:
            limits.look()
        return ""

    @pass_context
    def made(_: Context, value: Any) -> Any:
        return limits.made(value)

    @pass_context
    def took(_: Context, value: Any) -> Any:
        limits.left -= len(value) if hasattr(value, "__len__") else 1
        if limits.left < 0:
            limits.look()
        return value

    @pass_context
    def times(_: Context, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and not isinstance(other, (int, float)):
                limits.expects(one * limits.weigh(other))
        return limits.made(left * right)

    @pass_context
    def power(_: Context, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > BITS:
            limits.refuse(f"makes a number of more than {BITS} bits")
        return limits.made(left**right)

    @pass_context
    def modulo(_: Context, left: Any, right: Any) -> Any:
        if isinstance(left, (str, bytes)):
            _expect_format(limits, left, "%", [right])
        return limits.made(left % right)

    return {" tick": tick, " made": made, " took": took, " Mul": times, " Pow": power, " Mod": modulo}


def _weighed_filter(name: str, function: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    """A filter that is passed the context besides what it asks for, so that it is never computed while compiling."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    is_slow, widens, reads_all = name in SLOW, name in WIDENING_FILTERS, name in ("join", "list", "sum")

    @pass_context
    @wraps(function)
    def weighed(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if reads_all and not hasattr(value, "__len__"):
            value = limits.made(list(value))
        if is_slow and limits.weigh(value) > SHORT + limits.allowed - WEIGHT:
            limits.refuse(f"gives the filter {name} more than {SHORT:,} characters or items")
        if widens:
            _expect(limits, name, value, [*args, *kwargs.values()])
        if wants is None:
            return limits.made(function(value, *args, **kwargs))
        first = {"context": context, "environment": context.environment, "eval_context": context.eval_ctx}
        return limits.made(function(first[wants], value, *args, **kwargs))

    del weighed.__wrapped__
    return weighed


def _expect_of_method(
    limits: Limits, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Of a method that can make much out of little; its arguments, an iterator among them written out."""
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps `format`
    if not isinstance(owner, (str, bytes, int)):
        return args
    name, given = function.__name__, [*args, *kwargs.values()]
    if name in ("format", "format_map"):
        _expect_format(limits, owner, "{", given)
    elif name == "join" and args and not hasattr(args[0], "__len__"):
        args = (limits.made(list(args[0])),)
        given = list(args)
    if name not in ("format", "format_map"):
        _expect(limits, name, owner, given)
    return args


def _expect(limits: Limits, name: str, value: Any, given: list[Any]) -> None:
    """What a method of a string or a number, or a filter, may make out of what it is given."""
    number = max([abs(one) for one in given if isinstance(one, (int, float))], default=0)
    words: list[Any] = [one for one in given if isinstance(one, (str, bytes))]
    if name == "replace" and len(words) > 1 and isinstance(value, (str, bytes)):
        text: Any = value
        limits.expects(text.count(words[0]) * len(words[1]))
    elif name == "join":
        separator, parts = (given or [""])[0], value
        if isinstance(value, (str, bytes)) and not isinstance(separator, (str, bytes)):
            separator, parts = value, separator  # the method, not the filter
        limits.expects(limits.weigh(parts) + len(parts) * limits.weigh(separator))
    elif name in ("expandtabs", "indent", "tojson", "wordwrap"):
        limits.expects(limits.weigh(value) * (1 + number + max(map(len, words), default=0)))
    elif name in ("format", "translate"):
        _expect_format(limits, str(value), "%", given)
        limits.expects(limits.weigh(value) * (2**20 if name == "translate" else 1))
    elif name == "round" and number > 1000:
        limits.refuse(f"rounds to {number} digits")
    elif name == "sum" and any(not isinstance(one, (int, float, str)) for one in given):
        limits.expects(limits.weigh(value) ** 2)
    elif number > 2**16:
        limits.expects(number)


def _expect_format(limits: Limits, form: Any, mark: str, given: list[Any]) -> None:
    """What a format string may make: a width in each of its fields, or each time the longest of what it is given."""
    form = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    if re.search(r"%[^%\w]*\*|\{[^{}]*\{", form):
        limits.refuse("takes the width of a format from a value")
    fields = WIDTHS[mark].findall(form)
    widths = sum(int(digits) for digits in re.findall(r"\d{1,12}", " ".join(fields)))
    limits.expects(len(form) + widths + len(fields) * sum(map(limits.weigh, given)))
