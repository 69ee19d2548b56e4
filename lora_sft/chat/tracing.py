"""Messages and a chat template → the text, and for every character the message that it was written for.

The template is compiled once, in transformers' own sandboxed environment, with three changes to its syntax tree: every
piece of the template's own text asks which message is being written when it is used, every loop says at each turn
which message that is, and `~` keeps what it joins. The strings of the messages are `Traced`: they carry the message
of each of their characters through concatenation, slicing, stripping, splitting, replacing, joining and filters.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_context
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lora_sft.chat.forward import reads_forward
from lora_sft.chat.limits import SOURCE, Limits, Weighed, limited
from lora_sft.chat.traced import Trace, Traced, join, own_words

FAILURES = (
    *(JinjaError, SyntaxError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)
"""What a template may raise on messages that it cannot render."""


class _Marks(NodeTransformer):
    """Adds the three kinds of calls to a template's syntax tree."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return _mark("_here", nodes.Const(node.data))

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [
            _mark("_here", self.visit(child)) if isinstance(child, nodes.Const) else self.visit(child)
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _mark("_join", nodes.List(node.nodes))

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        names = [name.name for name in node.target.find_all(nodes.Name)] if isinstance(node.target, nodes.Tuple) else []
        names = names or ([node.target.name] if isinstance(node.target, nodes.Name) else [])
        node.body = [nodes.ExprStmt(_mark("_turn", nodes.Name(name, "load"))) for name in names] + node.body
        nothing = nodes.Const(None)
        return [nodes.ExprStmt(_mark("_enter", nothing)), node, nodes.ExprStmt(_mark("_leave", nothing))]

    def visit_Assign(self, node: nodes.Assign) -> list[nodes.Node]:
        """`{% set message = messages[i] %}` is a turn too, inside a loop."""
        self.generic_visit(node)
        if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Getitem):
            return [node, nodes.ExprStmt(_mark("_turn_in_loop", nodes.Name(node.target.name, "load")))]
        return [node]


def _mark(name: str, value: nodes.Expr) -> nodes.Filter:
    """A mark is a filter: a call would take the long way through the sandbox."""
    return nodes.Filter(value, name, [], [], None, None)


class TracedTemplate:
    """A chat template compiled to be traced. Use `compile_traced`, which keeps them.

    Attributes:
        forward: how its prompts may be put together, or None; see `forward.py`.
        generation_prompts: those that are known already, by the values of the variables that they depend on.
        is_marked: whether the template marks replies itself, with `{% generation %}`.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._limits = Limits()
        if len(source) > SOURCE:
            self._limits.refuse(f"has {len(source):,} characters")
        # Of an empty template: compiling computes what is constant, and what this one has is not weighed yet.
        sandbox = _compile_jinja_template("").environment
        assert isinstance(sandbox, ImmutableSandboxedEnvironment)
        self.plain = self._compiled_in(sandbox, source)
        environment = sandbox.overlay()
        self._trace = Trace()
        environment.filters = {
            **environment.filters,
            "_here": self._here,
            "_join": self._join,
            "_turn": self._turn,
            "_turn_in_loop": self._turn_in_loop,
            "_enter": self._enter,
            "_leave": self._leave,
            "join": self._join_filter,
            "tojson": self._tojson,
            "string": lambda value: value if isinstance(value, str) else str(value),
        }
        environment.concat = lambda parts: join(parts, "", self._trace)  # type: ignore[method-assign]
        tree = environment.parse(source)
        self.forward = reads_forward(tree)
        self.generation_prompts: dict[tuple[str, ...], str] = {}
        self.is_marked = any(_is_generation_block(block) for block in tree.find_all(nodes.CallBlock))
        limited(environment, self._limits)
        tree = _Marks().visit(Weighed().visit(tree))
        code = environment.compile(tree)
        self.template = Template.from_code(environment, code, environment.make_globals(None))

    def _compiled_in(self, sandbox: ImmutableSandboxedEnvironment, source: str) -> Template:
        """The template as transformers compiles it, but weighed."""
        environment = sandbox.overlay()
        for extension in environment.extensions.values():
            if hasattr(extension, "activate_tracker"):  # that of this environment, not of the one that it is laid over
                environment.activate_tracker = extension.activate_tracker  # type: ignore[attr-defined]
        limited(environment, self._limits)
        tree = environment.parse(source)
        self._limits.take(tree)
        tree = Weighed().visit(tree)
        code = environment.compile(tree)
        return Template.from_code(environment, code, environment.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Traced:
        """The text with the origin of each character."""
        self._limits.begin((messages, variables))
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
        self._limits.begin((messages, variables))
        return str(self.plain.render(**{**variables, "messages": list(messages)}))

    def marked_text(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text as transformers renders it, and what stands in the template's own `{% generation %}` blocks."""
        self._limits.begin((messages, variables))
        pieces: list[str] = []
        marks: list[tuple[int, int]] = []
        with self.plain.environment.activate_tracker(pieces, marks):  # type: ignore[attr-defined]
            for piece in self.plain.generate(**{**variables, "messages": list(messages)}):
                pieces.append(piece)
            return self.plain.environment.concat(pieces), marks

    # The marks. What is passed the context is no constant, so Jinja does not compute them while it compiles.

    @pass_context
    def _here(self, _: Context, text: Any) -> Any:
        return Traced(text, [self._trace.template_origin()] * len(text), self._trace) if type(text) is str else text

    @pass_context
    def _join(self, _: Context, parts: list[Any]) -> Traced:
        return join(parts, "", self._trace)

    @pass_context
    def _turn(self, _: Context, value: Any) -> str:
        self._trace.message = self._trace.indices.get(id(value), self._trace.message)
        return ""

    @pass_context
    def _turn_in_loop(self, context: Context, value: Any) -> str:
        return str(self._turn(context, value)) if self._trace.saved else ""

    @pass_context
    def _enter(self, _: Context, nothing: None) -> str:
        self._trace.saved.append(self._trace.message)
        return ""

    @pass_context
    def _leave(self, _: Context, nothing: None) -> str:
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


def _is_generation_block(block: nodes.CallBlock) -> bool:
    """`{% generation %}`, as transformers' extension parses it."""
    method = block.call.node
    return isinstance(method, nodes.ExtensionAttribute) and method.name == "_generation_support"


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
