"""Prompts and answers become token ids, within a limit of them, with one end token."""

import pytest
from chat_templates import CHATML, PLAIN_ASKED, TURNS, templated

from dschat.data.comparisons import Turn
from dschat.data.encoder import EncodedRow, Encoder
from dschat.data.templates import NONE
from dschat.data.truncation import Truncation
from dschat.errors import UserError


def encoder(template=NONE, **settings):
    tokenizer = templated(template, **settings)
    return Encoder(tokenizer), tokenizer


def test_a_prompt_begins_with_the_start_token_once_and_has_no_end():
    encode, tokenizer = encoder(bos=True)
    assert [tokenizer.decode(ids) for ids in encode.prompts(["1", "<s>2"])] == ["<s>1", "<s>2"]


def test_an_answer_alone_ends_where_it_ended_and_has_at_least_one_token():
    encode, tokenizer = encoder()
    ended, cut, nothing = encode.answers_alone(["1", "2", ""], [True, False, False])
    end = tokenizer.eos_token_id
    assert (tokenizer.decode(ended[:-1]), ended[-1]) == ("1", end)
    assert tokenizer.decode(cut) == "2"
    assert nothing == [end]


def test_a_special_token_that_an_answer_spells_is_text_there():
    encode, tokenizer = encoder()
    (ids,) = encode.answers_alone(["1<|endoftext|>2"], [True])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "1<|endoftext|>2"


def test_what_is_learned_of_a_conversation_is_marked_by_token():
    encode, _ = encoder()
    (row,) = encode.conversations(["12"], ["3"], [False])
    assert (row.learned, row.answer_learned, row.size) == ([False, False], True, 4)
    (row,) = encode.conversations(["12"], ["3"], [False], with_prompt=True)
    assert row.learned == [True, True]


def fit(encode, prompt, answer, max_tokens):
    rows = encode.rows([prompt], [[answer]])

    def reread(_, shorter):
        return encode.rows(shorter, [[answer]] * len(shorter))

    return encode.fitted(rows, [prompt], max_tokens, reread)[0]


@pytest.mark.parametrize(
    ("max_tokens", "prompt", "answer", "truncation"),
    [
        (9, "12345", "678", Truncation.WHOLE),  # 5 + 3 + an end token
        (8, "2345", "678", Truncation.CUT),
        (5, "5", "678", Truncation.CUT),  # of the prompt one token stays
        (4, "12345", "678", Truncation.LONG_PROMPT),
    ],
)
def test_the_prompt_gives_way_before_the_answer(max_tokens, prompt, answer, truncation):
    encode, tokenizer = encoder()
    row = fit(encode, "12345", "678", max_tokens)
    assert row.truncation == truncation
    assert (tokenizer.decode(row.prompt), tokenizer.decode(row.answers[0][:-1])) == (prompt, answer)


def test_whole_turns_go_before_text_is_cut():
    encode, tokenizer = encoder(CHATML)
    whole = encode.rows([TURNS], [["A drop."]])[0].size
    row = fit(encode, TURNS, "A drop.", whole - 1)
    assert row.truncation == Truncation.FEWER_TURNS
    assert "Tea?" not in tokenizer.decode(row.prompt)
    assert "Milk?" in tokenizer.decode(row.prompt)


def test_tools_that_the_template_does_not_take_mark_the_example():
    encode, _ = encoder(CHATML)
    asked = (Turn("tools", "[]"), *TURNS)
    rows = encode.rows([asked, PLAIN_ASKED], [["1"], ["1"]])
    assert [row.truncation for row in rows] == [Truncation.WITH_TOOLS, Truncation.WHOLE]
    assert rows[0] == EncodedRow([], [], [[]], truncation=Truncation.WITH_TOOLS)
    with pytest.raises(UserError, match="1 of the prompts are"):
        encode.prompts([asked])
