from functools import cache
from itertools import groupby, product

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import comparison_rows, tiny_tokenizer
from tokenizers import processors

from dschat.data.comparisons import Comparison, Turn
from dschat.data.templates import NONE
from dschat.data.tokenization import column, content_key, tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.data.tokenizer_fingerprint import start_tokens, tokenizer_fingerprint

# Untrained on these characters' pairs, the tokenizer gives digits and letters such as "q" one token each.
PROMPT, CHOSEN, REJECTED = "1234", "567", "89"


@pytest.fixture(scope="module")
def plain():
    return untemplated()


@pytest.fixture(scope="module")
def with_bos():
    return untemplated(bos=True)


def untemplated(**settings):
    """A tokenizer whose template takes text as it is."""
    tokenizer = tiny_tokenizer(**settings)
    tokenizer.chat_template = NONE
    return tokenizer


def rows(*triples):
    return comparison_rows(*(Comparison(prompt, answers) for prompt, *answers in triples))


def decoded(tokenizer, ids):
    return tokenizer.decode(ids).replace("<|endoftext|>", "$").replace("<s>", "^")


def sft(tokenizer, *triples, **settings):
    return tokenize_sft(rows(*triples), tokenizer, **{"max_seq_len": 512, **settings})


def only(tokenized):
    (row,) = tokenized.rows.to_list()
    return row


def test_the_digits_of_these_tests_are_a_token_each(plain):
    assert len(plain(PROMPT + CHOSEN + REJECTED)["input_ids"]) == 9


def test_a_row_is_prompt_answer_and_one_end_token(plain):
    row = only(sft(plain, (PROMPT, CHOSEN, REJECTED)))
    assert decoded(plain, row["input_ids"]) == "1234567$"
    assert row["loss_mask"] == [False] * 4 + [True] * 4
    assert (row["num_targets"], row["length"]) == (4, 8)


def test_bos_stands_at_the_start_of_the_prompt_and_nowhere_else(with_bos):
    assert decoded(with_bos, [start_tokens(with_bos)[0]]) == "^"
    row = only(sft(with_bos, (PROMPT, CHOSEN, REJECTED)))
    assert decoded(with_bos, row["input_ids"]) == "^1234567$"
    assert row["loss_mask"] == [False] * 5 + [True] * 4


def test_a_spelt_out_bos_or_end_token_is_not_doubled(with_bos):
    row = only(sft(with_bos, ("<s>12", "56<|endoftext|>", "x")))
    assert decoded(with_bos, row["input_ids"]) == "^1256$"


def test_an_end_token_that_a_tokenizer_adds_is_not_put_after_the_prompt():
    tokenizer = untemplated(bos=True)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    template = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    assert decoded(tokenizer, tokenizer("12")["input_ids"]) == "^12$"
    assert decoded(tokenizer, only(sft(tokenizer, ("12", "34", "x")))["input_ids"]) == "^1234$"


def test_with_the_prompt_all_tokens_but_the_first_are_targets(plain):
    row = only(sft(plain, (PROMPT, CHOSEN, REJECTED), train_on_prompt=True))
    assert (row["length"], row["num_targets"]) == (8, 7)


@pytest.mark.parametrize(
    ("max_seq_len", "text", "num_targets", "num_cut"),
    [
        (9, "^1234567$", 4, 0),  # it just fits
        (7, "^34567$", 4, 1),  # two tokens too long: the prompt loses 1 and 2, not its BOS
        (6, "^4567$", 4, 1),
        (5, "^456$", 3, 1),  # the prompt keeps its last token, the answer loses one and still ends
    ],
)
def test_a_long_row_loses_the_start_of_its_prompt_and_then_the_end_of_its_answer(
    with_bos, max_seq_len, text, num_targets, num_cut
):
    tokenized = sft(with_bos, (PROMPT, CHOSEN, REJECTED), max_seq_len=max_seq_len)
    assert decoded(with_bos, only(tokenized)["input_ids"]) == text
    assert only(tokenized)["num_targets"] == num_targets
    assert tokenized.num_cut == num_cut


def test_a_prompt_that_alone_is_too_long_is_dropped_and_counted(plain):
    tokenized = sft(plain, (PROMPT, CHOSEN, REJECTED), ("12345", "6", "7"), max_seq_len=4)
    assert [decoded(plain, ids) for ids in tokenized.rows["input_ids"]] == ["456$"]
    assert tokenized.dropped == {"prompt over --max_seq_len": 1}
    assert tokenized.shortest_prompt == 4


