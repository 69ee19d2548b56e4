"""Messages → text, and for every character whether the model must produce it.

The model must produce an assistant turn through its first stop token, and nothing else. Which characters those are is
traced through the rendering itself (`tracing.py`, `turns.py`), so that it holds for any template: there are no marker
strings to be fooled and no table of model families. `docs/masking.md` tells the definition and how it was checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from lora_sft.chat.control import ControlTokens, find_control_tokens, literal_stretches
from lora_sft.chat.marks import differences
from lora_sft.chat.missing import REASONING_FIELDS, what_is_missing
from lora_sft.chat.prompts import Prompts
from lora_sft.chat.stops import put_in, stop_tokens_of
from lora_sft.chat.templates import source_of
from lora_sft.chat.traced import Run, Traced, runs_of
from lora_sft.chat.tracing import FAILURES, TracedTemplate, compile_traced
from lora_sft.chat.turns import (
    CONTROL_TOKEN,
    DROPPED,
    HISTORY_DIFFERS,
    MARKS_DIFFER,
    NO_STOP_TOKEN,
    PROMPT_MISMATCH,
    REWRITTEN,
    Extent,
    Note,
    Reply,
    extents_of,
    find_reply,
)
from lora_sft.data.conversation import Message
from lora_sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "last", "each"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        text: the whole conversation.
        supervised: [(start, end)], character offsets into `text`, of what the model must produce.
        notes: what a person should know.
        literal: [(start, end)] of the stretches in which messages spell control tokens; none is read there.
        replies: how many replies were looked at.
    """

    text: str
    supervised: list[tuple[int, int]]
    notes: list[Note] = field(default_factory=list)
    literal: list[tuple[int, int]] = field(default_factory=list)
    replies: int = 0


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    stop_tokens: Sequence[str] | None = None,
    append_stop_token: bool = False,
    **template_variables: Any,
) -> Rendered:
    """A conversation → its text, with the characters marked that the model must produce.

    Args:
        messages: role and content, in order.
        tokenizer: gives the special tokens, and the chat template unless one is named.
        tools: JSON schemas of functions that the assistant may call.
        chat_template: Jinja source, a name in `templates/` or a path; None takes the tokenizer's.
        stop_tokens: tokens that end a reply; None takes the tokenizer's eos and the generation config beside it.
        append_stop_token: puts a stop token behind replies that the template ends without one.
        template_variables: passed to the template (`enable_thinking=False`).

    Raises:
        TemplateError: no template, one that fails on these messages, or one that cannot be traced.
    """
    return _Rendering(
        messages, tokenizer, tools, chat_template, stop_tokens, append_stop_token, template_variables
    ).rendered()


def prompt_text(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    **template_variables: Any,
) -> str:
    """What transformers' `apply_chat_template` writes, within the limits that are set to a template.

    Raises:
        TemplateError: no template, or one that fails on these messages or takes too much.
    """
    rendering = _Rendering(messages, tokenizer, tools, chat_template, [], False, template_variables)
    rendering.variables["add_generation_prompt"] = add_generation_prompt
    return rendering.plain


def render_turns(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    stop_tokens: Sequence[str] | None = None,
    append_stop_token: bool = False,
    turns: Turns = "all",
    **template_variables: Any,
) -> list[Rendered]:
    """A conversation → what is trained of it; the arguments are those of `render`, and `turns`.

    Args:
        turns: `all` marks every reply of the one rendering, `last` only the last. Many templates render a reply
            otherwise once another message follows; `each` renders every reply as it is produced, with nothing
            behind it, and joins two into one text wherever the second continues the first.

    Raises:
        TemplateError: as `render`.
    """
    whole = _Rendering(messages, tokenizer, tools, chat_template, stop_tokens, append_stop_token, template_variables)
    rendered = whole.rendered(only_last=turns == "last")
    differs = any(note.status in (HISTORY_DIFFERS, PROMPT_MISMATCH, REWRITTEN) for note in rendered.notes)
    if turns != "each" or not differs:
        return [rendered]
    joined: list[Rendered] = []
    for index in whole.replies:
        if messages[index].get("train") is False:
            continue
        part = whole.first(index + 1).rendered(only_last=True)
        if part.supervised:
            part = _through_last_reply(part)
        if joined and part.text.startswith(joined[-1].text) and part.supervised:
            previous = joined.pop()
            notes = previous.notes + [note for note in part.notes if note not in previous.notes]
            supervised = previous.supervised + part.supervised
            part = replace(part, supervised=supervised, notes=notes, replies=previous.replies + 1)
        joined.append(part)
    return joined


