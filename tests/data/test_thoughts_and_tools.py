"""Reasoning, tools and marks: from messages to the tokens that are learned."""

import json
from functools import cache

import pytest
from tiny import comparison_rows, tiny_tokenizer

from dschat.data.comparisons import Comparison, Turn
from dschat.data.encoder import Encoder
from dschat.data.layouts import LAYOUTS
from dschat.data.templates import PLAIN, TOOLS, ChatTemplate
from dschat.data.tokenization import tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.data.tools import with_tools
from dschat.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = """
{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
{%- for t in tools %}{{- t | tojson + '\n' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set c = m.content %}{%- set r = '' %}
    {%- if m.reasoning_content is string %}{%- set r = m.reasoning_content %}
    {%- elif '</think>' in c %}
      {%- set r = c.split('</think>')[0].split('<think>')[-1].strip() %}
      {%- set c = c.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or r) %}{{- '<think>\n' + r + '\n</think>\n\n' }}{%- endif %}
    {{- c }}
    {%- for t in m.tool_calls or [] %}
      {{- '<tool_call>\n' + t.function.name + ' ' + (t.function.arguments | tojson) + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
  {%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
R1 = (  # as the distillations of DeepSeek-R1: calls want their arguments as text
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<|im_sep|>' }}{% for t in m.tool_calls %}"
    "{{ '<call>' + t.function.name + '\n' + t.function.arguments + '</call>' }}{% endfor %}{{ '<|im_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_sep|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<out>' + m.content + '</out>' }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_sep|><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    "{{ '<|im_start|>assistant\n' + '{\"name\": \"' + f.name + '\", \"parameters\": ' }}"
    "{{ f.arguments | tojson + '}<|im_end|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>ipython\n' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
THINKING = CHATML.replace("m.content +", "('<t>' + m.thinking + '</t>' if m.thinking else '') + m.content +")
OPENED = "('<think>\n' + (m.reasoning or '') + '\n</think>\n\n' if m.role == 'assistant' else '')"
ALWAYS_THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'").replace(
    "m.content", f"{OPENED} + m.content"
)


@cache
def tokenizer(template, end="<|im_end|>"):
    made = tiny_tokenizer()
    made.add_tokens(["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<think>", "</think>"], special_tokens=True)
    made.eos_token = end
    made.chat_template = template
    return made


def read(messages, **row):
    row = {"messages": messages, **row}
    return with_tools(LAYOUTS["messages"].read(row), row)


def said(role, content=None, **fields):
    return {"role": role, "content": content, **fields}


def sft(template, *rows, **settings):
    return tokenize_sft(comparison_rows(*rows), tokenizer(template), max_seq_len=512, **settings)


def learned(template, *rows, **settings):
    """Each row's text with what is learned of it between brackets."""
    shown = []
    for row in sft(template, *rows, **settings).rows.to_list():
        text, inside = "", False
        for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True):
            text += "[" * (flag > inside) + "]" * (flag < inside) + tokenizer(template).decode([token])
            inside = flag
        shown.append(text + "]" * inside)
    return shown


TURNS = [said("user", "q"), said("assistant", "a", weight=0), said("user", "r"), said("assistant", "b")]


@pytest.mark.parametrize("template", [PLAIN, CHATML, QWEN3, LLAMA3, MISTRAL, R1])
def test_a_turn_marked_as_not_to_be_learned_stays_in_the_context(template):
    (text,) = learned(template, read(TURNS))
    (without,) = learned(template, read([{**turn, "weight": None} for turn in TURNS]))
    assert text.replace("[", "").replace("]", "") == without.replace("[", "").replace("]", "")
    assert (text.count("["), without.count("[")) == (
        1 + 4 * (template == MISTRAL),
        2 + 4 * (template == MISTRAL),
    )
    assert text.rpartition("[")[2] == without.rpartition("[")[2]


def test_a_mark_on_the_last_answer_leaves_the_earlier_ones_or_nothing():
    last = [*TURNS[:1], said("assistant", "a"), *TURNS[2:3], said("assistant", "b", train=False)]
    tokenized = sft(CHATML, read(last), read(TURNS[:2]))
    assert tokenized.dropped == {"nothing left to learn": 1}
    assert learned(CHATML, read(last)) == [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n<|im_start|>user\nr<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>"
    ]


