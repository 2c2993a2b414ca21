"""Token ids stand in one turn, and text holds none."""

import json

import pytest
from tiny import tiny_tokenizer

from dschat.arguments import DataArguments
from dschat.data.comparisons import Turn
from dschat.data.encoder import Encoder
from dschat.data.preparation import SplitData, prompt_data, reward_data, sft_data
from dschat.data.templates import NONE
from dschat.data.token_turns import token_turn, tokens_of
from dschat.errors import UserError


def test_tokens_come_back_out_of_a_turn_and_a_prompt():
    assert tokens_of(token_turn([5, 6])) == [5, 6]
    assert tokens_of((Turn("tools", "[]"), token_turn([5]))) == [5]
    for text in ("[5, 6]", (Turn("user", "[5]"),), Turn("assistant", "[5]"), ()):
        assert tokens_of(text) is None


def test_tokens_are_encoded_as_they_are_beside_text():
    encoder = Encoder(tiny_tokenizer(bos=True))
    asked = (Turn("user", "Sum?"),)
    text, given = encoder.rows([asked, (token_turn([9, 12]),)], [["2"], [token_turn([40, 1, 1])]])
    assert text == encoder.rows([asked], [["2"]])[0]
    # No start token, no end token, no template; 1 is the padding token.
    assert (given.prompt, given.answers) == ([9, 12], [[40]])


def test_tokens_over_a_limit_lose_the_beginning_of_the_prompt():
    encoder = Encoder(tiny_tokenizer())
    prompts = [(token_turn([9, 12, 13, 14]),)]
    rows = encoder.rows(prompts, [[token_turn([40, 0])]])
    (fitted,) = encoder.fitted(rows, prompts, 4, lambda numbers, shorter: [])
    assert (fitted.prompt, fitted.answers) == ([13, 14], [[40, 0]])


def test_tokens_of_another_vocabulary_are_an_error():
    encoder = Encoder(tiny_tokenizer())
    with pytest.raises(UserError, match="token 5000 is not in the model's vocabulary of"):
        encoder.rows([(token_turn([9]),)], [[token_turn([5000])]])


def pairs_of(rows, tmp_path, **settings) -> SplitData:
    """What step 2 makes of the rows, all of them for training."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reward_data(arguments(tmp_path, **settings), tokenizer(), max_seq_len=24, seed=1)


def arguments(tmp_path, **settings) -> DataArguments:
    path, cache = [str(tmp_path / "rows.jsonl")], str(tmp_path / "cache")
    settings = {"data_split": "0,1,0", "eval_fraction": 0, **settings}
    return DataArguments(data_path=path, data_output_path=cache, **settings)


def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NONE
    return tokenizer


def tokenised(pair) -> dict[str, list[int]]:
    """A row of step 2 in ColossalChat's form, padded as for a fixed width."""
    row = {}
    for side in ("chosen", "rejected"):
        ids, start = pair[f"{side}_ids"], pair["prompt_length"]
        row[f"{side}_input_ids"] = ids + [1] * (30 - len(ids))
        row[f"{side}_loss_mask"] = [0] * start + [1] * (len(ids) - start) + [0] * (30 - len(ids))
    return row


def test_tokenised_pairs_are_the_pairs_that_their_text_makes(tmp_path):
    text = [{"prompt": f"Q {n}:", "chosen": f" yes {n}", "rejected": " no" * (n + 1)} for n in range(6)]
    of_text = pairs_of(text, tmp_path).train
    of_tokens = pairs_of([tokenised(pair) for pair in of_text.table.to_pylist()], tmp_path).train

    def rows(pairs):
        kept = ("chosen_ids", "rejected_ids", "prompt_length", "weight", "length")
        return sorted(tuple(map(str, (pair[name] for name in kept))) for pair in pairs.table.to_pylist())

    assert rows(of_tokens) == rows(of_text)
    assert len(of_tokens) == 6


def test_step_1_learns_the_better_answer_and_step_3_has_the_prompt(tmp_path):
    row = tokenised({"chosen_ids": [9, 12, 40, 0], "rejected_ids": [9, 12, 41, 0], "prompt_length": 2})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (sft,) = sft_data(
        arguments(tmp_path, data_split="1,0,0"), tokenizer(), max_seq_len=24, seed=1
    ).train.table.to_pylist()
    assert (sft["input_ids"], sft["loss_mask"]) == ([9, 12, 40, 0], [False, False, True, True])
    data = arguments(tmp_path, data_split="0,0,1")
    (prompt,) = prompt_data(data, tokenizer(), max_prompt_seq_len=24, seed=1).train.table.to_pylist()
    assert prompt["input_ids"] == [9, 12]


def test_a_token_of_another_vocabulary_is_told_with_its_line_or_dropped(tmp_path):
    good = tokenised({"chosen_ids": [9, 12, 40, 0], "rejected_ids": [9, 12, 41, 0], "prompt_length": 2})
    bad = tokenised({"chosen_ids": [9, 13, 40, 0], "rejected_ids": [9, 13, 9999, 0], "prompt_length": 2})
    with pytest.raises(UserError, match=r"rows.jsonl:2: token 9999 is not in the model's vocabulary"):
        pairs_of([good, bad], tmp_path)
    assert len(pairs_of([good, bad], tmp_path, on_bad_row="drop").train) == 1
    short = {**good, "chosen_loss_mask": [0, 0, 1]}
    with pytest.raises(UserError, match=r"rows.jsonl:2: \"chosen_loss_mask\" must hold a value for each"):
        pairs_of([good, short], tmp_path)
