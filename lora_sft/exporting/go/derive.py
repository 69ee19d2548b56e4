"""A tokenizer's chat template → a Go template for Ollama that is proven to write the same, or why there is none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import Template, nodes

from lora_sft.chat.rendering import plain_template
from lora_sft.chat.scenarios import TOOLS
from lora_sft.chat.tracing import FAILURES
from lora_sft.errors import TemplateError
from lora_sft.exporting.go.asking import Render, Thought, find_frame, find_thoughts, renderer
from lora_sft.exporting.go.frame import ROLES, Reach, Underivable
from lora_sft.exporting.go.proof import CONVERSATIONS, compare, prove
from lora_sft.exporting.go.template import write_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REACHES = {
    Reach(True, True, True): "",
    Reach(False, True, True): "a system message later than at the start",
    Reach(False, False, True): "a system message later than at the start, or a conversation that begins with a reply",
    Reach(False, False, False): "an empty message, a system message later than at the start, or a conversation that "
    "begins with a reply",
}
"""Which conversations a Go template is asked to hold for, the most first, and what is out of reach then."""

_LOOK_FOR = ("startswith", "endswith", "split", "replace")


@dataclass(frozen=True)
class GoTemplate:
    """A Go template that was proven.

    Attributes:
        text: its source.
        conversations: how many it was proven on.
        notes: what a person should know.
    """

    text: str
    conversations: int
    notes: list[str] = field(default_factory=list)


def derive(
    tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any] | None = None, without: str = ""
) -> GoTemplate:
    """The Go template of a tokenizer's chat template.

    Args:
        tokenizer: with the chat template that was trained.
        variables: that the chat template was given in training.
        without: text at the start that is left to Ollama: the bos token, if the GGUF says that it is added.

    Raises:
        TemplateError: there is none that writes the same.
    """
    source, render = plain_template(tokenizer), renderer(tokenizer, variables or {})
    if _writes_the_date(tokenizer, variables or {}):
        known = "date_string" in source and "date_string" not in (variables or {})
        raise TemplateError(
            "the chat template writes today's date, which a Go template cannot"
            + ("; fix one with chat_template_kwargs={date_string: 26 Jul 2024}" if known else "")
        )
    thoughts, reasons = find_thoughts(render, source), dict[str, None]()
    for reach, left_out in REACHES.items():
        try:
            frame = find_frame(render, reach, thoughts)
            text = write_template(frame, without)
            difference = prove(render, text, reach, thoughts, without)
        except Underivable as reason:
            reasons[str(reason)] = None
            continue
        if difference is None:
            notes = [f"not proven: {left_out}"] if left_out else []
            if frame.drops_system:
                notes.append("the chat template leaves system messages out, and so does the Go template")
            return GoTemplate(text, CONVERSATIONS, notes + _notes(tokenizer, text, render, thoughts, without))
        reasons[str(difference)] = None
    raise TemplateError(
        f"the chat template cannot be written in Ollama's template language: {[*reasons][-1]}. Export to gguf and "
        "serve with llama-server --jinja, or to vllm: these read the chat template itself"
    )


def _writes_the_date(tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> bool:
    """Whether the text is another one on another day, with or without a system message."""
    given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
    template = _compiled(plain_template(tokenizer))

    def on(day: str, roles: Sequence[str]) -> str:
        messages = [{"role": role, "content": "?"} for role in roles]
        try:
            return template.render(
                **given, messages=messages, add_generation_prompt=True, strftime_now=lambda form: day
            )
        except FAILURES:  # what a template refuses has no date
            return ""

    return any(on("one", roles) != on("two", roles) for roles in (("user",), ("system", "user")))


def _notes(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    render: Render,
    thoughts: list[Thought],
    without: str,
) -> list[str]:
    notes = []
    if _takes_tools(tokenizer):
        notes.append("tools are not served through Ollama by this export: the Go template writes plain conversations")
    if thoughts:
        notes.append("thoughts come inside the reply's text, as the model writes them; Ollama's think switch is off")
    source = plain_template(tokenizer)
    words = [word for word in dict.fromkeys(_words_looked_for(source)) if _changes_more(word, text, render, without)]
    if words:
        notes.append(
            f"the chat template looks for {', '.join(map(repr, words))} in messages and then writes something else; "
            "the Go template does not"
        )
    return notes


def _takes_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template tells the model of its tools."""
    asked = [{"role": "user", "content": "?"}]
    try:
        return bool(
            tokenizer.apply_chat_template(asked, tokenize=False, tools=TOOLS)
            != tokenizer.apply_chat_template(asked, tokenize=False)
        )
    except FAILURES:
        return False


def _compiled(source: str) -> Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: Template = _compile_jinja_template(source)
    return template


def _words_looked_for(source: str) -> Iterator[str]:
    """Words that the template looks for in texts: `'/think' in …`, `….endswith('/nothink')`, `… | replace('…', '')`."""
    tree = _compiled(source).environment.parse(source)
    for compared in tree.find_all(nodes.Compare):
        if isinstance(compared.expr, nodes.Const) and any(operand.op in ("in", "notin") for operand in compared.ops):
            yield from _text_of(compared.expr)
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "attr", "") in _LOOK_FOR and call.args:
            yield from _text_of(call.args[0])
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in _LOOK_FOR and filtered.args:
            yield from _text_of(filtered.args[0])


def _text_of(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.strip():
        yield node.value


def _changes_more(word: str, text: str, render: Render, without: str) -> bool:
    """Whether the two differ where a message has this word."""
    for role in ROLES:
        for said in (f"{word} a", f"a {word}", f"a {word} b"):
            messages = [
                {"role": one, "content": said if one == role and place < 3 else "c"}
                for place, one in enumerate((*ROLES, "user"))
            ]
            expected = render(messages, True)
            if expected is not None and compare(text, messages, expected.removeprefix(without)) is not None:
                return True
    return False