def test_with_the_prompt_everything_is_learned_but_what_is_marked():
    (text,) = learned(CHATML, read(TURNS), train_on_prompt=True)
    assert text == (
        "<|im_start|>[user\nq<|im_end|>\n<|im_start|>assistant\n]a<|im_end|>[\n<|im_start|>user\nr<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>]"
    )


def test_yes_on_a_question_is_honoured_also_where_only_the_last_answer_is_learned():
    (text,) = learned(CHATML, read([said("user", "q", train=True), said("assistant", "a")]))
    assert text == "<|im_start|>user\n[q<|im_end|>]\n<|im_start|>assistant\n[a<|im_end|>]"
    row = {"prompt": TURNS[:1] + [said("assistant", "x", train=True), said("user", "r")], "completion": "b"}
    (text,) = learned(CHATML, LAYOUTS["prompt_completion"].read(row))
    assert text.count("[") == 2


def test_a_mark_does_not_keep_an_answer_from_steps_2_and_3():
    pair = Comparison("q", (Turn("assistant", "a", False), "b"))
    assert len(tokenize_pairs(comparison_rows(pair), tokenizer(CHATML), max_seq_len=99).rows) == 1
    assert len(tokenize_prompts(comparison_rows(pair), tokenizer(CHATML), max_prompt_seq_len=99).rows) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("template", "thought"),
    [
        (QWEN3, "<think>\nhm\n</think>\n\n"),
        (THINKING, "<t>hm</t>"),
        (ALWAYS_THINKING, "hm\n</think>\n\n"),
        (R1, "hm\n</think>\n\n"),
    ],
)
def test_a_thought_is_shown_and_learned_whatever_the_data_and_the_template_call_it(template, thought, name):
    tokenized = sft(template, read([said("user", "q"), said("assistant", "a", **{name: "hm"})]))
    assert tokenized.unshown == {}
    (text,) = learned(template, read([said("user", "q"), said("assistant", "a", **{name: "hm"})]))
    assert text.endswith(f"[{thought}a<|im_end|>]")
    alone = read([said("user", "q"), said("assistant", "", **{name: "hm"})])
    assert thought.strip() in learned(template, alone)[0]


@pytest.mark.parametrize("template", [PLAIN, CHATML, LLAMA3, MISTRAL])
def test_a_thought_that_the_template_does_not_show_is_named_and_the_row_kept(template):
    rows = [read([said("user", "q"), said("assistant", "a", thinking="hm", mood="calm")]), read(TURNS)]
    tokenized = sft(template, *rows)
    assert (len(tokenized.rows), tokenized.unshown) == (2, {"reasoning": 1, "mood": 1})


def test_a_thought_in_the_text_that_the_template_takes_away_is_named():
    template = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")
    tokenized = sft(template, *(Comparison("q", (answer,)) for answer in ("<think>hm</think>a", "a")))
    assert tokenized.unshown == {"reasoning": 1}
    assert sft(R1, Comparison("q", ("<think>hm</think>a",))).unshown == {}


def test_an_answer_that_is_shown_elsewhere_than_after_the_generation_prompt_is_refused_and_not_cut():
    template = CHATML.replace("m.role +", "m.role + (m.reasoning or '') +")
    with pytest.raises(UserError, match=r"row 1 .* it shows that answer elsewhere than after its gen"):
        sft(template, read([said("user", "q"), said("assistant", "a", reasoning="hm")]))


def test_a_field_that_the_template_reads_is_shown():
    template = CHATML.replace("m.content +", "(m.mood + ': ' if m.mood else '') + m.content +")
    rows = read([said("user", "q"), said("assistant", "a", mood="calm")])
    assert learned(template, rows)[0].endswith("[calm: a<|im_end|>]")
    assert sft(template, rows).unshown == {}


def test_earlier_answers_that_lose_their_thoughts_are_not_learned_without_them_and_counted():
    thoughtful = [said("user", "q"), said("assistant", "a", thinking="hm")] * 2
    for template in (QWEN3, R1):
        (text,) = learned(template, read(thoughtful))
        assert text.count("[") == 1
        assert text.endswith("a<|im_end|>]")
        (name,) = sft(template, read(thoughtful)).unshown
        assert name == "thoughts of earlier answers, so that these are not learned"
    (text,) = learned(THINKING, read(thoughtful))
    assert text.count("[<t>hm</t>a<|im_end|>]") == 2


