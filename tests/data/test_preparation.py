import gzip
import json
import os
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tiny import tiny_tokenizer

from dschat.arguments import DataArguments
from dschat.data.collate import collate_pairs, collate_sft
from dschat.data.loaders import build_train_loader
from dschat.data.preparation import prompt_data, reward_data, sft_data
from dschat.data.templates import NONE
from dschat.errors import UserError

SHARED = Path(os.environ.get("DSCHAT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
HH = SHARED / "data" / "hh_rlhf_harmless" / "test.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NONE
    return tokenizer


def write_rows(path, prompts):
    rows = [{"prompt": f"Q {p}:", "chosen": f" yes {p}", "rejected": f" no {p}"} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(tmp_path, *data_path, **settings):
    return DataArguments(data_path=list(data_path), data_output_path=str(tmp_path / "cache"), **settings)


def prompts_of(tokenizer, rows, name="input_ids"):
    """The prompts' numbers, from the tokens."""
    texts = [tokenizer.decode(ids) for ids in rows[name]]
    return sorted(int(text.removeprefix("Q ").split(":")[0]) for text in texts)


def all_steps(data, tokenizer, seed=1):
    sft = sft_data(data, tokenizer, max_seq_len=64, seed=seed)
    reward = reward_data(data, tokenizer, max_seq_len=64, seed=seed)
    ppo = prompt_data(data, tokenizer, max_prompt_seq_len=64, seed=seed)
    columns = ("input_ids", "chosen_ids", "input_ids")
    parts = zip((sft, reward, ppo), columns, strict=True)
    return [
        (prompts_of(tokenizer, split.train, name), prompts_of(tokenizer, split.evaluation, name))
        for split, name in parts
    ]


def test_the_steps_share_the_prompts_and_hold_the_same_ones_out(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(100)))
    (sft, held_out), (reward, *others), (ppo, *more) = all_steps(data, tokenizer)
    assert [len(part) for part in (held_out, sft, reward, ppo)] == [5, 19, 38, 38]
    assert others == more == [held_out]
    assert sorted(held_out + sft + reward + ppo) == list(range(100))


def test_overlapping_sources_share_no_prompt_between_steps(tmp_path, tokenizer):
    one, two = write_rows(tmp_path / "a.jsonl", range(60)), write_rows(tmp_path / "b.jsonl", range(40, 100))
    (sft, held_out), (reward, _), (ppo, _) = all_steps(arguments(tmp_path, one, two), tokenizer)
    assert sorted(held_out + sft + reward + ppo) == list(range(100))


def test_a_published_evaluation_split_is_used_whole_and_leaves_training(tmp_path, tokenizer):
    def rows(prompts):
        return Dataset.from_list([{"prompt": f"Q {p}:", "chosen": " a", "rejected": " b"} for p in prompts])

    DatasetDict(train=rows(range(30)), test=rows(range(25, 40))).save_to_disk(str(tmp_path / "saved"))
    (sft, held_out), (reward, _), (ppo, _) = all_steps(
        arguments(tmp_path, str(tmp_path / "saved")), tokenizer
    )
    assert held_out == list(range(25, 40))
    assert sorted(sft + reward + ppo) == list(range(25))


def test_data_for_step_1_alone_is_used_whole_and_changes_nothing_else(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(40)))
    own = write_rows(tmp_path / "own.jsonl", range(30, 70))
    without = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    with_own = sft_data(data, tokenizer, max_seq_len=64, seed=1, sft_only_data_path=[own])
    added = [
        sorted(set(prompts_of(tokenizer, new)) - set(prompts_of(tokenizer, old)))
        for new, old in ((with_own.train, without.train), (with_own.evaluation, without.evaluation))
    ]
    # 30 to 39 may belong to another step, so only the thirty others are added, two of them for evaluation.
    assert sorted(added[0] + added[1]) == list(range(40, 70))
    assert len(added[1]) == 2
    assert len(with_own.train) == len(without.train) + 28


def test_a_second_start_reads_what_the_first_one_wrote(tmp_path, tokenizer, monkeypatch, capsys):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(20)))
    first = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    told = capsys.readouterr().out
    monkeypatch.setattr("dschat.data.preparation.read_comparisons", None)
    second = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    assert first.train.to_list() == second.train.to_list()
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"max_seq_len": 63},
        {"train_on_prompt": True},
        {"data_split": "1,1,1"},
        {"eval_fraction": 0.2},
    ],
)
def test_what_shapes_the_result_makes_another_result(tmp_path, tokenizer, change):
    path = write_rows(tmp_path / "a.jsonl", range(20))
    settings = {"max_seq_len": 64, "seed": 1}
    sft_data(arguments(tmp_path, path), tokenizer, **settings)
    shape = {name: change[name] for name in change if name in ("data_split", "eval_fraction")}
    rest = {name: change[name] for name in change if name not in shape}
    sft_data(arguments(tmp_path, path, **shape), tokenizer, **{**settings, **rest})
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 2


