"""What is to be done to the words of a message → lines of a Go template that do it to `$content`.

The language of Ollama's templates has no function for any of this. It has loops over numbers (since Go 1.24, which
Ollama is built with since 2025), and it can compare and cut; texts are counted in bytes.
"""

from lora_sft.exporting.go.language import quoted


def strip_left(symbols: str) -> list[str]:
    """Lines that strip the beginning of `$content`."""
    return [
        "range len $content",
        f'if eq (printf "%.1s" $content) {" ".join(map(quoted, symbols))}',
        '$content = slice $content (len (printf "%.1s" $content))',
        "else",
        "break",
        "end",
        "end",
    ]


def strip_right(symbols: str) -> list[str]:
    """Lines that strip the end of `$content`: its last byte, two or three, whichever are one of the symbols."""
    lines = ["range len $content"]
    for size in (1, 2, 3):
        known = [quoted(symbol) for symbol in symbols if len(symbol.encode()) == size]
        if known:
            test = f"(ge (len $content) {size}) (eq (slice $content (len (slice $content {size}))) {' '.join(known)})"
            lines += [
                ("else " if len(lines) > 1 else "") + f"if and {test}",
                f"$content = slice $content 0 (len (slice $content {size}))",
            ]
    return [*lines, "else", "break", "end", "end"]


def cut(mark: str, behind: str) -> list[str]:
    """Lines that leave of `$content` what stands behind the last mark."""
    lines = [
        "$rest := $content",
        "$cut := false",
        "range len $content",
        f'if eq (printf "%.{len(mark)}s" $rest) {quoted(mark)}',
        f"$content = slice $rest {len(mark.encode())}",
        "$cut = true",
        "end",
        "$rest = slice $rest 1",
        "end",
    ]
    return [*lines, "if $cut", *strip_left(behind), "end"] if behind else lines