def test_an_answer_after_an_opened_thought_is_what_generation_would_write():
    opened = "<|im_start|>q<|im_sep|><think>\n"
    for answer, continuation in (
        ("a", "\n</think>\n\na"),
        ("<think>\nhm\n</think>\n\na", "hm\n</think>\n\na"),
        ("hm</think>a", "hm\n</think>\n\na"),
        (Turn("assistant", "a", fields='{"reasoning": "hm"}'), "hm\n</think>\n\na"),
    ):
        template = ChatTemplate(tokenizer(R1))
        assert template.texts("q", [answer]) == (opened, [continuation])
        assert template.answer_alone(answer, ended=True) == continuation
    rows = comparison_rows(Comparison("q", ("a", "hm</think>a")))
    (pair,) = tokenize_pairs(rows, tokenizer(R1), max_seq_len=99).rows.to_list()
    assert tokenizer(R1).decode(pair["chosen_ids"]) == opened + "\n</think>\n\na<|im_end|>"
    assert tokenizer(R1).decode(pair["rejected_ids"]) == opened + "hm\n</think>\n\na<|im_end|>"


@pytest.mark.parametrize(
    ("opens", "end"),
    [
        ("<think>\\n", "\n</think>\n\na"),
        ("[THINK]", "\n[/THINK]\n\na"),
        ("<|START_THINKING|>", "\n<|END_THINKING|>\n\na"),
        ("<seed:think>", "\n</seed:think>\n\na"),
        ("◁think▷", "\n◁/think▷\n\na"),
        ("<think>\\n\\n</think>\\n\\n", "a"),  # opened and closed: the answer follows
        ("\\n", "a"),
    ],
)
def test_what_a_generation_prompt_opens_is_closed_as_it_was_opened(opens, end):
    made = tiny_tokenizer()
    made.chat_template = CHATML.replace("assistant\n'", f"assistant\n{opens}'")
    assert ChatTemplate(made).answer("q", "a") == end + "<|im_end|>"


ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_CALL = [
    said("user", "q"),
    said("assistant", tool_calls=[CALL]),
    said("tool", "5"),
    said("assistant", "b"),
]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (QWEN3, '[<tool_call>\nadd {"a": 1}\n</tool_call><|im_end|>]'),
        (LLAMA3, '[{"name": "add", "parameters": {"a": 1}}<|im_end|>]'),
        (R1, '[<call>add\n{"a": 1}</call><|im_end|>]'),
    ],
)
def test_calls_are_learned_and_what_tools_return_is_not(template, call):
    (text,) = learned(template, read(WITH_CALL))
    assert call in text
    before, _, after = text.partition("5")
    assert before.count("[") == before.count("]") == 1
    assert "b<|im_end|>]" in after
    (last,) = learned(template, read(WITH_CALL[:2]))
    assert last.endswith("<|im_end|>]")
    assert '{"a": 1}' in last


def test_a_call_with_a_thought_is_learned_whole():
    thoughtful = [said("user", "q"), said("assistant", "", tool_calls=[CALL], reasoning="hm"), *WITH_CALL[2:]]
    (text,) = learned(QWEN3, read(thoughtful))
    assert '[<think>\nhm\n</think>\n\n<tool_call>\nadd {"a": 1}\n</tool_call><|im_end|>]' in text


def test_sharegpt_calls_are_the_same_conversation():
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": json.dumps([ADD]),
    }
    shared = with_tools(LAYOUTS["sharegpt"].read(row), row)
    assert learned(QWEN3, shared) == learned(QWEN3, read(WITH_CALL, tools=[ADD]))