def _through_last_reply(rendered: Rendered) -> Rendered:
    """Without what the template writes behind the last reply."""
    end = rendered.supervised[-1][1]
    literal = [(first, min(last, end)) for first, last in rendered.literal if first < end]
    return replace(rendered, text=rendered.text[:end], literal=literal)


class _Rendering:
    """One conversation, rendered; its parts are made when they are asked for, each once."""

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: "PreTrainedTokenizerBase",
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        stop_tokens: Sequence[str] | None,
        append_stop_token: bool,
        template_variables: Mapping[str, Any],
    ) -> None:
        if isinstance(tokenizer, str) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("render takes a list of messages {role, content} and a loaded tokenizer, no names")
        self.messages, self.tokenizer = messages, tokenizer
        self._arguments = (tools, chat_template, stop_tokens, append_stop_token, template_variables)
        self.append_stop_token = append_stop_token
        self.stops = stop_tokens_of(tokenizer) if stop_tokens is None else list(stop_tokens)
        self.variables: dict[str, Any] = {
            "documents": None,
            **tokenizer.special_tokens_map,
            **template_variables,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": False,
        }
        self.template = source_of(chat_template) if chat_template else plain_template(tokenizer)
        self.shown = with_aliases(messages)
        self.replies = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        self.compiled = _compiled(self.template)

    def first(self, count: int) -> "_Rendering":
        """The same conversation, broken off behind its first `count` messages."""
        return _Rendering(self.messages[:count], self.tokenizer, *self._arguments)

    def rendered(self, only_last: bool = False) -> Rendered:
        """The text with its supervised spans; `only_last` marks those of the last reply only."""
        found: list[tuple[int, Reply]] = []
        notes: list[Note] = []
        for turn, index in enumerate(self.replies):
            if self.messages[index].get("train") is False or (only_last and index != self.replies[-1]):
                continue
            reply = self.reply(index)
            found.append((turn, reply))
            notes += [Note(turn, status, words) for status, words in [*reply.notes, *self._changes(index, reply)]]
        notes += self._printed_notes() + self._spelled_notes()
        text = self.plain
        literal = literal_stretches(text, self.control, self.tokenizer)
        notes += [] if only_last else self._mark_notes({self.replies[turn]: reply for turn, reply in found})
        supervised = [
            (reply.start, reply.end)
            for _, reply in found
            if reply.end > reply.start or (self.append_stop_token and reply.needs_stop is not None)
        ]
        rendered = Rendered(text, supervised, notes, literal, len(found))
        return self._with_stop_tokens(rendered, [reply for _, reply in found]) if self.append_stop_token else rendered

    @property
    def plain(self) -> str:
        """The text as transformers renders it."""
        return self._plain_and_marks[0]

    @cached_property
    def _plain_and_marks(self) -> tuple[str, list[tuple[int, int]]]:
        try:
            if self.compiled.is_marked:
                return self.compiled.marked_text(self.shown, self.variables)
            return self.compiled.plain_text(self.shown, self.variables), []
        except FAILURES as error:
            raise TemplateError(f"the chat template fails on this conversation: {error}") from None

    @cached_property
    def traced(self) -> Traced:
        """The text with its origins; it must be the text that transformers renders, character for character."""
        plain = self.plain
        try:
            text = self.compiled.render(self.shown, self.variables)
        except FAILURES:
            text = None
        if text != plain or text is None:
            raise TemplateError(
                "the chat template does something with the messages that cannot be traced, so what the assistant says "
                "cannot be told from the rest; choose another with chat_template (`lora-sft templates` lists ours)"
            )
        return text

    @cached_property
    def runs(self) -> list[Run]:
        return runs_of(self.traced)

    @cached_property
    def extents(self) -> dict[int, Extent]:
        return extents_of(self.runs)

    @cached_property
    def control(self) -> ControlTokens:
        return find_control_tokens(self.plain, self.runs, self.tokenizer, self.stops, self.replies)

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.compiled, self.shown, self.variables, self.plain, self.extents)

    def reply(self, index: int) -> Reply:
        """Where the reply at `index` among the messages stands."""
        return find_reply(self.plain, self.runs, self.extents, index, self.prompts, self.stops, self.control.written)

    def written_for(self, index: int, reply: Reply) -> str:
        """The text of a message's turn, header and all."""
        return self.plain[min(self.extents[index].first, reply.start) : reply.end] if index in self.extents else ""

    def _changes(self, index: int, reply: Reply) -> list[tuple[str, str]]:
        """What the template leaves out of a reply, or writes otherwise once another message follows."""
        if index not in self.extents:
            return []
        last = index == len(self.messages) - 1

        @cache
        def when_last() -> tuple[str, str] | None:
            """(what is written for it, what of that is learned) when no message comes behind it."""
            if last:
                return None
            try:
                alone = self.first(index + 1)
                then = alone.reply(index)
            except TemplateError:
                return None
            return alone.written_for(index, then), alone.plain[then.start : then.end]

        def written_when_last() -> str | None:
            alone = when_last()
            return alone[0] if alone else None

        if missing := what_is_missing(self.messages[index], self.written_for(index, reply), written_when_last):
            return [missing]
        if last or self.prompts.reads_forward(index + 1):
            return []
        before = self.prompts.before(index + 1)
        if before is None or before[: reply.end] == self.plain[: reply.end]:
            return []
        alone = when_last()
        if alone is None or alone[1] in ("", self.plain[reply.start : reply.end]):
            return []
        return [(REWRITTEN, "the template writes it otherwise once another message follows")]

    def _printed_notes(self) -> list[Note]:
        """Many templates know text only, and write a list of typed parts as Python prints it."""
        found = []
        for index, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, (list, tuple)) and content and str(content) in self.plain:
                turn = sum(reply < index for reply in self.replies)
                words = f"the template writes the typed parts of message {index + 1} as Python prints them"
                found.append(Note(turn, DROPPED, f"{words}; give its content as text"))
        return found

    def _spelled_notes(self) -> list[Note]:
        """One note if messages spell control tokens."""
        if not self.control.spelled:
            return []
        names = dict.fromkeys(self.plain[slice(*place)] for place in self.control.spelled)
        return [Note(0, CONTROL_TOKEN, f"messages spell {', '.join(names)}; it stays plain text")]

    def _mark_notes(self, found: Mapping[int, Reply]) -> list[Note]:
        """One note for each way in which the template's own marks differ from what the model must produce."""
        if not self.compiled.is_marked:
            return []
        marks = self._plain_and_marks[1]
        replies = [found[index] if index in found else self.reply(index) for index in self.replies]
        return [
            Note(0, MARKS_DIFFER, words)
            for words in differences(self.plain, marks, [(reply.start, reply.end) for reply in replies])
        ]

    def _with_stop_tokens(self, rendered: Rendered, replies: Sequence[Reply]) -> Rendered:
        """Puts the missing stop tokens in."""
        places = {reply.needs_stop for reply in replies if reply.needs_stop is not None}
        if not places or not self.stops:
            return rendered
        stop = self._stop_used_elsewhere()

        text, supervised, literal = put_in(stop, places, rendered.text, rendered.supervised, rendered.literal)
        notes = [note for note in rendered.notes if note.status != NO_STOP_TOKEN]
        return replace(rendered, text=text, supervised=supervised, literal=literal, notes=notes)

    def _stop_used_elsewhere(self) -> str:
        """The stop token with which the template ends a reply once the user goes on; the first one known if none."""
        last = self.replies[-1]
        asked = [*self.messages[: last + 1], {"role": "user", "content": "."}]
        try:
            longer = _Rendering(asked, self.tokenizer, *self._arguments)
            reply = longer.reply(last)
        except TemplateError:
            return self.stops[0]
        learned = longer.plain[reply.start : reply.end]
        return next((stop for stop in self.stops if learned.endswith(stop)), self.stops[0])


def _compiled(template: str) -> TracedTemplate:
    try:
        return compile_traced(template)
    except FAILURES as error:
        raise TemplateError(f"the chat template fails on this conversation: {error}") from None


def with_aliases(messages: Sequence[Message]) -> list[Message]:
    """Messages as transformers hands them to a template: reasoning under each of the names that templates read.

    Source: `_alias_reasoning_fields` and `_plain_template_data` in transformers 5.23.
    """
    aliased = []
    for message in messages:
        reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
        shown = {key: value for key, value in message.items() if key != "train"}
        if reasoning is not None:
            shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
        aliased.append(shown)
    return aliased


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own chat template; of several, the one called default.

    Raises:
        TemplateError: it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise TemplateError(
            "the model has no chat template; choose one with chat_template (`lora-sft templates` lists them)"
        )
    return str(template)
