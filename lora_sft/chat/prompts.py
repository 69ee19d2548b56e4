"""A conversation's first messages → the text that the model is given, or that transformers renders of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_sft.chat.tracing import FAILURES, TracedTemplate
from lora_sft.chat.turns import Extent
from lora_sft.data.conversation import Message


class Prompts:
    """What stands before each reply; each text is rendered once at most, and only when it is asked for.

    Args:
        messages: as transformers hands them to a template (`with_aliases`).
        text: the whole conversation, rendered.
        extents: {index of a message: where it stands in the text}.
    """

    def __init__(
        self,
        compiled: TracedTemplate,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        text: str,
        extents: Mapping[int, Extent],
    ) -> None:
        self.compiled, self.messages, self.variables = compiled, messages, variables
        self.text, self.extents = text, extents
        # A template that writes something behind all messages writes it behind fewer of them too.
        self._ends_with_a_message = any(extent.last == len(text) for extent in extents.values())
        self._known: dict[tuple[int, bool], str | None] = {}

    def given(self, index: int) -> str | None:
        """What the model is given before it writes message `index`; None if the template refuses it."""
        if self.reads_forward(index) and (generation_prompt := self._constant_generation_prompt()) is not None:
            return self.text[: self.extents[index].first] + generation_prompt
        return self._render(index, True)

    def end_of_prompt(self, index: int) -> int | None:
        """Where in the text the prompt of message `index` ends; None if the text does not begin with it."""
        if self.reads_forward(index) and (generation_prompt := self._constant_generation_prompt()) is not None:
            first = self.extents[index].first
            return first + len(generation_prompt) if self.text.startswith(generation_prompt, first) else None
        given = self._render(index, True)
        return len(given) if given is not None and self.text.startswith(given) else None

    def before(self, count: int) -> str | None:
        """The first `count` messages without a generation prompt; None if the template refuses them."""
        if self.reads_forward(count):
            return self.text[: self.extents[count].first]
        return self.text if count == len(self.messages) else self._render(count, False)

    def generation_prompt(self, index: int) -> str | None:
        """What the template adds when reply `index` is to come, or else some reply; None if it cannot be told."""
        given, before = self.given(index), self.before(index)
        if given is not None and before is not None and given.startswith(before):
            return given[len(before) :]
        whole = self._render(len(self.messages), True)
        return whole[len(self.text) :] if whole is not None and whole.startswith(self.text) else None

    def reads_forward(self, index: int) -> bool:
        """Whether the text before message `index` is certain not to depend on it or on any later one."""
        forward = self.compiled.forward
        return forward is not None and self._ends_with_a_message and index >= forward.first and index in self.extents

    def _constant_generation_prompt(self) -> str | None:
        """What a template that reads forward writes behind its loop when a reply is to come."""
        assert self.compiled.forward is not None
        key = tuple(repr(self.variables.get(name)) for name in self.compiled.forward.variables)
        if key not in self.compiled.generation_prompts:
            whole = self._render(len(self.messages), True)
            if whole is None or not whole.startswith(self.text):
                return None
            self.compiled.generation_prompts[key] = whole[len(self.text) :]
        return self.compiled.generation_prompts[key]

    def _render(self, count: int, with_generation_prompt: bool) -> str | None:
        key = (count, with_generation_prompt)
        if key not in self._known:
            try:
                variables = {**self.variables, "add_generation_prompt": with_generation_prompt}
                self._known[key] = self.compiled.plain_text(self.messages[:count], variables)
            except FAILURES:
                self._known[key] = None  # many templates refuse a conversation without a question
        return self._known[key]