@pytest.mark.parametrize("template", [QWEN3, LLAMA3])
def test_tools_of_a_row_reach_the_template_in_every_step(template):
    row = read(TURNS, tools=[ADD])
    shown = '{"type": "function", "function": {"name": "add", "description": "Adds.", '
    assert shown in learned(template, row)[0]
    pair = Comparison(row.prompt, ("a", "b"))
    (prompt,) = tokenize_prompts(comparison_rows(row), tokenizer(template), max_prompt_seq_len=512).rows[
        "input_ids"
    ]
    (chosen,) = tokenize_pairs(comparison_rows(pair), tokenizer(template), max_seq_len=512).rows["chosen_ids"]
    assert shown in tokenizer(template).decode(prompt)
    assert shown in tokenizer(template).decode(chosen)


@pytest.mark.parametrize("template", [PLAIN, CHATML, MISTRAL])
def test_conversations_with_tools_that_a_template_does_not_take_are_dropped_and_counted(template):
    rows = comparison_rows(read(WITH_CALL), read(TURNS, tools=[ADD]), read(TURNS))
    for tokenized in (
        tokenize_sft(rows, tokenizer(template), max_seq_len=512),
        tokenize_prompts(rows, tokenizer(template), max_prompt_seq_len=512),
        tokenize_pairs(
            comparison_rows(*(Comparison(read(WITH_CALL).prompt, (answer, "c")) for answer in "abb")).select(
                [0, 1]
            ),
            tokenizer(template),
            max_seq_len=512,
        ),
    ):
        assert tokenized.dropped == {TOOLS: 2}


def test_a_call_that_a_template_refuses_drops_the_row_and_not_the_run():
    twice = [WITH_CALL[0], said("assistant", tool_calls=[CALL, CALL]), *WITH_CALL[2:]]
    tokenized = sft(LLAMA3, read(twice), read(WITH_CALL))
    assert (len(tokenized.rows), tokenized.dropped) == (1, {TOOLS: 1})


def test_a_reader_that_takes_no_tools_drops_the_prompt():
    rows = comparison_rows(read(TURNS, tools=[ADD]), read(TURNS))
    tokenized = tokenize_prompts(
        rows, tokenizer(QWEN3), max_prompt_seq_len=512, reward_tokenizer=tokenizer(CHATML)
    )
    assert tokenized.dropped == {TOOLS: 1}
    with pytest.raises(UserError, match=f"1 of the prompts are {TOOLS}; leave them out"):
        Encoder(tokenizer(CHATML)).prompts([read(TURNS).prompt, read(TURNS, tools=[ADD]).prompt])


def test_tools_stay_when_early_turns_go():
    row = read([said("user", "q" * 40), said("assistant", "a"), *TURNS[2:]], tools=[ADD])
    whole = sft(QWEN3, row).rows[0]["length"]
    tokenized = tokenize_sft(comparison_rows(row), tokenizer(QWEN3), max_seq_len=whole - 1)
    assert tokenized.num_fewer_turns == 1
    assert tokenizer(QWEN3).decode(tokenized.rows[0]["input_ids"]).startswith("<|im_start|>system\n# Tools\n")


def test_tools_beside_text_that_is_rendered_already_leave_it_as_it_is():
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    row = with_tools(Comparison(text, ("a",)), {"tools": [ADD]})
    assert learned(QWEN3, row)[0].startswith("<|im_start|>user\nq<|im_end|>")


def test_neighbouring_answers_with_different_marks_are_masked_apart():
    (text,) = learned(CHATML, read([TURNS[0], TURNS[1], said("assistant", "b", weight=1)]))
    assert "assistant\na<|im_end|>" in text
    assert text.endswith("[b<|im_end|>]")
    with pytest.raises(UserError, match="does not take a conversation of user, assistant"):
        learned(MISTRAL, read([TURNS[0], TURNS[1], said("assistant", "b", weight=1)]))


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("template", [CHATML, QWEN3, R1, LLAMA3])
def test_an_answer_ends_with_one_end_token_the_templates_own_where_it_writes_one(template, end):
    made = tokenizer(template, end)
    rows = comparison_rows(Comparison("q", ("a",)), Comparison("q", ("a<|im_end|>",)))
    for row in tokenize_sft(rows, made, max_seq_len=99).rows.to_list():
        assert made.decode(row["input_ids"]).endswith("a<|im_end|>")
        assert not made.decode(row["input_ids"]).endswith("<|im_end|><|im_end|>")
        assert row["loss_mask"][-1]