def test_both_answers_of_a_pair_follow_the_same_cut_prompt(plain):
    row = only(tokenize_pairs(rows((PROMPT, CHOSEN, REJECTED)), plain, max_seq_len=6))
    assert decoded(plain, row["chosen_ids"]) == "34567$"
    assert decoded(plain, row["rejected_ids"]) == "3489$"
    assert (row["length"], row["prompt_length"]) == (6, 2)


def test_pairs_that_are_equal_or_become_so_are_dropped_and_counted(plain):
    triples = [("1", "22", "22"), ("1", "5678", "5679"), ("1", "5678", "5778")]
    tokenized = tokenize_pairs(rows(*triples), plain, max_seq_len=4)
    # One prompt token, two of the answer and the end token are left: 56 equals 56, but 56 is not 57.
    assert [decoded(plain, ids) for ids in tokenized.rows["rejected_ids"]] == ["157$"]
    assert tokenized.dropped == {"answers equal as tokens": 2}
    assert tokenized.num_cut == 1


def test_long_prompts_are_dropped_in_step_3_and_never_cut(plain):
    tokenized = tokenize_prompts(rows(("123", "a", "b"), ("1234", "a", "b")), plain, max_prompt_seq_len=3)
    assert [decoded(plain, ids) for ids in tokenized.rows["input_ids"]] == ["123"]
    assert tokenized.dropped == {"prompt over --max_prompt_seq_len": 1}


def test_a_prompt_has_one_key_wherever_it_stands(plain):
    one = tokenize_prompts(rows(("12", "a", "b"), ("34", "a", "b")), plain, max_prompt_seq_len=9).rows
    other = tokenize_prompts(rows(("34", "c", "d")), plain, max_prompt_seq_len=9).rows
    assert one["key"][1] == other["key"][0] != one["key"][0]
    assert content_key([1, 2]) == content_key((1, 2)) != content_key([2, 1])


def test_unicode_survives(plain):
    row = only(sft(plain, ("Grüße 😀", " 好\u2028\n", "x")))
    assert decoded(plain, row["input_ids"]) == "Grüße 😀 好\u2028\n$"


def test_no_rows_are_no_rows(plain):
    tokenized = sft(plain, (PROMPT, CHOSEN, REJECTED)).rows
    empty = tokenize_sft(rows((PROMPT, CHOSEN, REJECTED)).select([]), plain, max_seq_len=9)
    assert len(empty.rows) == 0
    assert empty.rows.column_names == tokenized.column_names
    assert empty.shortest_prompt == 0


