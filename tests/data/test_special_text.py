"""Text that spells a special token is cut so that no piece spells one."""

import pytest
from tiny import tiny_tokenizer

from dschat.data.special_text import SpecialText


def special(*tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return SpecialText(tokenizer)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("no mark", ["no mark"]),
        ("a<end>b", ["a<", "end>b"]),
        ("<end><end>", ["<", "end><", "end>"]),
        ("<<<", ["<", "<", "<"]),  # "<<" stands at 0 and at 1
        ("", [""]),
    ],
)
def test_each_special_token_is_cut_after_its_first_letter(text, pieces):
    found = special("<end>", "<<")
    assert found.cut(text) == pieces
    assert found.is_in(text) == (len(pieces) > 1)
    assert not any(found.is_in(piece) for piece in pieces)


def test_a_token_of_one_letter_cannot_be_cut_and_is_left_alone():
    assert not special("§").is_in("§")


def test_the_tokenizers_own_end_token_is_special():
    assert special().cut("x<|endoftext|>") == ["x<", "|endoftext|>"]
