"""What stands on the preview page: the whole text, each token once."""

from lora_sft.chat.labels import look_at
from lora_sft.chat.rendering import Rendered, render
from lora_sft.chat.tokens import Tokens
from lora_sft.report.pieces import Piece, pieces_of
from tests.conftest import conversation


def test_the_pieces_are_the_text_and_every_token_once(tokenizer):
    rendered = render(conversation("hi 🙂", "naïve 🙃\n\tx"), tokenizer)
    shown = look_at(rendered, tokenizer, "a:1")
    pieces = pieces_of(rendered.text, shown.tokens, shown.example.labels)
    assert "".join(piece.text for piece in pieces) == rendered.text
    assert [token for piece in pieces for token in piece.ids] == shown.example.input_ids
    assert any(len(piece.ids) > 1 and piece.text == "🙃" for piece in pieces)
    assert "".join(piece.text for piece in pieces if piece.is_learned) == "naïve 🙃\n\tx<|im_end|>"


def test_text_without_a_token_is_shown_too():
    assert pieces_of("a b ", Tokens([5, 6], [(0, 1), (2, 3)]), [-100, 6]) == [
        Piece("a", (5,), False),
        Piece(" ", (), False),
        Piece("b", (6,), True),
        Piece(" ", (), False),
    ]


def test_nothing_is_no_piece():
    assert pieces_of(Rendered("", []).text, Tokens([], []), []) == []
