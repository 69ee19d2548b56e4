"""A template's syntax tree → whether what it writes for a message depends on none that comes later.

Most templates are one loop over the messages with the generation prompt behind it. For those the prompt of any reply
is known from one rendering: the text up to the reply's turn, and the generation prompt. That keeps long conversations
linear. Any other template has its prompts rendered one by one (`prompts.py`).
"""

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import nodes

LOOKING_AHEAD = ("last", "length", "revindex", "revindex0", "nextitem")
"""What a loop tells of the messages that are still to come."""


class Forward(NamedTuple):
    """How the prompts of a template may be put together.

    Attributes:
        first: from which message on.
        variables: what the text behind the loop depends on, the generation prompt above all.
    """

    first: int
    variables: tuple[str, ...]


def reads_forward(tree: nodes.Template) -> Forward | None:
    """How the prompts of a template may be put together; None if each must be rendered.

    A template reads forward if its only loop over the messages stands at the top level, nothing else reads them but by
    a fixed index from the front, that loop does not look ahead, and neither the text before the loop's end depends on
    `add_generation_prompt` nor the text behind it on the messages or on anything that was set.
    """
    names = {"messages", *_aliases(tree)}
    loops = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For) and _over(node.iter, names)]
    if len(loops) != 1 or any(_over(loop.iter, names) for loop in tree.find_all(nodes.For) if loop not in tree.body):
        return None
    loop, behind = tree.body[loops[0]], tree.body[loops[0] + 1 :]
    assert isinstance(loop, nodes.For)
    if loop.else_ or _looks_ahead(loop):
        return None
    if any(name.name == "add_generation_prompt" for node in tree.body[: loops[0] + 1] for name in _names(node)):
        return None
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"} | names
    assigned |= {macro.name for macro in tree.find_all(nodes.Macro)}
    if any(name.name in assigned for node in behind for name in _names(node)):
        return None
    allowed, first = _allowed_reads(tree, loop, names)
    mentions = [name for name in _names(tree) if name.name in names and name.ctx == "load"]
    if not all(id(name) in allowed for name in mentions):
        return None
    return Forward(first, tuple(sorted({name.name for node in behind for name in _names(node)})))


def _names(node: nodes.Node) -> Iterable[nodes.Name]:
    """All names in a node, itself included."""
    return [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]


def _looks_ahead(loop: nodes.For) -> bool:
    """Whether the loop asks for what is still to come. An inner loop's `loop` is another."""
    inner = {id(name) for part in loop.body for other in part.find_all(nodes.For) for name in _inside(other)}
    inner |= {id(name) for part in loop.body if isinstance(part, nodes.For) for name in _inside(part)}
    reads = [read for part in loop.body for read in (part, *part.find_all(nodes.Getattr))]
    known = {id(read.node) for read in reads if isinstance(read, nodes.Getattr) and read.attr not in LOOKING_AHEAD}
    mine = [name for part in loop.body for name in _names(part) if name.name == "loop" and id(name) not in inner]
    return any(id(name) not in known for name in mine)


def _inside(loop: nodes.For) -> Iterable[nodes.Name]:
    return [name for part in [*loop.body, *loop.else_] for name in _names(part)]


def _aliases(tree: nodes.Template) -> set[str]:
    """Names set to nothing but the messages, or to those from a fixed one on."""
    values: dict[str, list[nodes.Node]] = {}
    for node in tree.find_all(nodes.Assign):
        for name in _names(node.target):
            values.setdefault(name.name, []).append(node.node if node.target is name else node)
    return {name for name, found in values.items() if all(_over(value, {"messages"}) for value in found)}


def _over(node: nodes.Node, names: set[str]) -> bool:
    """Whether it is the messages, or those from a fixed one on: `messages`, `messages[1:]`."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, no_end = node.arg.start, node.arg.stop is None and node.arg.step is None
        return no_end and (start is None or _index(start) is not None) and _over(node.node, names)
    return isinstance(node, nodes.Name) and node.name in names


def _index(node: nodes.Node | None) -> int | None:
    """A fixed index from the front; None for any other."""
    value = node.value if isinstance(node, nodes.Const) else None
    return value if type(value) is int and value >= 0 else None


def _allowed_reads(tree: nodes.Template, loop: nodes.For, names: set[str]) -> tuple[set[int], int]:
    """(ids of the names that are read harmlessly, the first message that none of them reads by its index)."""
    allowed, first = {id(name) for name in _names(loop.iter)}, 1
    for node in tree.find_all(nodes.Assign):
        if _over(node.node, names):
            allowed |= {id(name) for name in _names(node.node)}
    for read in tree.find_all(nodes.Getitem):
        index = _index(read.arg)
        if index is not None and isinstance(read.node, nodes.Name) and read.node.name in names:
            allowed.add(id(read.node))
            # An alias starts as many messages later as its slices leave out.
            first = max(first, index + 1 + _slice_starts(tree))
    return allowed, first


def _slice_starts(tree: nodes.Template) -> int:
    return sum(_index(part.start) or 0 for part in tree.find_all(nodes.Slice))
