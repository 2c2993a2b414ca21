"""Turns become text by the template, whose refusal is named."""

import pytest
from chat_templates import CHATML, SYSTEM, TURNS, template_of
from tiny import tiny_tokenizer

from dschat.data.comparisons import Turn
from dschat.data.rendering import Renderer, own_template, shared_start
from dschat.data.template_trial import configure_template
from dschat.data.templates import ChatTemplate
from dschat.errors import UserError


def test_a_conversation_that_the_template_refuses_is_named_by_its_roles():
    with pytest.raises(UserError, match="does not take a conversation of user, system, user"):
        template_of("mistral").prompt((TURNS[0], SYSTEM, TURNS[2]))


def test_of_a_long_conversation_that_is_refused_only_the_first_roles_are_named():
    tokenizer = tiny_tokenizer()
    configure_template(tokenizer, "none")
    with pytest.raises(UserError, match=r"of (user, assistant, ){3}\.\.\. \(101 messages\) \("):
        ChatTemplate(tokenizer).prompt((*[TURNS[0], TURNS[1]] * 50, TURNS[2]))


@pytest.mark.parametrize(
    ("one", "other", "shared"), [("abc", "abd", "ab"), ("ab", "abc", "ab"), ("", "a", ""), ("x", "y", "")]
)
def test_two_texts_share_what_both_begin_with(one, other, shared):
    assert shared_start(one, other) == shared_start(other, one) == shared


def test_of_several_templates_the_one_for_chat_is_taken():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "rag": "x"}
    assert own_template(tokenizer) == CHATML
    tokenizer.chat_template = CHATML
    assert own_template(tokenizer) == CHATML


def test_a_template_that_reads_no_tools_takes_none_and_other_fields_that_it_reads_are_shown():
    renderer = Renderer(tiny_tokenizer(), "{% for m in messages %}{{ m.content }}{{ m.mood }}{% endfor %}")
    assert renderer.thought_key is None
    assert renderer.takes_tools(TURNS)
    assert not renderer.takes_tools((Turn("tools", "[]"), *TURNS))
    told = Turn("user", "Tea?", None, '{"mood": "!", "reasoning": "hm", "weight": 2}')
    assert renderer.render((told,)) == "Tea?!"
    assert renderer.unshown((told,)) == {"reasoning", "weight"}
