"""Previews of conversations → one HTML page without any other file: every token, its id on hover, what is learned."""

from collections.abc import Iterable
from html import escape
from string import Template

from lora_sft.chat.labels import Preview
from lora_sft.report.pieces import Piece, pieces_of

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #23262b; --faint: #7b818a; --page: #fbfbf9; --box: #fff; --edge: #e4e4df; --given: #f1f1ec;
  --learned: #cdeccb; --learned-edge: #7dbd7a; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe2e6; --faint: #8b929b; --page: #17181a; --box: #1f2124;
  --edge: #33363a; --given: #292c30; --learned: #24482a; --learned-edge: #4b8a52; --warn: #e0a95a; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 860px;
  margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1em; margin: 0; }
p, small { color: var(--faint); } .note { color: var(--warn); margin: .3em 0 0; font-size: .9em; }
section { background: var(--box); border: 1px solid var(--edge); border-radius: 10px; padding: 1em 1.2em;
  margin: 1.4em 0; }
header { display: flex; justify-content: space-between; gap: 1em; flex-wrap: wrap; align-items: baseline; }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .8em 0 0; }
pre span { border-radius: 3px; padding: 1px 0; box-shadow: inset 1px 0 var(--edge); }
pre span:nth-child(even) { background: var(--given); }
pre .learned, pre .learned:nth-child(even) { background: var(--learned); box-shadow: inset 1px 0 var(--learned-edge); }
pre span:hover { outline: 2px solid var(--faint); } .white { color: var(--faint); }
.bar { height: 4px; border-radius: 2px; background: var(--given); margin-top: .6em; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--learned-edge); }
</style>
<h1>$title</h1>
<p>Every box is a token; its id shows when the pointer rests on it. <span class="key">Green is learned</span>: the model
must produce it. The rest it is given. $count</p>
$sections
</html>
""")


def preview_page(previews: Iterable[Preview], title: str) -> str:
    """The page as HTML."""
    shown = list(previews)
    learned = sum(preview.example.supervised_tokens for preview in shown)
    tokens = sum(len(preview.example.input_ids) for preview in shown)
    return PAGE.substitute(
        title=escape(title),
        count=f"{len(shown):,} conversations, {learned:,} of {tokens:,} tokens learned.",
        sections="\n".join(_section(preview) for preview in shown),
    )


def _section(preview: Preview) -> str:
    learned, tokens = preview.example.supervised_tokens, len(preview.example.input_ids)
    pieces = pieces_of(preview.rendered.text, preview.tokens, preview.example.labels)
    notes = "".join(
        f'<div class="note">reply {note.turn + 1}: {escape(note.status)}: {escape(note.words)}</div>'
        for note in preview.rendered.notes
    )
    notes += f'<div class="note">{escape(preview.warning)}</div>' if preview.warning else ""
    return (
        f"<section><header><h2>{escape(preview.source)}</h2><small>{learned:,} of {tokens:,} tokens learned</small>"
        f'</header><div class="bar"><i style="width:{100 * learned / max(1, tokens):.1f}%"></i></div>{notes}'
        f"<pre>{''.join(map(_token, pieces))}</pre></section>"
    )


def _token(piece: Piece) -> str:
    name = ", ".join(map(str, piece.ids)) or "no token"
    style = ' class="learned"' if piece.is_learned else ""
    return f'<span{style} title="{name} · {escape(ascii(piece.text))}">{_visible(piece.text)}</span>'


def _visible(text: str) -> str:
    """The text with its line breaks and tabs shown."""
    shown = escape(text).replace("\t", '<i class="white">→</i>\t')
    return shown.replace("\n", '<i class="white">↵</i>\n')
