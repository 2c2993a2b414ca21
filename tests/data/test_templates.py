from dataclasses import dataclass
from functools import cache
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import comparison_rows, tiny_tokenizer

from dschat.data import template_trial
from dschat.data.comparisons import Comparison, Turn, parse_dialogue
from dschat.data.template_trial import settle_template
from dschat.data.templates import NONE, PLAIN, ChatTemplate
from dschat.data.tokenization import tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.errors import UserError

# The templates below follow those that the model families publish, less their tools.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ALTERNATING = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) or m['role'] == 'system' %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATING + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATING + "{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
SYSTEM_LAST = (  # as Mistral's third: the system message stands in the last question
    "{% set system = messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '' %}"
    "{% set last = messages | selectattr('role', 'eq', 'user') | list | last %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if m == last else '') + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

TURNS = (Turn("user", "Tea?"), Turn("assistant", "Yes."), Turn("user", "Milk?"))
ANSWER = "A drop."
SYSTEM = Turn("system", "Be brief.")


@dataclass(frozen=True)
class Style:
    """A template with its tokenizer's marks, and what it makes of `TURNS` and `ANSWER`."""

    template: str
    end: str
    asked: str
    answered: str
    """Less the end token."""
    learned: tuple[str, str]
    """With the end token: the template's own, or else the tokenizer's."""
    system: str
    """What stands before "Tea?" where `SYSTEM` comes first."""
    bos: bool = False
    marks: tuple[str, ...] = ()


IM = ("<|im_start|>", "<|im_end|>")
CHATML_ASKED = (
    "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    "Yes.<|im_end|>\n<|im_start|>user\nMilk?<|im_end|>\n<|im_start|>assistant\n"
)
CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
PLAIN_ASKED = "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: Milk?\n\nAssistant:"
GEMMA_ASKED = (
    "<s><start_of_turn>user\nTea?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nMilk?<end_of_turn>\n<start_of_turn>model\n"
)
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_MARKS = ("<start_of_turn>", "<end_of_turn>")

STYLES = {
    "plain": Style(
        PLAIN,
        "<|endoftext|>",
        PLAIN_ASKED,
        " A drop.",
        (" Yes.", " A drop.<|endoftext|>"),
        "Be brief.\n\nHuman: ",
    ),
    "plain_bos": Style(
        PLAIN,
        "<|endoftext|>",
        PLAIN_ASKED,
        " A drop.",
        (" Yes.", " A drop.<|endoftext|>"),
        "Be brief.\n\nHuman: ",
        bos=True,
    ),
    "chatml": Style(
        CHATML,
        "<|im_end|>",
        CHATML_ASKED,
        "A drop.",
        ("Yes.<|im_end|>", "A drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "chatml_of_a_base_model": Style(
        CHATML,
        "<|endoftext|>",
        CHATML_ASKED,
        "A drop.<|im_end|>",
        ("Yes.<|im_end|>", "A drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "thinking": Style(
        THINKING,
        "<|im_end|>",
        CHATML_ASKED.removeprefix("<|im_start|>system\nYou help.<|im_end|>\n"),
        "<think>\n\n</think>\n\nA drop.",
        ("Yes.<|im_end|>", "<think>\n\n</think>\n\nA drop.<|im_end|>"),
        CHATML_SYSTEM,
        marks=IM,
    ),
    "llama3": Style(
        LLAMA3,
        "<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nTea?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMilk?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A drop.",
        ("Yes.<|eot_id|>", "A drop.<|eot_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        bos=True,
        marks=HEADER,
    ),
    "mistral": Style(
        MISTRAL,
        "<|endoftext|>",
        "<s>[INST] Tea? [/INST] Yes.<|endoftext|>[INST] Milk? [/INST]",
        " A drop.",
        (" Yes.<|endoftext|>", " A drop.<|endoftext|>"),
        "<s>[INST] Be brief.\n\n",
        bos=True,
        marks=("[INST]", "[/INST]"),
    ),
    "gemma": Style(
        GEMMA,
        "<end_of_turn>",
        GEMMA_ASKED,
        "A drop.",
        ("Yes.<end_of_turn>", "A drop.<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\n",
        bos=True,
        marks=GEMMA_MARKS,
    ),
    "gemma_of_a_base_model": Style(
        GEMMA,
        "<|endoftext|>",
        GEMMA_ASKED,
        "A drop.<end_of_turn>",
        ("Yes.<end_of_turn>", "A drop.<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\n",
        bos=True,
        marks=GEMMA_MARKS,
    ),
}
EACH = pytest.mark.parametrize("name", STYLES)


@cache
def tokenizer_of(name):
    style = STYLES[name]
    tokenizer = tiny_tokenizer(bos=style.bos)
    tokenizer.add_tokens(list(style.marks), special_tokens=True)
    tokenizer.eos_token = style.end
    tokenizer.chat_template = style.template
    return tokenizer


def template_of(name):
    return ChatTemplate(tokenizer_of(name))


def templated(template, **settings):
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def learned_texts(tokenizer, row):
    """The runs of tokens that the mask marks, as text."""
    runs = groupby(zip(row["input_ids"], row["loss_mask"], strict=True), key=lambda pair: pair[1])
    return tuple(tokenizer.decode([token for token, _ in run]) for marked, run in runs if marked)


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


@EACH
def test_the_pieces_together_are_the_whole(name):
    template = template_of(name)
    pieces, _ = template.pieces(TURNS, ANSWER)
    assert "".join(text for text, _ in pieces) == template.prompt(TURNS) + template.answer(TURNS, ANSWER)
    said = [text for text, learned in pieces if learned]
    assert said == [STYLES[name].learned[0], STYLES[name].answered]


def test_an_answer_that_repeats_an_earlier_text_is_found_in_its_own_place():
    turns = (Turn("user", "Yes."), Turn("assistant", "Yes."), Turn("user", "Yes."))
    for name in STYLES:
        positions, position = [], 0
        for text, learned in template_of(name).pieces(turns, "Yes.")[0]:
            positions += [position + text.index("Yes.")] if learned else []
            position += len(text)
        whole = template_of(name).prompt(turns) + template_of(name).answer(turns, "Yes.")
        assert [whole[: p + 4].count("Yes.") for p in positions] == [2, 4]


def test_an_earlier_answer_is_found_where_the_template_moves_the_system_message():
    template = ChatTemplate(templated(SYSTEM_LAST))
    pieces, _ = template.pieces((SYSTEM, *TURNS), ANSWER)
    assert pieces == [
        ("[INST] Tea? [/INST]", False),
        (" Yes.<|endoftext|>", True),
        ("[INST] Be brief. Milk? [/INST]", False),
        (" A drop.", True),
    ]


def test_an_earlier_answer_that_is_shown_in_another_form_is_not_learned():
    turns = (
        Turn("user", "Tea?"),
        Turn("assistant", "hm</think>Yes."),
        Turn("user", "Milk?"),
        Turn("assistant", "No."),
        Turn("user", "Now?"),
    )
    pieces, num_missed = template_of("thinking").pieces(turns, ANSWER)
    assert num_missed == 1
    assert "hm" not in "".join(text for text, _ in pieces)
    assert [text for text, learned in pieces if learned] == [
        "No.<|im_end|>",
        "<think>\n\n</think>\n\nA drop.",
    ]


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
@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_alone_is_read_back_as_its_content(name, ended):
    template = template_of(name)
    shown = template.answer_alone(f" {ANSWER} ", ended)
    assert shown == STYLES[name].answered.partition(ANSWER)[0] + ANSWER + (
        STYLES[name].answered.partition(ANSWER)[2] if ended else ""
    )
    assert template.content(shown) == ANSWER


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


BAD = {
    "{% for m in messages %}\n{{ messages[0]['content']": r"not sound Jinja \(line 2: unexpected end",
    "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}": "does not work",
    "{{ messages | length }}": "cannot be trained with",
    "{{ raise_exception('never') }}": "never",
    "{{ 1 / 0 }}": "does not work with a conversation of user .ZeroDivisionError: division by zero",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for a in [1] %}" * 25 + "{% endfor %}" * 25: "too many statically nested blocks",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    CHATML + "{{ 'x' * 10**6 }}": "makes 1,000,[0-9]* characters",
    CHATML + "{{ '\\ud800' }}": "half of a surrogate pair",
}


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_cannot_serve_is_refused_with_the_flag(tmp_path, template):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(UserError, match=BAD[template]) as error:
        settle_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))
    assert str(error.value).count("--chat_template") == 1


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'x ' * add_generation_prompt }}",
            r"its generation prompt ends with 'x ', which the same answer .* remove that text",
        ),
        (CHATML.replace("assistant\\n'", "assistant\\n<answer>'"), r".*ends with '<answer>', which"),
        ("{{ messages[0]['content'] }}", "it does not show an answer as it is"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "it shows a question in another form once it is answered",
        ),
    ],
)
def test_a_template_that_shows_no_answer_to_learn_still_asks_and_is_refused_by_steps_1_and_2(
    template, problem
):
    tokenizer = templated(None)
    tokenizer.chat_template = template
    settle_template(tokenizer, None)
    rows = comparison_rows(Comparison("Tea?", ("Yes.", "No.")))
    assert len(tokenize_prompts(rows, tokenizer, max_prompt_seq_len=99).rows) == 1
    for tokenize in (tokenize_sft, tokenize_pairs):
        with pytest.raises(UserError, match=f"cannot be trained with: {problem}.*--chat_template"):
            tokenize(rows, tokenizer, max_seq_len=99)


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10 ** 11 }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",  # which no signal handler of Python's interrupts
    ],
)
def test_a_template_that_takes_all_time_or_memory_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(template_trial, "TRIAL_SECONDS", 1)
    (tmp_path / "t.jinja").write_text(bomb + CHATML)
    with pytest.raises(UserError, match=r"needs more than 1 seconds or 1024 MiB.*--chat_template"):
        settle_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    ("own", "choice", "settled"),
    [(None, None, PLAIN), (CHATML, None, CHATML), (CHATML, "plain", PLAIN), (CHATML, "none", NONE)],
)
def test_the_tokenizers_own_template_goes_before_the_plain_one_and_a_choice_before_both(own, choice, settled):
    tokenizer = templated(own)
    settle_template(tokenizer, choice)
    assert tokenizer.chat_template == settled


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML)
    tokenizer = tiny_tokenizer()
    settle_template(tokenizer, str(tmp_path / "t.jinja"))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = type(tokenizer).from_pretrained(tmp_path / "saved")
    settle_template(loaded, None)
    assert ChatTemplate(loaded).prompt(TURNS) == CHATML_ASKED


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (" \n", "is empty")])
def test_a_template_file_that_is_missing_or_empty_is_named(tmp_path, content, message):
    if content:
        (tmp_path / "t.jinja").write_text(content)
    with pytest.raises(UserError, match=rf"--chat_template .*t\.jinja {message}"):
        settle_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))


def test_a_conversation_that_the_template_refuses_is_named_by_its_roles():
    with pytest.raises(UserError, match="does not take a conversation of user, system, user"):
        template_of("mistral").prompt((TURNS[0], SYSTEM, TURNS[2]))


def test_of_a_long_conversation_that_is_refused_only_the_first_roles_are_named():
    tokenizer = tiny_tokenizer()
    settle_template(tokenizer, "none")
    with pytest.raises(UserError, match=r"of (user, assistant, ){3}\.\.\. \(101 messages\) \("):
        ChatTemplate(tokenizer).prompt((*[TURNS[0], TURNS[1]] * 50, TURNS[2]))
