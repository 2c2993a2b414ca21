import pytest
from datasets import Dataset
from tiny import comparison_rows, tiny_tokenizer
from tokenizers import processors

from dschat.data.comparisons import Comparison
from dschat.data.templates import NONE
from dschat.data.tokenization import (
    column,
    content_key,
    start_tokens,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sft,
    tokenizer_fingerprint,
)

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
    assert row["length"] == 6


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