def test_an_edited_file_is_read_again(tmp_path, tokenizer):
    data = arguments(
        tmp_path, write_rows(tmp_path / "a.jsonl", range(20)), data_split="1,0,0", eval_fraction=0
    )
    sft_data(data, tokenizer, max_seq_len=64, seed=1)
    write_rows(tmp_path / "a.jsonl", range(20, 40))
    again = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    assert prompts_of(tokenizer, again.train) == list(range(20, 40))


def test_counts_are_told_on_rank_0_only(tmp_path, tokenizer, monkeypatch, capsys):
    write_rows(tmp_path / "a.jsonl", [1, 1, 2, 3, 4, 5, 6, 7])
    data = arguments(tmp_path, str(tmp_path / "a.jsonl"), data_split="1,0,0", eval_fraction=0.3)
    sft_data(data, tokenizer, max_seq_len=64, seed=1)
    told = capsys.readouterr().out
    counts = "a.jsonl: 8 rows; 5 + 0 + 0 prompts for steps 1 + 2 + 3 and 2 for evaluation"
    assert f"{counts}; dropped 1 (repeated prompt)" in told
    assert "train: 5 rows of" in told
    monkeypatch.setenv("RANK", "1")
    sft_data(data, tokenizer, max_seq_len=64, seed=1)
    assert "rows" not in capsys.readouterr().out


def test_one_row_is_enough_for_one_step(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", [7]), data_split="0,1,0")
    split = reward_data(data, tokenizer, max_seq_len=64, seed=1)
    assert (len(split.train), len(split.evaluation)) == (1, 0)


def test_a_share_without_prompts_says_sizes_flag_and_remedy(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(20)), data_split="0,5,5")
    with pytest.raises(
        UserError, match=r"step 1 has no prompts .* --data_split 0,5,5 .* 19 .* into 0, 10, 9\. Give"
    ):
        sft_data(data, tokenizer, max_seq_len=64, seed=1)


def test_an_empty_file_is_named(tmp_path, tokenizer):
    data = arguments(
        tmp_path, write_rows(tmp_path / "a.jsonl", range(20)), write_rows(tmp_path / "b.jsonl", [])
    )
    with pytest.raises(UserError, match=r"b\.jsonl holds no rows to train on"):
        sft_data(data, tokenizer, max_seq_len=64, seed=1)


def test_prompts_that_are_all_too_long_name_the_flag_and_the_shortest(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(10, 30)))
    shortest = len(tokenizer("Q 10:")["input_ids"])
    with pytest.raises(UserError) as error:
        prompt_data(data, tokenizer, max_prompt_seq_len=shortest - 1, seed=1)
    assert f"--max_prompt_seq_len is {shortest - 1} and the shortest prompt has {shortest} tokens" in str(
        error.value
    )


@pytest.fixture(scope="module")
def hh_tokenizer():
    if not HH.exists():
        pytest.skip("needs the shared HH data")
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    return tiny_tokenizer(texts, vocab_size=4096)


def padding_share(dataset, collate, tokenizer):
    loader = build_train_loader(
        dataset,
        partial(collate, pad_id=tokenizer.pad_token_id),
        batch_size=8,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=1,
    )
    masks = [batch.attention_mask for batch in loader]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_real_dialogues_pass_and_pad_less_than_15_percent_at_batch_8(tmp_path, hh_tokenizer, capsys):
    data = arguments(tmp_path, str(HH))
    sft = sft_data(data, hh_tokenizer, max_seq_len=512, seed=1234)
    reward = reward_data(data, hh_tokenizer, max_seq_len=512, seed=1234)
    ppo = prompt_data(data, hh_tokenizer, max_prompt_seq_len=256, seed=1234)
    assert "2312 rows" in capsys.readouterr().out
    assert padding_share(sft.train, collate_sft, hh_tokenizer) < 0.15
    assert padding_share(reward.train, collate_pairs, hh_tokenizer) < 0.15
    assert hh_tokenizer.decode(ppo.train[0]["input_ids"]).endswith("\n\nAssistant:")
    assert sft.train[0]["input_ids"][-1] == hh_tokenizer.eos_token_id
