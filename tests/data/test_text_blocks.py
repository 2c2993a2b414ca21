import json

import numpy as np
import pytest
from tiny import tiny_tokenizer

from dschat.data.text_blocks import READ_AT_ONCE, text_blocks
from dschat.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def blocks_of(tokenizer, tmp_path):
    def blocks(*paths, block_size=4) -> np.ndarray:
        cache = str(tmp_path / "cache")
        return text_blocks([str(p) for p in paths], tokenizer, block_size=block_size, data_output_path=cache)

    return blocks


def tokens_of(tokenizer, *texts: str) -> list[int]:
    """Each text's tokens and the end token, one after the other."""
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def test_texts_are_joined_by_end_tokens_and_cut_into_blocks(blocks_of, tokenizer, tmp_path):
    texts = ["Count to five.", "Yes, on a clear day.", "no"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(["", *texts])))
    expected = tokens_of(tokenizer, *texts)  # an empty row is no text
    blocks = blocks_of(path)
    assert blocks.shape == (len(expected) // 4, 4)
    assert blocks.flatten().tolist() == expected[: blocks.size]


def test_a_txt_file_is_one_text_and_files_follow_each_other(blocks_of, tokenizer, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one\n\ntwo three")
    second.write_text("four")
    expected = tokens_of(tokenizer, "one\n\ntwo three", "four")
    blocks = blocks_of(first, second, block_size=1)
    assert blocks.flatten().tolist() == expected


@pytest.mark.slow
def test_a_large_file_is_read_in_pieces_and_ends_once(blocks_of, tokenizer, tmp_path):
    line = "how many lines are there? " * 4 + "\n"
    path = tmp_path / "large.txt"
    path.write_text(line * (READ_AT_ONCE // len(line) + 100))
    tokens = blocks_of(path, block_size=1).flatten()
    assert (tokens == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(tokens) - 1]
    assert tokenizer.decode(tokens[:-1]) == path.read_text()


@pytest.mark.parametrize("rows", ['{"sentence": "one two three"}\n', '"one two three"\n'])
def test_a_row_of_one_column_or_a_string_is_a_text(rows, blocks_of, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    expected = tokens_of(tokenizer, "one two three")
    assert blocks_of(path, block_size=1).flatten().tolist() == expected


def test_other_content_under_the_same_name_is_other_blocks(blocks_of, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two three four five")
    before = blocks_of(path).tolist()
    path.write_text("six seven eight nine ten")
    assert blocks_of(path).tolist() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"title": "a", "body": "b"}\n', r'a.jsonl:1: .* "text" \(found: title, body\); rename'),
        ("a.jsonl", '{"text": 3}\n', 'a.jsonl:1: .* needs rows with a column "text"'),
        ("a.jsonl", '{"text": " "}\n', "has 0 tokens and a block takes 400 .*; give more text"),
        ("a.txt", "short", r"tokens and a block takes 400 .*; give more text"),
        ("nothere.txt", None, "--unsupervised_dataset_name .*nothere.txt: there is no such file"),
    ],
)
def test_text_that_cannot_be_used_is_an_error_with_a_remedy(name, content, message, blocks_of, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        blocks_of(tmp_path / name, block_size=400)


def test_a_weight_is_refused_rather_than_ignored(blocks_of, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:0.3: texts have no weights; leave it out"):
        blocks_of(f"{tmp_path / 'a.jsonl'}:0.3")


def test_a_file_of_another_encoding_is_an_error(blocks_of, tmp_path):
    (tmp_path / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt: the file is not UTF-8"):
        blocks_of(tmp_path / "a.txt")
