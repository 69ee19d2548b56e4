"""What a chat template writes → a Go template in Ollama's dialect that writes the same.

Ollama gives a template `.Messages`, each with `.Role` and `.Content`, after it has joined neighbours of one role. Its
language has no function that strips white space or finds a word in a text, so these are written out as loops.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

from lora_sft.exporting.go.frame import END, ROLES, START, Empty, Frame, Treatment, Underivable, shared_start
from lora_sft.exporting.go.language import quoted
from lora_sft.exporting.go.loops import cut, strip_left, strip_right


def write_template(frame: Frame, without: str = "") -> str:
    """The Go template of a frame.

    Args:
        without: text at the start that is left to somebody else (the BOS token, which Ollama adds by itself).

    Raises:
        Underivable: the text does not always start with `without`, or the frame has something that no Go template
            is written for.
    """
    if without:
        frame = _without_start(frame, without)
    if frame.moves_system and ("system" in frame.empty or _treats_by_place(frame)):
        raise Underivable("it moves the system message and treats it in a way that is not known here")
    return _Writer(frame).template()


def _without_start(frame: Frame, start: str) -> Frame:
    between = dict(frame.between)
    for pair, text in frame.between.items():
        if pair[0] == START:
            if not text.startswith(start):
                raise Underivable(f"it does not always start with {start}")
            between[pair] = text[len(start) :]
    empty = {
        role: Empty(
            found.instead and {one: t.removeprefix(start) if one == START else t for one, t in found.instead.items()},
            found.raw,
        )
        for role, found in frame.empty.items()
    }
    return Frame(between, frame.after, frame.treatments, empty, frame.moves_system, frame.drops_system)


def _treats_by_place(frame: Frame) -> bool:
    """Whether the words of a message are treated in different ways behind different roles."""
    return any(len({frame.treatments[pair] for pair in frame.treatments if pair[1] == role}) > 1 for role in ROLES)


class _Source:
    """A Go template in the making: literal text and actions.

    An action on a line of its own takes the line break before it away with `{{-`; behind text that ends with white
    space, which that would take too, the line is not broken.
    """

    def __init__(self) -> None:
        self.text = ""

    def literal(self, text: str) -> None:
        """Text that is written as it stands; what Go or a Modelfile would misread becomes a string constant."""
        for piece in re.findall(r'\{\{+|\{$|"{3,}|\{|"{1,2}|[^{"]+', text):
            if piece.startswith("{{") or (piece == "{" and text.endswith("{")) or piece.startswith('"""'):
                self.inline(quoted(piece))
                continue
            for is_plain, symbols in groupby(piece, lambda symbol: symbol.isprintable() or symbol in "\n\t"):
                run = "".join(symbols)
                self.text += run if is_plain else f"{{{{ {quoted(run)} }}}}"

    def inline(self, action: str) -> None:
        """An action in the middle of a line."""
        self.text += f"{{{{ {action} }}}}"

    def line(self, action: str) -> None:
        """An action on a line of its own."""
        if self.text and self.text[-1] in " \t\r\n":
            self.inline(action)
        else:
            self.text += ("\n" if self.text else "") + f"{{{{- {action} }}}}"


