"""A template's own `{% generation %}` marks and what the model must produce → how they differ."""

from collections.abc import Sequence

Spans = Sequence[tuple[int, int]]


def differences(text: str, marks: Spans, replies: Spans) -> list[str]:
    """What the template's marks cover beside the replies, and what they leave out; each kind once."""
    found: dict[str, None] = {}
    for verb, spans, others in (("also cover", marks, replies), ("leave out", replies, marks)):
        for first, last in _without(spans, others):
            found[f"the template's own marks {verb} {text[first : min(last, first + 40)]!r}"] = None
    return list(found)


def _without(spans: Spans, others: Spans) -> list[tuple[int, int]]:
    """What of the spans no other span covers."""
    left = []
    for first, last in spans:
        for start, end in sorted(others):
            if end <= first or start >= last:
                continue
            if start > first:
                left.append((first, start))
            first = max(first, end)
        if first < last:
            left.append((first, last))
    return left
