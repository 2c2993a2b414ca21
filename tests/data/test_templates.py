import pytest
from chat_templates import (
    ANSWER,
    CHATML_ASKED,
    EACH,
    PLAIN_ASKED,
    STYLES,
    SYSTEM,
    TURNS,
    learned_texts,
    template_of,
    templated,
    tokenizer_of,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import comparison_rows

from dschat.data.comparisons import Comparison, Turn, parse_dialogue
from dschat.data.templates import NONE, PLAIN, ChatTemplate
from dschat.data.tokenization import tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.errors import UserError


@EACH
def test_a_conversation_is_shown_as_written_here_by_hand(name):
    style, template = STYLES[name], template_of(name)
    assert template.prompt(TURNS) == style.asked
    assert template.answer(TURNS, ANSWER) == style.answered
    assert template.texts(TURNS, [ANSWER, f" {ANSWER}\n"]) == (style.asked, [style.answered] * 2)


@EACH
def test_prompt_and_answer_are_the_templates_own_rendering_of_the_whole(name):
    style, template = STYLES[name], template_of(name)
    messages = [turn._asdict() for turn in (*TURNS, Turn("assistant", ANSWER))]
    whole = tokenizer_of(name).apply_chat_template(messages, tokenize=False)
    shown = template.prompt(TURNS) + template.answer(TURNS, ANSWER)
    assert whole.removeprefix(shown).strip() in ("", style.end)
    assert whole.startswith(shown)


@EACH
def test_text_with_human_and_assistant_marks_is_the_same_conversation(name):
    assert template_of(name).prompt(PLAIN_ASKED) == STYLES[name].asked
    assert template_of(name).pieces(PLAIN_ASKED, f" {ANSWER}") == template_of(name).pieces(TURNS, ANSWER)


@EACH
def test_the_mask_marks_what_the_assistant_says_and_nothing_else(name):
    rows = comparison_rows(Comparison(TURNS, (ANSWER,), learn_all_turns=True), Comparison(TURNS, (ANSWER,)))
    all_turns, last = tokenize_sft(rows, tokenizer_of(name), max_seq_len=512).rows.to_list()
    assert learned_texts(tokenizer_of(name), all_turns) == STYLES[name].learned
    assert learned_texts(tokenizer_of(name), last) == STYLES[name].learned[1:]
    assert [row["num_targets"] for row in (all_turns, last)] == [
        sum(row["loss_mask"]) for row in (all_turns, last)
    ]


@EACH
def test_bos_and_the_last_end_token_stand_once(name):
    style, tokenizer = STYLES[name], tokenizer_of(name)
    (row,) = tokenize_sft(
        comparison_rows(Comparison(TURNS, (ANSWER,))), tokenizer, max_seq_len=512
    ).rows.to_list()
    (pair,) = tokenize_pairs(
        comparison_rows(Comparison(TURNS, (ANSWER, "No."))), tokenizer, max_seq_len=512
    ).rows.to_list()
    (prompt,) = tokenize_prompts(
        comparison_rows(Comparison(TURNS)), tokenizer, max_prompt_seq_len=512
    ).rows.to_list()
    start = "<s>" * style.bos
    asked = start + style.asked.removeprefix("<s>")
    assert tokenizer.decode(row["input_ids"]) == asked + style.learned[1]
    assert pair["chosen_ids"] == row["input_ids"]
    assert tokenizer.decode(pair["rejected_ids"]) == asked + style.learned[1].replace(ANSWER, "No.")
    assert row["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
    assert tokenizer.decode(prompt["input_ids"]) == asked


@EACH
def test_a_bos_that_only_the_template_or_only_the_tokenizer_writes_stands_once(name):
    tokenizer = templated(STYLES[name].template, bos=True)
    bare = templated(STYLES[name].template, bos=True)
    bare.backend_tokenizer.post_processor = templated(PLAIN).backend_tokenizer.post_processor
    in_template = "bos_token" in STYLES[name].template
    for each, count in ((tokenizer, 1), (bare, int(in_template))):
        rows = tokenize_prompts(comparison_rows(Comparison(TURNS)), each, max_prompt_seq_len=512).rows
        assert rows["input_ids"][0].count(each.bos_token_id) == count


@EACH
def test_a_system_message_leads_or_becomes_part_of_the_first_question(name):
    asked = template_of(name).prompt((SYSTEM, *TURNS))
    assert asked.startswith(STYLES[name].system + "Tea?")
    assert asked.endswith(STYLES[name].asked.partition("Tea?")[2])


@EACH
def test_answers_before_the_first_question_are_left_out_where_the_template_refuses_them(name):
    template = template_of(name)
    asked = template.prompt((Turn("assistant", "Hello!"), *TURNS))
    led = template.prompt((SYSTEM, Turn("assistant", "Hello!"), *TURNS))
    refuses = name.startswith(("mistral", "gemma"))
    assert ("Hello!" in asked, "Hello!" in led) == (not refuses, not refuses)
    assert led.count("Be brief.") == 1
    if refuses:
        assert asked == STYLES[name].asked
        assert led == template.prompt((SYSTEM, *TURNS))


# Dialogues of the plain template are read as turns instead.
@pytest.mark.parametrize("name", [name for name in STYLES if not name.startswith("plain")])
def test_text_that_is_rendered_already_stays_as_it_is(name):
    template, style = template_of(name), STYLES[name]
    for turns in (TURNS, (SYSTEM, *TURNS)):
        rendered = template.prompt(turns)
        for text in (rendered, rendered.removeprefix("<s>")):
            assert template.prompt(text) == text
            answered = style.answered
            assert template.answer(text, ANSWER) == answered
            assert template.pieces(text, ANSWER) == ([(text, False), (answered, True)], 0)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma"])
def test_rendered_text_gets_its_bos_once(name):
    tokenizer = tokenizer_of(name)
    texts = [STYLES[name].asked, STYLES[name].asked.removeprefix("<s>"), "\n" + STYLES[name].asked]
    rows = tokenize_prompts(
        comparison_rows(*map(Comparison, texts)), tokenizer, max_prompt_seq_len=512
    ).rows.to_list()
    shown = [tokenizer.decode(row["input_ids"]) for row in rows]
    expected = STYLES[name].asked
    assert shown == [expected, expected, expected if STYLES[name].bos else "\n" + expected]


def test_rendered_text_without_the_default_system_message_is_known_too():
    text = "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    assert template_of("chatml").prompt(text) == text


def test_what_looks_a_little_like_a_mark_is_no_rendered_text():
    assert template_of("mistral").prompt("INST] is a mark").startswith("<s>[INST] INST] is")


def test_the_template_none_adds_and_removes_nothing():
    tokenizer = templated(NONE)
    template = ChatTemplate(tokenizer)
    assert template.prompt(" Q:\n\nHuman: x ") == " Q:\n\nHuman: x "
    assert template.answer("Q", " a \n") == template.answer_alone(" a \n", ended=True) == " a \n"
    assert template.content(" a \n") == " a \n"
    assert template.pieces("Q ", " a") == ([("Q ", False), (" a", True)], 0)
    with pytest.raises(UserError, match="takes a prompt and an answer as they are"):
        template.prompt(TURNS)


@EACH
def test_without_its_first_exchange_a_conversation_keeps_its_system_message(name):
    template = template_of(name)
    shorter = template.without_first_exchange((SYSTEM, *TURNS))
    assert shorter == (SYSTEM, Turn("user", "Milk?"))
    assert template.prompt(shorter).startswith(STYLES[name].system + "Milk?")
    assert template.without_first_exchange(shorter) is None
    assert template.without_first_exchange(PLAIN_ASKED) == (Turn("user", "Milk?"),)


def test_text_that_is_rendered_has_no_turns_to_lose():
    assert template_of("chatml").without_first_exchange(CHATML_ASKED) is None
    assert ChatTemplate(templated(NONE)).without_first_exchange(PLAIN_ASKED) is None


@EACH
@pytest.mark.parametrize("question", ["Milk?", "a", "user", "Yes.", "\n"])
def test_what_stands_before_the_last_question_is_not_mistaken_for_marks_or_answers(name, question):
    turns = (*TURNS[:2], Turn("user", question))
    before = template_of(name).before_question(turns)
    assert before == STYLES[name].asked.partition("Milk?")[0]


@EACH
def test_the_marks_before_a_question_hold_the_system_message(name):
    assert template_of(name).before_question((SYSTEM, Turn("user", "Tea?"))) == STYLES[name].system


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("Tea?", [("user", "Tea?")]),
        ("\n\nHuman: Tea?\n\nAssistant:", [("user", "Tea?")]),
        ("Human: Tea?\n\nAssistant: ", [("user", "Tea?")]),
        (PLAIN_ASKED, TURNS),
        ("Be brief.\n\nHuman: Tea?", [("system", "Be brief."), ("user", "Tea?")]),
        ("\n\nAssistant: Hi!\n\nHuman: Tea?", [("assistant", "Hi!"), ("user", "Tea?")]),
        ("\n\nHuman: Tea?\n\nHuman: Milk?", [("user", "Tea?\n\nMilk?")]),
        ("\n\nHuman: Tea?\n\nAssistant:\n\nHuman: Milk?", [("user", "Tea?\n\nMilk?")]),
        ("Tea?\n\nAssistant:", [("user", "Tea?")]),  # the answer's mark is no part of the question
        ("Say\n\nAssistant: x", [("user", "Say\n\nAssistant: x")]),
        ("a Human: is\n one", [("user", "a Human: is\n one")]),
        ("\n\nHuman:\n\nAssistant:", []),
        ("\n\nAssistant:", []),
    ],
)
def test_dialogues_in_text_are_read_as_turns(text, turns):
    assert parse_dialogue(text) == tuple(Turn(*turn) for turn in turns)