class _Writer:
    """Frame → source."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.source = frame, _Source()
        self.preamble = _best_preamble(frame)
        self.before = {role: self._before(role) for role in ROLES}
        self.written = [role for role in ROLES if self.before[role]]
        varied = [len(set(texts.values())) > 1 for texts in self.before.values()]
        varied += [len(set(empty.instead.values())) > 1 for empty in frame.empty.values() if empty.instead]
        self.needs_place = any(varied) or _treats_by_place(frame)
        self.content = "$content" if any(t != Treatment() for t in frame.treatments.values()) else ".Content"

    def _before(self, role: str) -> dict[str, str]:
        texts = self.frame.before(role)
        return {one: text[len(self.preamble) :] if one == START else text for one, text in texts.items()}

    def template(self) -> str:
        source = self.source
        source.literal(self.preamble)
        if self.needs_place:
            source.line(f"$at := {quoted(START)}")
        if self.frame.moves_system:
            source.line('$system := ""')
            source.line("$told := false")
            source.line("$asked := 0")
            source.line("range $i, $_ := .Messages")
            source.line('if eq .Role "user"')
            source.line("$asked = $i")
            source.line("end")
            source.line("end")
        source.line("range $i, $_ := .Messages")
        source.line("$last := eq (len (slice $.Messages $i)) 1")
        if self.content == "$content":
            source.line("$content := .Content")
            self._treatments()
        for position, role in enumerate(self.written):
            source.line(("else " if position else "") + f"if eq .Role {quoted(role)}")
            self._message(role)
        source.line("end")
        closing = self.frame.between["user", END].removeprefix(self.frame.after["user"])
        if closing:
            source.line('if and $last (ne .Role "assistant")')
            source.literal(closing)
            source.inline("end")
        source.line("end")
        return source.text

    def _message(self, role: str) -> None:
        source, empty = self.source, self.frame.empty.get(role)
        if self.frame.moves_system and role == "system":
            source.inline(f"$system = {self.content}")
            source.inline("$told = true")
            return
        has_words = ".Content" if empty and empty.raw else self.content
        if empty:
            source.inline(f"if {has_words}")
        if self.frame.moves_system and role == "user":
            self._user_behind_moved_system()
        else:
            self._chain(self.before[role])
        source.inline(self.content)
        if empty and empty.instead is not None:
            source.inline("else")
            instead = empty.instead
            self._chain({one: t[len(self.preamble) :] if one == START else t for one, t in instead.items()})
            source.inline("end")
        if closing := self.frame.after[role]:
            if role == "assistant":  # the last one goes on: it is the beginning of the reply that is wanted
                source.inline("if not $last")
            source.literal(closing)
            if role == "assistant":
                source.inline("end")
        if self.needs_place:
            source.inline(f"$at = {quoted(role)}")
        if empty and empty.instead is None:
            source.inline("end")

    def _user_behind_moved_system(self) -> None:
        texts = dict(self.before["user"])
        behind = texts.pop("system")
        self.source.inline("if and $told (eq $i $asked)")
        self._chain(self.before["system"])
        self.source.inline("$system")
        self.source.literal(self.frame.after["system"] + behind)
        self.source.inline("else")
        self._chain(texts)
        self.source.inline("end")

    def _chain(self, texts: Mapping[str, str]) -> None:
        """Text that depends on the role before."""
        ending = shared_start([text[::-1] for text in texts.values()])[::-1]
        groups: dict[str, list[str]] = {}
        for one, text in texts.items():
            groups.setdefault(text.removesuffix(ending), []).append(one)
        usual = max(groups, key=lambda text: (len(set(groups[text]) - {START}), not text))
        for position, text in enumerate(text for text in groups if text != usual):
            places = " ".join(quoted(one) for one in groups[text])
            self.source.inline(("else " if position else "") + f"if eq $at {places}")
            self.source.literal(text)
        if len(groups) > 1:
            if usual:
                self.source.inline("else")
                self.source.literal(usual)
            self.source.inline("end")
        else:
            self.source.literal(usual)
        self.source.literal(ending)

    def _treatments(self) -> None:
        steps: list[tuple[Callable[[Treatment], tuple[str, ...]], Callable[..., Iterable[str]]]] = [
            (lambda t: (t.cut, t.behind_cut) if t.cut and not t.cuts_last else (), cut),
            (lambda t: (t.left,) if t.left else (), strip_left),
            (lambda t: (t.right,) if t.right else (), strip_right),
            (lambda t: (t.cut, t.behind_cut) if t.cuts_last else (), cut),
        ]
        for settings_of, lines in steps:
            found = {pair: settings_of(treatment) for pair, treatment in self.frame.treatments.items()}
            for settings in dict.fromkeys(found.values()):
                if settings:
                    self.source.line(f"if {_condition(found, settings)}")
                    for line in lines(*settings):
                        self.source.line(line)
                    self.source.line("end")


def _best_preamble(frame: Frame) -> str:
    """What is written before any message, so that as little as may be depends on which comes first."""
    starts = {role: text for (one, role), text in frame.between.items() if one == START}
    instead = [empty.instead[START] for empty in frame.empty.values() if empty.instead and START in empty.instead]
    common = shared_start([*starts.values(), *instead])

    def cost(length: int) -> tuple[int, int]:
        texts = [
            (role, text[length:] if one == START else text)
            for role in ROLES
            for one, text in frame.before(role).items()
        ]
        return len(set(texts)), length

    return common[: min(range(len(common) + 1), key=cost)]


def _condition(found: Mapping[tuple[str, str], tuple[str, ...]], settings: tuple[str, ...]) -> str:
    """On which messages a treatment is done."""
    whole, parts = [], []
    for role in ROLES:
        places = [one for (one, other), had in found.items() if other == role and had == settings]
        if places and all(had == settings for (_, other), had in found.items() if other == role):
            whole.append(quoted(role))
        elif places:
            parts.append(f"and (eq .Role {quoted(role)}) (eq $at {' '.join(quoted(one) for one in places)})")
    conditions = ([f"eq .Role {' '.join(whole)}"] if whole else []) + parts
    return conditions[0] if len(conditions) == 1 else "or " + " ".join(f"({one})" for one in conditions)
