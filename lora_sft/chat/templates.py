"""A template's name or path → its text, and what its head comment says of it. Imports no torch.

A new template: drop a .jinja file into `templates/`; its first comment holds `name: value` lines.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lora_sft.errors import TemplateError
from lora_sft.resources import shipped

CONTROL_TOKEN = re.compile(r"<[^<>\s{}'\"]+>|\[/?[A-Z_]+\]")
"""What a control token looks like."""


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        name: file name without `.jinja`.
        text: Jinja source.
        about: the `name: value` lines of its first comment; ours have `family`, `models`, `model_types` (of
            transformers), `stop` (the tokens that end a reply, the usual one first), `tokens` (what the vocabulary
            should have), `tools`, `thinking`, `source`.
    """

    name: str
    text: str
    about: dict[str, str] = field(default_factory=dict)

    @property
    def stops(self) -> list[str]:
        """The control tokens that end a reply, the usual one first; none if it is the tokenizer's eos."""
        return _tokens(self.about.get("stop", ""))


def shipped_templates() -> list[Template]:
    """The templates that come with the package, by name."""
    return [_read(path) for path in sorted(shipped("templates").glob("*.jinja"))]


def find_template(name_or_path: str, folder: str | Path | None = None) -> Template:
    """A template by its name in `templates/` or by the path of a .jinja file.

    Args:
        folder: holds templates of the user's own; their names come before ours.

    Raises:
        TemplateError: neither of them exists.
    """
    own = _templates_in(Path(folder).expanduser()) if folder is not None else {}
    path = Path(name_or_path).expanduser()
    if path.suffix in (".jinja", ".j2"):
        if not path.is_file():
            raise TemplateError(f"chat_template {name_or_path}: no such file (looked in {Path.cwd()})")
        return _read(path)
    known = {template.name: template for template in shipped_templates()} | own
    if name_or_path not in known:
        raise TemplateError(
            f'chat_template "{name_or_path}" is not one of {", ".join(known)}; a template of your own is given as a '
            "path that ends in .jinja"
        )
    return known[name_or_path]


def source_of(template: str) -> str:
    """A template's Jinja source, its name in `templates/` or its path → its source.

    Raises:
        TemplateError: it is not Jinja, and no such template exists.
    """
    return template if "{" in template or "\n" in template else find_template(template).text


def control_tokens_in(template: Template) -> list[str]:
    """The control tokens that a template writes: those that its head comment names, else all that look like one."""
    named = [*template.stops, *_tokens(template.about.get("tokens", ""))]
    return list(dict.fromkeys(named or CONTROL_TOKEN.findall(template.text)))


def _tokens(words: str) -> list[str]:
    """The tokens in a line such as `<|im_start|> <|im_end|>`; none in `the tokenizer's eos`."""
    return [word for word in words.split() if word[0] in "<["]


def _templates_in(folder: Path) -> dict[str, Template]:
    if not folder.is_dir():
        raise TemplateError(f"chat_template_dir {folder}: no such folder (looked in {Path.cwd()})")
    return {path.stem: _read(path) for path in sorted(folder.glob("*.jinja"))}


def _read(path: Path) -> Template:
    text = path.read_text(encoding="utf-8")
    head = re.match(r"\s*\{#-?(.*?)-?#\}", text, re.DOTALL)
    lines = (line.partition(":") for line in head.group(1).splitlines()) if head else ()
    return Template(path.stem, text, {key.strip(): value.strip() for key, colon, value in lines if colon})
