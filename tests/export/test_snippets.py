"""The code of model cards makes the tokens that the steps make."""

import pytest
import torch
from chat_templates import EACH, tokenizer_of
from tiny import tiny_tokenizer

from dschat.data.comparisons import Turn
from dschat.data.encoder import Encoder
from dschat.export.snippets import ANSWER, QUESTION, prompt_ids, scored_ids, snippet


def ids_of(code: str, tokenizer) -> list[int]:
    found = {"tokenizer": tokenizer, "torch": torch}
    exec(code, found)
    assert found["ids"].shape[0] == 1
    return found["ids"][0].tolist()


def assert_equal_to_a_steps(tokenizer) -> None:
    (row,) = Encoder(tokenizer).rows([(Turn("user", QUESTION),)], [[ANSWER]])
    assert ids_of(prompt_ids(tokenizer), tokenizer) == row.prompt
    assert ids_of(scored_ids(tokenizer), tokenizer) == [*row.prompt, *row.answers[0]]


@EACH
def test_the_tokens_are_those_of_a_step(name):
    assert_equal_to_a_steps(tokenizer_of(name))


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    assert_equal_to_a_steps(tiny_tokenizer())
    with_bos = tokenizer_of("plain_bos")
    with_bos.chat_template = None
    assert_equal_to_a_steps(with_bos)


@pytest.mark.parametrize("head", ["language_model", "score"])
def test_of_a_template_that_shows_no_conversation_the_loading_is_told(head):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert snippet(head, "m", tokenizer).endswith('dtype="auto")\n')


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_templates_way_is_shown(name):
    assert "chat = [{'role': 'user'" in scored_ids(tokenizer_of(name))