def test_a_dialogue_of_marks_alone_is_a_question_of_them():
    assert template_of("plain").prompt("\n\nHuman:\n\nAssistant:") == (
        "\n\nHuman: Human:\n\nAssistant:\n\nAssistant:"
    )


CONTENT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and "\n\n" not in text and "Human:" not in text
    # Private characters stand for content that is looked for.
    and "Assistant:" not in text and "\ue000" not in text
)  # fmt: skip
CONVERSATIONS = st.tuples(st.booleans(), st.lists(st.tuples(CONTENT, CONTENT), max_size=3), CONTENT).map(
    lambda drawn: (
        *([SYSTEM] if drawn[0] else []),
        *(turn for q, a in drawn[1] for turn in (Turn("user", q), Turn("assistant", a))),
        Turn("user", drawn[2]),
    )
)


@given(turns=CONVERSATIONS)
def test_plain_text_of_a_conversation_is_read_back(turns):
    assert parse_dialogue(template_of("plain").prompt(turns)) == turns


@given(name=st.sampled_from(list(STYLES)), turns=CONVERSATIONS, answer=CONTENT)
def test_pieces_are_the_whole_and_mark_each_answer(name, turns, answer):
    template = template_of(name)
    pieces, _ = template.pieces(turns, answer)
    assert "".join(text for text, _ in pieces) == template.prompt(turns) + template.answer(turns, answer)
    said = [text for text, learned in pieces if learned]
    expected = [turn.content for turn in turns if turn.role == "assistant"] + [answer]
    if name != "thinking":
        assert len(said) == len(expected)
        for text, content in zip(said, expected, strict=True):
            assert text.partition(content)[1] == content