def test_processes_give_what_one_process_gives(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("dschat.data.tokenization.ROWS_A_PROCESS", 10)
    many = rows(*((str(i) * (i % 7 + 1), "a" * (i % 5 + 1), "b") for i in range(40)))
    many.save_to_disk(str(tmp_path))
    one = tokenize_sft(many, plain, max_seq_len=8)
    two = tokenize_sft(Dataset.load_from_disk(str(tmp_path)), plain, max_seq_len=8, num_proc=2)
    assert one.rows.to_list() == two.rows.to_list()
    assert (one.num_cut, one.dropped) == (two.num_cut, two.dropped)
    assert one.dropped


def test_pairs_of_several_processes_weigh_what_those_of_one_do(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("dschat.data.tokenization.ROWS_A_PROCESS", 10)
    many = rows(*((str(i), "1" * (i % 5 + 1), "11", "12") for i in range(40)))
    many.save_to_disk(str(tmp_path))
    many = Dataset.load_from_disk(str(tmp_path))
    groups = np.arange(40) % 7
    one, two = (
        tokenize_pairs(many, plain, max_seq_len=8, groups=groups, num_proc=number) for number in (1, 2)
    )
    assert one.rows.to_list() == two.rows.to_list()
    assert sum(two.rows["weight"]) == pytest.approx(7)


def test_the_fingerprint_follows_what_decides_the_tokens(plain, with_bos):
    prints = [
        tokenizer_fingerprint(tokenizer) for tokenizer in (plain, with_bos, tiny_tokenizer(vocab_size=300))
    ]
    assert len(set(prints)) == 3
    other_end = tiny_tokenizer()
    other_end.eos_token = "<|pad|>"
    assert tokenizer_fingerprint(other_end) != prints[0]


def test_the_fingerprint_survives_saving_and_calls_with_padding(plain, tmp_path):
    before = tokenizer_fingerprint(plain)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    loaded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(loaded) == before


def test_column_follows_a_selection():
    selected = Dataset.from_dict({"length": [5, 6, 7]}).select([2, 0])
    assert column(selected, "length").tolist() == [7, 5]


# Marks of one token each, so that lengths can be counted: S, U and A begin a turn, $ ends an answer.
CHAT = (
    "{% for m in messages %}{{ {'system': '<S>', 'user': '<U>', 'assistant': '<A>'}[m['role']] "
    "+ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"
)


@cache
def chat(bos=False):
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.add_tokens(["<S>", "<U>", "<A>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def shown(tokenizer, ids):
    return decoded(tokenizer, ids).replace("<S>", "S").replace("<U>", "U").replace("<A>", "A")


def conversation(text):
    """The turns of such as "S9 U12 A34 U56"."""
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return tuple(Turn(roles[word[0]], word[1:]) for word in text.split())


LONG = conversation("S9 U12 A34 U56")  # shown as S9U12A34$U56A: 13 tokens


@pytest.mark.parametrize(
    ("max_seq_len", "answer", "text", "fewer_turns", "cut"),
    [
        (16, "78", "S9U12A34$U56A78$", 0, 0),
        (15, "78", "S9U56A78$", 1, 0),  # one too many: a whole exchange goes, the system message stays
        (9, "78", "S9U56A78$", 1, 0),
        (8, "78", "S9U6A78$", 0, 1),  # then text of the question, after its marks
        (7, "78", "S9UA78$", 0, 1),
        (6, "78", "56A78$", 0, 1),  # marks without room for text after them are of no use
        (9, "77777", "56A77777$", 0, 1),
        (7, "77777", "A77777$", 0, 1),
        (6, "77777", "A7777$", 0, 1),  # then the answer's end, but not its end token
    ],
)
def test_whole_turns_go_first_then_the_question_then_the_answers_end(
    max_seq_len, answer, text, fewer_turns, cut
):
    rows = comparison_rows(Comparison(LONG, (answer,)))
    tokenized = tokenize_sft(rows, chat(), max_seq_len=max_seq_len)
    assert shown(chat(), only(tokenized)["input_ids"]) == text
    assert only(tokenized)["num_targets"] == len(text.rpartition("A")[2])
    assert (tokenized.num_fewer_turns, tokenized.num_cut) == (fewer_turns, cut)


def test_a_cut_conversation_learns_what_is_left_of_the_assistants_words():
    prompt = conversation("U1 A2 U3 A4 U5")  # U1A2$U3A4$U5A: 13 tokens
    rows = comparison_rows(Comparison(prompt, ("67",), learn_all_turns=True))
    for max_seq_len, text, mask in (
        (16, "U1A2$U3A4$U5A67$", "...xx...xx...xxx".replace(".", " ")),
        (15, "U3A4$U5A67$", "   xx   xxx"),
        (10, "U5A67$", "   xxx"),
        (5, "UA67$", "  xxx"),
    ):
        row = only(tokenize_sft(rows, chat(), max_seq_len=max_seq_len))
        assert shown(chat(), row["input_ids"]) == text
        assert [flag == "x" for flag in mask] == row["loss_mask"]


def test_a_word_that_shares_a_token_with_the_marks_is_cut_with_the_question():
    tokenizer = tiny_tokenizer()
    question, answer = "Put it in boiling water for eight minutes.", "Paris is blue."
    rows = comparison_rows(Comparison(question, (answer,)))
    whole = only(tokenize_sft(rows, tokenizer, max_seq_len=512))
    row = only(tokenize_sft(rows, tokenizer, max_seq_len=whole["length"] - 2))
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("\n\nHuman: it in boiling") or text.startswith("\n\nHuman: in boiling")
    assert "Put" not in text


def test_both_answers_see_the_same_shortened_prompt():
    rows = comparison_rows(Comparison(LONG, ("7", "888888")))
    tokenized = tokenize_pairs(rows, chat(), max_seq_len=10)
    row = only(tokenized)
    # 10 less the longer answer's 7 leave 3 tokens of the prompt for both.
    assert [shown(chat(), row[name]) for name in ("chosen_ids", "rejected_ids")] == ["56A7$", "56A888888$"]
    assert (row["length"], tokenized.num_cut) == (10, 1)


def test_prompts_of_step_3_lose_whole_turns_and_are_never_cut():
    rows = comparison_rows(Comparison(LONG), Comparison(conversation("U123456")))
    tokenized = tokenize_prompts(rows, chat(), max_prompt_seq_len=6)
    assert [shown(chat(), ids) for ids in tokenized.rows["input_ids"]] == ["S9U56A"]
    assert (tokenized.num_fewer_turns, tokenized.num_cut) == (1, 0)
    assert tokenized.dropped == {"prompt over --max_prompt_seq_len": 1}


def ranked(answers, ranks=None, **settings):
    return Comparison("1", answers, ranks, **settings)


def pairs_of(tokenized, tokenizer):
    """Of each row the answers, and the number of pairs among which it shares a weight of 1."""
    texts = [
        [shown(tokenizer, row[name]).rpartition("A")[2][:-1] for name in ("chosen_ids", "rejected_ids")]
        for row in tokenized.rows.to_list()
    ]
    return [(*pair, round(1 / weight)) for pair, weight in zip(texts, tokenized.rows["weight"], strict=True)]


def test_k_answers_make_all_their_pairs_which_weigh_1_together():
    rows = comparison_rows(ranked(("2", "3", "4", "5")), ranked(("6", "7"), margin=0.5))
    tokenized = tokenize_pairs(rows, chat(), max_seq_len=16)
    four = [("2", "3"), ("2", "4"), ("2", "5"), ("3", "4"), ("3", "5"), ("4", "5")]
    assert pairs_of(tokenized, chat()) == [(*pair, 6) for pair in four] + [("6", "7", 1)]
    assert tokenized.rows["margin"][:] == [0.0] * 6 + [0.5]


def test_answers_of_equal_rank_make_no_pair():
    tokenized = tokenize_pairs(
        comparison_rows(ranked(("2", "3", "4", "5"), (0.0, 1.0, 1.0, 2.5))), chat(), max_seq_len=16
    )
    pairs = [("2", "3"), ("2", "4"), ("2", "5"), ("3", "5"), ("4", "5")]
    assert pairs_of(tokenized, chat()) == [(*pair, 5) for pair in pairs]


def test_pairs_that_cutting_made_equal_leave_their_weight_to_the_others():
    # A and four tokens: 2222 and 2223 are both 222 with the end token, so two pairs of three are left.
    tokenized = tokenize_pairs(comparison_rows(ranked(("2222", "2223", "4"))), chat(), max_seq_len=5)
    assert pairs_of(tokenized, chat()) == [("222", "4", 2)] * 2
    assert tokenized.dropped == {"answers equal as tokens": 1}
    assert tokenized.num_cut == 2


def test_the_pairs_of_a_group_weigh_1_together_across_rows_and_drops():
    rows = comparison_rows(
        ranked(("2", "3")),
        ranked(("2", "3", "4")),
        ranked(("5", "5")),
        ranked(("6", "6")),
        ranked(("7", "8")),
    )
    tokenized = tokenize_pairs(rows, chat(), max_seq_len=16, groups=np.array([0, 1, 0, 2, 0]))
    assert [weight for *_, weight in pairs_of(tokenized, chat())] == [2, 3, 3, 3, 2]
    assert tokenized.dropped == {"answers equal as tokens": 2}


def test_no_pairs_are_no_rows_of_the_same_columns():
    rows = comparison_rows(ranked(("2", "3")), ranked(("5", "5")))
    columns = {"chosen_ids", "rejected_ids", "prompt_length", "group", "source", "weight", "margin"}
    columns |= {"length"}
    for some in ([0], [1], []):
        tokenized = tokenize_pairs(rows.select(some), chat(), max_seq_len=16)
        assert len(tokenized.rows) == (some == [0])
        assert set(tokenized.rows.column_names) == columns


def test_a_reader_gets_the_prompt_in_its_own_tokens_and_template():
    reader = tiny_tokenizer(bos=True)
    rows = comparison_rows(Comparison(LONG))
    row = only(tokenize_prompts(rows, chat(), max_prompt_seq_len=16, reward_tokenizer=reader))
    assert shown(chat(), row["input_ids"]) == "S9U12A34$U56A"
    assert decoded(reader, row["reader_ids"]) == (
        "^9\n\nHuman: 12\n\nAssistant: 34\n\nHuman: 56\n\nAssistant:"
    )


DIGITS = st.text("123456789", min_size=1, max_size=6)
DIALOGUES = st.tuples(
    st.booleans(),
    st.lists(st.tuples(DIGITS, DIGITS), max_size=3),
    DIGITS,
    st.lists(DIGITS, min_size=1, max_size=3),
    st.booleans(),
)


def dialogue(system, exchanges, question):
    words = [f"U{q} A{a}" for q, a in exchanges]
    return conversation(" ".join(["S99" * system, *words, f"U{question}"]))


# Many at once, for a call of `Dataset.map` takes far longer than a row.
@pytest.mark.slow
@given(many=st.lists(DIALOGUES, min_size=1, max_size=30), max_tokens=st.integers(4, 32), bos=st.booleans())
@settings(max_examples=40)
def test_whatever_is_too_long_keeps_the_end_of_the_conversation_and_the_end_token(many, max_tokens, bos):
    rows = comparison_rows(
        *(Comparison(dialogue(*drawn[:3]), tuple(drawn[3]), learn_all_turns=drawn[4]) for drawn in many)
    )
    tokenized = tokenize_sft(rows, chat(bos), max_seq_len=max_tokens)
    kept = [drawn for drawn in many if len(last_asked(*drawn[:3:2], bos)) <= max_tokens]
    assert tokenized.dropped == {"prompt over --max_seq_len": len(many) - len(kept)} or kept == many
    for drawn, row in zip(kept, tokenized.rows.to_list(), strict=True):
        check_sft_row(drawn, row, max_tokens, bos)
    for row in tokenize_pairs(rows, chat(bos), max_seq_len=max_tokens).rows.to_list():
        texts = [shown(chat(bos), row[name]) for name in ("chosen_ids", "rejected_ids")]
        assert len({text[: text.rindex("A")] for text in texts}) == 1
        assert {text.rindex("A") + 1 for text in texts} == {row["prompt_length"]}
        assert max(map(len, texts)) == row["length"] <= max_tokens
        assert all(text.endswith("$") and not text.endswith("$$") for text in texts)


def last_asked(system, question, bos):
    return f"{'^' * bos}{'S99' * system}U{question}A"


def check_sft_row(drawn, row, max_tokens, bos):
    system, exchanges, question, (answer, *_), all_turns = drawn
    head = "^" * bos + "S99" * system
    shorter = [
        head + "".join(f"U{q}A{a}$" for q, a in exchanges[first:]) + f"U{question}A"
        for first in range(len(exchanges) + 1)
    ]
    text = shown(chat(bos), row["input_ids"])
    asked, said = text[: text.rindex("A") + 1], text[text.rindex("A") + 1 :]
    fitting = [prompt for prompt in shorter if len(prompt) + len(answer) < max_tokens]
    if fitting:
        assert text == f"{fitting[0]}{answer}$"
    assert len(text) == row["length"] <= max_tokens
    assert said[-1] == "$"
    assert answer.startswith(said[:-1])
    assert (
        any(
            asked.startswith(marks) and shorter[-1].endswith(asked[len(marks) :])
            for marks in ("^" * bos, head, f"{head}U")
        )
        or asked in shorter
    )
    assert sum(row["loss_mask"]) == row["num_targets"]
    assert not row["loss_mask"][0]
    runs = groupby(zip(text, row["loss_mask"], strict=True), key=lambda pair: pair[1])
    learned = ["".join(character for character, _ in run) for marked, run in runs if marked]
    earlier = exchanges[len(exchanges) - asked.count("$") * all_turns :]
    assert learned == [f"{a}$" for _, a in earlier] + [said]


def test_every_limit_from_4_up_is_kept_to():
    rows = comparison_rows(Comparison(conversation("U1"), ("234567", "8")))
    for max_tokens, bos in product(range(4, 12), (False, True)):
        row = only(tokenize_pairs(rows, chat(bos), max_seq_len=max_tokens))
        assert len(row["chosen_ids"]) == min(max_tokens, 10 + bos)
