import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tiny import tiny_tokenizer, values_of

from dschat.arguments import DataArguments
from dschat.data.collate import collate_pairs, collate_sft
from dschat.data.loaders import build_train_loader
from dschat.data.preparation import prompt_data, reward_data, sft_data
from dschat.data.templates import NONE, PLAIN
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
    texts = [tokenizer.decode(ids) for ids in values_of(rows, name)]
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


@pytest.mark.slow
def test_the_steps_share_the_prompts_and_hold_the_same_ones_out(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(100)))
    (sft, held_out), (reward, *others), (ppo, *more) = all_steps(data, tokenizer)
    assert [len(part) for part in (held_out, sft, reward, ppo)] == [5, 19, 38, 38]
    assert others == more == [held_out]
    assert sorted(held_out + sft + reward + ppo) == list(range(100))


@pytest.mark.slow
def test_overlapping_sources_share_no_prompt_between_steps(tmp_path, tokenizer):
    one, two = write_rows(tmp_path / "a.jsonl", range(60)), write_rows(tmp_path / "b.jsonl", range(40, 100))
    (sft, held_out), (reward, _), (ppo, _) = all_steps(arguments(tmp_path, one, two), tokenizer)
    assert sorted(held_out + sft + reward + sorted(set(ppo))) == list(range(100))
    assert len(ppo) - len(set(ppo)) == sum(40 <= prompt < 60 for prompt in set(ppo)) > 0  # in both files


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


def test_data_for_dpo_alone_is_used_whole(tmp_path, tokenizer):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(40)))
    own = write_rows(tmp_path / "own.jsonl", range(40, 70))
    without = reward_data(data, tokenizer, max_seq_len=64, seed=1)
    with_own = reward_data(data, tokenizer, max_seq_len=64, seed=1, sft_only_data_path=[own])
    assert len(with_own.train) == len(without.train) + 28
    assert len(with_own.evaluation) == len(without.evaluation) + 2


def test_a_second_start_reads_what_the_first_one_wrote(tmp_path, tokenizer, monkeypatch, capsys):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(20)))
    first = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    told = after_tokenising(capsys)
    monkeypatch.setattr("dschat.data.source_set.read_comparisons", None)
    second = sft_data(data, tokenizer, max_seq_len=64, seed=1)
    assert first.train.table.to_pylist() == second.train.table.to_pylist()
    assert capsys.readouterr().out == told


def after_tokenising(capsys) -> str:
    """What was printed, without the lines that tell of rows at work."""
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("tokenising "))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"max_seq_len": 63},
        {"train_on_prompt": True},
        {"data_split": "1,1,1"},
        {"eval_fraction": 0.2},
        {"unique_prompts": True},
    ],
)
def test_what_shapes_the_result_makes_another_result(tmp_path, tokenizer, change):
    path = write_rows(tmp_path / "a.jsonl", range(20))
    settings = {"max_seq_len": 64, "seed": 1}
    sft_data(arguments(tmp_path, path), tokenizer, **settings)
    shape = {
        name: change[name] for name in change if name in ("data_split", "eval_fraction", "unique_prompts")
    }
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
    assert f"{counts}; dropped 1 (repeated row)" in told
    assert "train: 5 rows of" in told
    assert "; --num_train_epochs counts passes over them" in told
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
    masks = [batch.tokens.attention_mask for batch in loader]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_published_evaluation_dialogues_that_go_on_from_training_ones_are_counted(
    tmp_path, tokenizer, capsys
):
    def row(*turns):
        roles = ("user", "assistant") * 3
        return {
            "prompt": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)],
            "completion": "z",
        }

    path = write_json(tmp_path / "a.jsonl", [row("a"), row("x", "b", "c"), row("v")])
    evaluation = write_json(tmp_path / "b.jsonl", [row("a", "b", "c"), row("x"), row("w")])
    data = arguments(tmp_path, path, data_split="1,0,0", eval_data_path=[evaluation])
    tokenizer = tiny_tokenizer()
    assert len(sft_data(data, tokenizer, max_seq_len=64, seed=1).train) == 3
    told = "2 prompts for evaluation begin a training dialogue or go on from one"
    assert told in capsys.readouterr().out


@pytest.mark.slow
def test_real_dialogues_pass_and_pad_less_than_15_percent_at_batch_8(tmp_path, hh_tokenizer, capsys):
    data = arguments(tmp_path, str(HH))
    sft = sft_data(data, hh_tokenizer, max_seq_len=512, seed=1234)
    reward = reward_data(data, hh_tokenizer, max_seq_len=512, seed=1234)
    ppo = prompt_data(data, hh_tokenizer, max_prompt_seq_len=256, seed=1234)
    assert "2312 rows" in capsys.readouterr().out
    assert padding_share(sft.train, collate_sft, hh_tokenizer) < 0.15
    assert padding_share(reward.train, collate_pairs, hh_tokenizer) < 0.15
    assert hh_tokenizer.decode(ppo.train.table.to_pylist()[0]["input_ids"]).endswith("\n\nAssistant:")
    assert sft.train.table.to_pylist()[0]["input_ids"][-1] == hh_tokenizer.eos_token_id


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def union(steps):
    return sorted(prompt for train, _ in steps for prompt in train)


@pytest.mark.slow
def test_a_weight_thins_a_source_in_every_step_and_leaves_evaluation_alone(tmp_path, tokenizer):
    one, two = write_rows(tmp_path / "a.jsonl", range(100)), write_rows(tmp_path / "b.jsonl", range(100, 200))
    steps = all_steps(arguments(tmp_path, f"{one}:0.4", two), tokenizer)
    plain = all_steps(arguments(tmp_path, one, two), tokenizer)
    # 95 each are for training. 38 of the first (0.4 x 95) are used; 2,4,4 cuts them into 7.6, 15.2, 15.2.
    assert [sum(p < 100 for p in train) for train, _ in steps] == [8, 15, 15]
    assert [sum(p >= 100 for p in train) for train, _ in steps] == [19, 38, 38]
    assert len(set(union(steps))) == len(union(steps)) == 38 + 95
    assert [held_out for _, held_out in steps] == [held_out for _, held_out in plain]
    assert union(plain) == sorted(set(range(200)) - set(plain[0][1]))


@pytest.mark.slow
def test_one_weight_alone_changes_nothing(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", range(50))
    assert all_steps(arguments(tmp_path, f"{path}:0.3"), tokenizer) == all_steps(
        arguments(tmp_path, path), tokenizer
    )


def test_what_is_over_its_weight_is_counted(tmp_path, tokenizer, capsys):
    one, two = write_rows(tmp_path / "a.jsonl", range(20)), write_rows(tmp_path / "b.jsonl", range(20, 40))
    data = arguments(tmp_path, f"{one}:0.5", two, eval_fraction=0)
    sft_data(data, tokenizer, max_seq_len=64, seed=1)
    assert "a.jsonl: 20 rows; 2 + 4 + 4 prompts" in (told := capsys.readouterr().out)
    assert "dropped 10 (over its weight in the blend)" in told


@pytest.mark.slow
def test_prompts_of_eval_data_path_leave_training_and_replace_other_evaluation(tmp_path, tokenizer):
    (tmp_path / "both").mkdir()
    write_rows(tmp_path / "both" / "train.jsonl", range(50))
    write_rows(tmp_path / "both" / "test.jsonl", range(50, 60))
    evaluation = write_rows(tmp_path / "eval.jsonl", [*range(45, 55), *range(70, 75)])
    data = arguments(tmp_path, str(tmp_path / "both"), eval_data_path=[evaluation])
    steps = all_steps(data, tokenizer)
    assert [held_out for _, held_out in steps] == [[*range(45, 55), *range(70, 75)]] * 3
    assert union(steps) == list(range(45))


def test_the_evaluation_split_of_an_eval_data_path_is_the_one_used(tmp_path, tokenizer):
    (tmp_path / "both").mkdir()
    write_rows(tmp_path / "both" / "train.jsonl", range(5))
    write_rows(tmp_path / "both" / "test.jsonl", range(50, 53))
    path = write_rows(tmp_path / "a.jsonl", range(20))
    data = arguments(tmp_path, path, eval_data_path=[str(tmp_path / "both")])
    steps = all_steps(data, tokenizer)
    assert [held_out for _, held_out in steps] == [[50, 51, 52]] * 3
    assert union(steps) == list(range(20))


def test_an_empty_eval_data_path_is_named(tmp_path, tokenizer):
    path, empty = write_rows(tmp_path / "a.jsonl", range(9)), write_rows(tmp_path / "b.jsonl", [])
    data = arguments(tmp_path, path, eval_data_path=[empty])
    with pytest.raises(UserError, match=r"--eval_data_path .*b\.jsonl holds no rows to evaluate on"):
        sft_data(data, tokenizer, max_seq_len=64, seed=1)


def test_a_source_whose_rows_are_all_dropped_is_named_with_the_reason(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Q"}]}) + "\n")
    told = r"holds no rows to train on: dropped 1 \(conversations that end with a question\); leave it out"
    with pytest.raises(UserError, match=told):
        sft_data(arguments(tmp_path, str(path)), tokenizer, max_seq_len=64, seed=1)


def test_evaluation_data_that_leaves_nothing_to_train_on_is_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", range(9))
    with pytest.raises(UserError, match="all those of --data_path are also in the data for evaluation"):
        sft_data(arguments(tmp_path, path, eval_data_path=[path]), tokenizer, max_seq_len=64, seed=1)


@pytest.mark.slow
def test_max_train_samples_are_nested_and_of_each_steps_own_share(tmp_path, tokenizer, capsys):
    path = write_rows(tmp_path / "a.jsonl", range(100))
    whole = all_steps(arguments(tmp_path, path), tokenizer)
    before = [([], None)] * 3
    for number in (5, 12, 30):
        steps = all_steps(arguments(tmp_path, path, max_train_samples=number), tokenizer)
        assert [len(train) for train, _ in steps] == [min(number, 19), number, number]
        for (train, held_out), (fewer, _), (every, all_held_out) in zip(steps, before, whole, strict=True):
            assert set(fewer) <= set(train) <= set(every)
            assert held_out == all_held_out
        before = steps
    assert "33 (over --max_train_samples)" in capsys.readouterr().out  # 38 - 5


def mixed_rows(tmp_path):
    """Three prompts of a pair, two of an answer, one of neither."""
    rows = [{"prompt": f"Q {p}:", "answers": [f" a{p}", f" b{p}"][: 2 if p < 3 else 1]} for p in range(5)]
    other = write_json(tmp_path / "bare.jsonl", [{"prompt": "Q 5:"}])
    return write_json(tmp_path / "mixed.jsonl", rows), other


def test_a_step_leaves_out_and_counts_rows_that_lack_what_it_learns_from(tmp_path, tokenizer, capsys):
    paths = mixed_rows(tmp_path)
    expected = [
        (sft_data, "1,0,0", 5, "1 (no answer to learn)"),
        (reward_data, "0,1,0", 3, "3 (no two answers to compare)"),
        (prompt_data, "0,0,1", 6, None),
    ]
    for prepare, split, number, reason in expected:
        data = arguments(tmp_path, *paths, data_split=split, eval_fraction=0)
        length = "max_prompt_seq_len" if prepare is prompt_data else "max_seq_len"
        assert len(prepare(data, tokenizer, seed=1, **{length: 64}).train) == number
        told = capsys.readouterr().out
        assert f"dropped {reason}" in told if reason else "dropped" not in told


@pytest.mark.parametrize(
    ("prepare", "step", "rows", "lack"),
    [
        (sft_data, 1, [{"prompt": "Q 1:"}, {"prompt": "Q 2:"}], "2 (no answer to learn)"),
        (reward_data, 2, [{"prompt": "Q 1:", "completion": "a"}], "1 (no two answers to compare)"),
        (
            reward_data,
            2,
            [{"prompt": "Q 1:", "answers": ["a", "b"], "scores": [1, 1]}],
            "1 (no two answers to compare)",
        ),
    ],
)
def test_data_of_no_use_to_a_step_say_what_is_missing(tmp_path, tokenizer, prepare, step, rows, lack):
    shares = ["0", "0", "0"]
    shares[step - 1] = "1"
    data = arguments(
        tmp_path, write_json(tmp_path / "a.jsonl", rows), data_split=",".join(shares), eval_fraction=0
    )
    with pytest.raises(UserError) as error:
        prepare(data, tokenizer, max_seq_len=64, seed=1)
    assert f"step {step} has no rows left to train on: dropped {lack}. Give data that has what" in str(
        error.value
    )
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def repeated_pairs(tmp_path):
    """Prompt 1 with three different pairs over two rows and one row again; prompt 2 with one pair."""
    return write_json(
        tmp_path / "a.jsonl",
        [
            {"prompt": "Q 1:", "answers": [" a", " b"]},
            {"prompt": "Q 2:", "answers": [" a", " b"]},
            {"prompt": "Q 1:", "answers": [" a", " b"]},
            {"prompt": "Q 1:", "answers": [" c", " d", " e"], "ranks": [1, 2, 2]},
        ],
    )


def test_all_pairs_of_a_prompt_weigh_1_and_exact_repeats_are_dropped(tmp_path, tokenizer, capsys):
    data = arguments(tmp_path, repeated_pairs(tmp_path), data_split="0,1,0", eval_fraction=0)
    train = reward_data(data, tokenizer, max_seq_len=64, seed=1).train
    texts = [tokenizer.decode(ids).removesuffix("<|endoftext|>") for ids in values_of(train, "chosen_ids")]
    assert Counter(texts) == {"Q 1: a": 1, "Q 1: c": 2, "Q 2: a": 1}
    by_prompt = Counter()
    for text, weight in zip(texts, values_of(train, "weight"), strict=True):
        by_prompt[text[:4]] += weight
    assert by_prompt == pytest.approx({"Q 1:": 1.0, "Q 2:": 1.0})
    assert (
        "4 rows; 0 + 2 + 0 prompts for steps 1 + 2 + 3 and 0 for evaluation; 1 rows repeat one of these"
        in (capsys.readouterr().out)
    )


def told_rows(data, tokenizer, prepare, capsys):
    """The texts of the step's training and evaluation rows, and what it tells."""
    length = "max_prompt_seq_len" if prepare is prompt_data else "max_seq_len"
    split = prepare(data, tokenizer, seed=1, **{length: 64})
    texts = [[tokenizer.decode(ids) for ids in values_of(part)] for part in (split.train, split.evaluation)]
    return *map(sorted, texts), capsys.readouterr().out


def test_step_1_learns_every_different_answer_to_a_prompt_once(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Q {p}:", "completion": f" {a}"} for p in range(20) for a in (0, 1, 2, 1)]
    data = arguments(tmp_path, write_json(tmp_path / "a.jsonl", rows), data_split="1,0,0", eval_fraction=0.1)
    train, evaluation, told = told_rows(data, tokenizer, sft_data, capsys)
    learned = Counter(text.split(":")[0] for text in train)
    assert (set(learned.values()), len(learned)) == ({3}, 18)
    assert len(set(train)) == len(train)
    # The answers to a held-out prompt are all held out.
    assert Counter(text.split(":")[0] for text in evaluation).keys().isdisjoint(learned)
    assert (len(evaluation), len(set(evaluation))) == (6, 6)
    assert "80 rows; 18 + 0 + 0 prompts for steps 1 + 2 + 3 and 2 for evaluation; 40 rows repeat one" in told
    assert "dropped 20 (repeated row)" in told


def test_step_1_learns_a_best_answer_once_whatever_it_is_compared_with(tmp_path, tokenizer, capsys):
    rows = [{"prompt": "Q 1:", "answers": [" a", other]} for other in (" b", " c")]
    data = arguments(tmp_path, write_json(tmp_path / "a.jsonl", rows), data_split="1,0,0", eval_fraction=0)
    train, _, told = told_rows(data, tokenizer, sft_data, capsys)
    assert train == ["Q 1: a<|endoftext|>"]
    assert "dropped 1 (repeated row)" in told


def test_step_3_meets_a_prompt_as_often_as_the_data_has_it_and_is_evaluated_on_it_once(
    tmp_path, tokenizer, capsys
):
    rows = [{"prompt": f"Q {p}:", "completion": " a"} for p in range(10) for _ in range(p + 1)]
    data = arguments(tmp_path, write_json(tmp_path / "a.jsonl", rows), data_split="0,0,1", eval_fraction=0.2)
    train, evaluation, told = told_rows(data, tokenizer, prompt_data, capsys)
    counts = Counter(int(text.removeprefix("Q ").rstrip(":")) for text in train)
    assert len(counts) == 8
    assert all(count == prompt + 1 for prompt, count in counts.items())
    assert len(evaluation) == len(set(evaluation)) == 2
    num_repeated = 55 - len(train) - 2
    assert (f"dropped {num_repeated} (prompt repeated in evaluation)" in told) == (num_repeated > 0)
    assert f"{len(train) - 8} rows repeat one of these prompts" in told


@pytest.mark.parametrize(("prepare", "split"), [(sft_data, "1,0,0"), (prompt_data, "0,0,1")])
def test_unique_prompts_take_a_prompt_of_several_rows_once(tmp_path, tokenizer, prepare, split, capsys):
    settings = {"data_split": split, "eval_fraction": 0, "unique_prompts": True}
    data = arguments(tmp_path, repeated_pairs(tmp_path), **settings)
    train, _, told = told_rows(data, tokenizer, prepare, capsys)
    assert [text[:4] for text in train] == ["Q 1:", "Q 2:"]
    assert prepare is prompt_data or train[0] == "Q 1: a<|endoftext|>"  # the first row's answer
    assert "dropped 2 (repeated prompt)" in told


@pytest.mark.slow
def test_repeated_prompts_are_not_in_two_parts_whatever_the_step(tmp_path, tokenizer):
    rows = [
        {"prompt": f"Q {p}:", "chosen": f" yes {a}", "rejected": " no"} for p in range(60) for a in range(3)
    ]
    data = arguments(tmp_path, write_json(tmp_path / "a.jsonl", rows))
    parts = [[set(part) for part in step] for step in all_steps(data, tokenizer)]
    held_out = [evaluation for _, evaluation in parts]
    assert held_out == [held_out[0]] * 3
    assert sorted([*held_out[0], *(prompt for train, _ in parts for prompt in train)]) == list(range(60))


def test_max_train_samples_of_repeated_prompts_are_rows(tmp_path, tokenizer):
    path = write_json(tmp_path / "a.jsonl", [{"prompt": f"Q {p}:"} for p in range(10) for _ in range(20)])
    settings = {"data_split": "0,0,1", "eval_fraction": 0, "max_train_samples": 30}
    data = arguments(tmp_path, path, **settings)
    train = prompts_of(tokenizer, prompt_data(data, tokenizer, max_prompt_seq_len=64, seed=1).train)
    assert len(train) == 30
    assert len(set(train)) >= 8  # not all rows of a prompt before any of the next


def test_a_later_row_gives_the_answer_that_the_first_of_a_prompt_lacks(tmp_path, tokenizer):
    one = write_json(tmp_path / "a.jsonl", [{"prompt": "Q 1:"}])
    two = write_json(tmp_path / "b.jsonl", [{"prompt": "Q 1:", "completion": " a"}])
    data = arguments(tmp_path, one, two, data_split="1,0,0", eval_fraction=0)
    # The second source has no prompt of its own, but rows.
    train = sft_data(data, tokenizer, max_seq_len=64, seed=1).train
    assert [tokenizer.decode(ids) for ids in values_of(train)] == ["Q 1: a<|endoftext|>"]


def test_one_conversation_as_text_and_as_messages_is_one_prompt(tmp_path):
    text = write_json(
        tmp_path / "a.jsonl", [{"prompt": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"}]
    )
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, "123", strict=True)]
    other = write_json(tmp_path / "b.jsonl", [{"prompt": messages}])
    settings = {"data_split": "0,0,1", "eval_fraction": 0, "unique_prompts": True}
    data = arguments(tmp_path, text, other, **settings)
    assert len(prompt_data(data, tiny_tokenizer(), max_prompt_seq_len=64, seed=1).train) == 1


QA = [{"q": f"Q {p}:", "good": " yes", "bad": " no", "other": "x"} for p in range(3)]
KEYS = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"}


def test_columns_are_named_by_flags(tmp_path, tokenizer):
    data = arguments(
        tmp_path, write_json(tmp_path / "a.jsonl", QA), data_split="0,1,0", eval_fraction=0, **KEYS
    )
    train = reward_data(data, tokenizer, max_seq_len=64, seed=1).train
    texts = sorted(tokenizer.decode(ids) for ids in values_of(train, "chosen_ids"))
    assert texts == [f"Q {p}: yes<|endoftext|>" for p in range(3)]


def test_messages_are_named_by_a_flag(tmp_path):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    path = write_json(tmp_path / "a.jsonl", [{"chat": turns}])
    data = arguments(tmp_path, path, data_split="1,0,0", eval_fraction=0, messages_key="chat")
    tokenizer = tiny_tokenizer()
    (row,) = sft_data(data, tokenizer, max_seq_len=64, seed=1).train.table.to_pylist()
    assert tokenizer.decode(row["input_ids"]) == "\n\nHuman: 1\n\nAssistant: 2<|endoftext|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**KEYS, "prompt_key": "question"}, r'a\.jsonl:1: the row has no "question" \(--prompt_key\)'),
        ({**KEYS, "rejected_key": "worse"}, r'a\.jsonl:1: the row has no "worse" \(--rejected_key\)'),
        ({"data_format": "prefs"}, "--data_format 'prefs' is unknown; choose a layout .*ranked"),
        ({"data_format": "ranked", "prompt_key": "q"}, r'a\.jsonl:1: the row has no "answers"'),
    ],
)
def test_wrong_names_are_named(tmp_path, tokenizer, settings, message):
    data = arguments(tmp_path, write_json(tmp_path / "a.jsonl", QA), **settings)
    with pytest.raises(UserError, match=message):
        sft_data(data, tokenizer, max_seq_len=64, seed=1)


def test_a_format_goes_before_what_the_columns_tell(tmp_path, tokenizer):
    rows = [{"prompt": "Q 1:", "chosen": " a", "rejected": " b", "question": "Q 2:", "answer": " c"}]
    path = write_json(tmp_path / "a.jsonl", rows)
    found = []
    for name in (None, "question_answer", "openai/gsm8k"):
        data = arguments(tmp_path, path, data_split="1,0,0", eval_fraction=0, data_format=name)
        train = sft_data(data, tokenizer, max_seq_len=64, seed=1).train
        found += prompts_of(tokenizer, train)
    assert found == [1, 2, 2]


def entries(tmp_path):
    return [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.slow
def test_template_reader_format_weight_and_evaluation_make_other_results(tmp_path):
    rows = [
        {"prompt": f"{p}", "chosen": "a", "rejected": "b", "question": f"{p}", "answer": "c"}
        for p in range(9)
    ]
    path, evaluation = (write_json(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl"))
    write_json(tmp_path / "b.jsonl", rows[:2])

    def prepared(number, template=PLAIN, reward_tokenizer=None, entry=path, **settings):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        prompt_data(
            arguments(tmp_path, entry, **settings),
            tokenizer,
            max_prompt_seq_len=64,
            seed=1,
            reward_tokenizer=reward_tokenizer,
        )
        assert len(entries(tmp_path)) == number

    other = tiny_tokenizer(bos=True)
    prepared(1)
    prepared(1)
    prepared(2, template=PLAIN + " ")
    prepared(3, data_format="question_answer")
    prepared(4, prompt_key="question")
    prepared(5, entry=f"{path}:0.5")
    prepared(6, eval_data_path=[evaluation])
    prepared(7, max_train_samples=2)
    prepared(8, reward_tokenizer=other)
    other.chat_template = NONE
    prepared(9, reward_tokenizer=other)
    prepared(9, preprocessing_num_workers=1)


def test_a_readers_tokens_stand_beside_the_actors(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [{"prompt": str(p)} for p in range(12, 16)])
    data = arguments(tmp_path, path, data_split="0,0,1", eval_fraction=0.25)
    reader = tiny_tokenizer(bos=True)
    reader.chat_template = NONE
    split = prompt_data(data, tiny_tokenizer(), max_prompt_seq_len=64, seed=1, reward_tokenizer=reader)
    for rows in (split.train, split.evaluation):
        for row in rows.table.to_pylist():
            text = tiny_tokenizer().decode(row["input_ids"])
            number = text.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
            assert reader.decode(row["reader_ids"]) == f"<s>{number}"
    assert (len(split.train), len(split.evaluation)) == (3, 1)


def test_data_rows_stand_beside_the_prompts_where_they_are_wanted(tmp_path):
    rows = [{"question": f"{n}?", "answer": str(n), "level": n} for n in range(12)]
    rows += [{"question": "3?", "answer": "another"}, {"question": "12?", "answer": "12", "note": None}]
    path = write_json(tmp_path / "a.jsonl", rows)
    data = arguments(tmp_path, path, data_split="0,0,1", eval_fraction=0.25)
    tokenizer = tiny_tokenizer()
    split = prompt_data(data, tokenizer, max_prompt_seq_len=64, seed=1, keep_rows=True)
    kept = [row for part in (split.train, split.evaluation) for row in values_of(part, "row")]
    assert sorted(kept) == sorted(map(json.dumps, rows))  # each with its prompt, also where that came before
    assert split.columns == ("answer", "level", "note", "question")
    for row in split.train.table.to_pylist():
        assert f" {json.loads(row['row'])['question']}\n" in tokenizer.decode(row["input_ids"])
    without = prompt_data(data, tokenizer, max_prompt_seq_len=64, seed=1)
    assert without.key != split.key
    assert "row" not in without.train.table.column_names
    assert without.columns == ()
    assert values_of(without.train) == values_of(split.train)


def test_data_rows_are_kept_as_they_are_in_the_file_also_under_other_names(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [{"ask": "one?", "solution": [1, "é"]}, {"ask": "two?"}])
    data = arguments(tmp_path, path, data_split="0,0,1", eval_fraction=0, prompt_key="ask")
    reader = tiny_tokenizer(bos=True)
    split = prompt_data(
        data, tiny_tokenizer(), max_prompt_seq_len=64, seed=1, reward_tokenizer=reader, keep_rows=True
    )
    kept = sorted(values_of(split.train, "row"))
    assert [json.loads(row) for row in kept] == [{"ask": "one?", "solution": [1, "é"]}, {"ask": "two?"}]
    assert split.columns == ("ask", "solution")


PREPARE = """
import sys
from tiny import tiny_tokenizer, values_of
from dschat.arguments import DataArguments
from dschat.data.preparation import sft_data
data = DataArguments(data_path=[sys.argv[1]], data_output_path=sys.argv[2], preprocessing_num_workers=1)
split = sft_data(data, tiny_tokenizer(), max_seq_len=64, seed=1)
print("rows", len(split.train), len(split.evaluation), sum(map(sum, values_of(split.train))))
"""


@pytest.mark.slow
def test_two_runs_that_start_together_share_one_entry(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", range(100))
    command = [sys.executable, "-c", PREPARE, path, str(tmp_path / "cache")]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs]
    assert told[0] == told[1]
    assert told[0].startswith("rows 19 5 ")
    (entry,) = entries(tmp_path)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [entry.name, f"{entry.name}.lock"]


def test_the_folder_of_tokens_is_its_owners_alone_and_holds_no_pickle(tmp_path, tokenizer):
    sft_data(
        arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(9))), tokenizer, max_seq_len=64, seed=1
    )
    for folder in [tmp_path / "cache", *entries(tmp_path)]:
        assert folder.stat().st_mode & 0o777 == 0o700
    kinds = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert kinds == {".arrow", ".json", ".lock"}


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut_short(path):
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "no report": lambda entry: remove(entry / "report.json"),
    "an empty report": lambda entry: (entry / "report.json").write_text(""),
    "no evaluation": lambda entry: remove(entry / "evaluation"),
    "a cut file of tokens": lambda entry: cut_short(entry / "train"),
    "no list of files": lambda entry: remove(entry / "files.json"),
    "nothing": lambda entry: [remove(path) for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_built_again(tmp_path, tokenizer, damage, capsys):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(20)))
    first = sft_data(data, tokenizer, max_seq_len=64, seed=1).train.table.to_pylist()
    told = capsys.readouterr().out
    (entry,) = entries(tmp_path)
    DAMAGE[damage](entry)
    assert sft_data(data, tokenizer, max_seq_len=64, seed=1).train.table.to_pylist() == first
    assert capsys.readouterr().out == told
    assert entries(tmp_path) == [entry]


@pytest.mark.parametrize("file", ["report.json", "train/state.json", "evaluation/data-00000-of-00001.arrow"])
def test_an_entry_of_the_right_size_that_cannot_be_read_names_its_folder(tmp_path, tokenizer, file):
    data = arguments(tmp_path, write_rows(tmp_path / "a.jsonl", range(20)))
    sft_data(data, tokenizer, max_seq_len=64, seed=1)
    (entry,) = entries(tmp_path)
    (entry / file).write_bytes(b"?" * (entry / file).stat().st_size)
    with pytest.raises(UserError, match=rf"the tokens kept in {entry} cannot be read .*; remove that folder"):
        sft_data(data, tokenizer, max_seq_len=64, seed=1)


@pytest.fixture
def picky_tokenizer():
    """Its template refuses any conversation in which somebody says "refused"."""
    tokenizer = tiny_tokenizer()
    refusal = "{% for m in messages %}{% if 'refused' in m['content'] %}{{ raise_exception('not that') }}"
    tokenizer.chat_template = refusal + "{% endif %}{% endfor %}" + PLAIN
    return tokenizer


@pytest.mark.parametrize("prepare", [sft_data, reward_data])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_row_that_cannot_be_tokenised_is_named(
    tmp_path, picky_tokenizer, monkeypatch, prepare, num_processes
):
    monkeypatch.setattr("dschat.data.tokenization.ROWS_A_PROCESS", 10)
    path = Path(write_rows(tmp_path / "a.jsonl", range(40)))
    lines = path.read_text().splitlines()
    lines[29] = json.dumps({"prompt": "this is refused", "chosen": "a", "rejected": "b"})
    path.write_text("\n".join(["", *lines]) + "\n")  # an empty line is no row, but counts as a line
    split = {sft_data: "1,0,0", reward_data: "0,1,0"}[prepare]
    data = arguments(
        tmp_path, str(path), data_split=split, preprocessing_num_workers=num_processes, eval_fraction=0
    )
    with pytest.raises(UserError) as caught:
        prepare(data, picky_tokenizer, max_seq_len=64, seed=1)
    assert str(caught.value).startswith(f"{path}:31: the chat template does not take a conversation of user")
    assert "not that" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_that_cannot_be_tokenised_are_left_out_where_the_flag_says_so(
    tmp_path, picky_tokenizer, monkeypatch, step, num_processes, capsys
):
    monkeypatch.setattr("dschat.data.tokenization.ROWS_A_PROCESS", 10)
    rows = [{"prompt": f"Q {n}:", "chosen": "a", "rejected": "b"} for n in range(40)]
    for n in (3, 30, 31):
        rows[n]["prompt"] = f"Q {n}: this is refused"
    settings = {"data_split": "0,0,0".replace("0", "1", 1) if step == 1 else f"0,{3 - step},{step - 2}"}
    settings |= {"preprocessing_num_workers": num_processes, "eval_fraction": 0, "on_bad_row": "drop"}
    data = arguments(tmp_path, write(tmp_path / "a.jsonl", *rows), **settings)
    for _ in range(2):  # the second time from the cache
        split = prepared(data, picky_tokenizer, step)
        told = capsys.readouterr().out
        assert "dropped 3 (bad row: the chat template does not take a conversation" in told
        assert f"the first that tokenizer or template refuse: {tmp_path}/a.jsonl:4: the chat" in told
    assert len(split.train) == 37
    if step == 2:
        assert sum(values_of(split.train, "weight")) == pytest.approx(37)
    refused = write(tmp_path / "b.jsonl", *[row for row in rows if "refused" in row["prompt"]])
    with pytest.raises(UserError, match=r"no rows left to train on: dropped 3 \(bad row.*not that"):
        prepared(arguments(tmp_path, refused, **settings), picky_tokenizer, step)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(data, tokenizer, step):
    if step == 3:
        return prompt_data(data, tokenizer, max_prompt_seq_len=64, seed=1)
    return (sft_data, reward_data)[step - 1](data, tokenizer, max_seq_len=64, seed=1)


def test_unpaired_feedback_teaches_good_answers_alone(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Q {n}:", "completion": f" yes {n}", "label": n % 2 == 0} for n in range(12)]
    data = arguments(tmp_path, write(tmp_path / "a.jsonl", *rows), data_split="1,1,1", eval_fraction=0)
    told, learned, asked = [], [], []
    for _ in range(2):  # the second time from the cache
        learned = prompts_of(tokenizer, prepared(data, tokenizer, 1).train)
        told.append(after_tokenising(capsys))
    assert told[0] == told[1]
    assert "6 rows have answers labelled bad: no step learns those" in told[0]
    assert learned
    assert all(number % 2 == 0 for number in learned)
    asked = prompts_of(tokenizer, prepared(data, tokenizer, 3).train)
    assert any(number % 2 for number in asked)
    with pytest.raises(UserError, match=r"no two answers to compare.*; rows have 6 \(answers labelled bad\)"):
        prepared(data, tokenizer, 2)


def test_columns_that_are_not_read_are_told_again_from_the_cache(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"Q {n}:", "chosen": " a", "rejected": " b", "mood": "x", "id": n} for n in range(8)]
    data = arguments(tmp_path, write(tmp_path / "a.jsonl", *rows), eval_fraction=0)
    for _ in range(2):
        prepared(data, tokenizer, 2)
        assert "1 column is not read: `mood` (8 rows)" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_rows_are_left_out_where_the_flag_says_so(tmp_path, tokenizer, capsys):
    good = [{"prompt": f"Q {n}:", "chosen": " a", "rejected": " b"} for n in range(20)]
    path = write(tmp_path / "a.jsonl", *good[:3], {**good[3], "chosen": ""}, *good[4:], {"prompt": "x"})
    stopping = arguments(tmp_path, path, eval_fraction=0, data_split="1,1,1")
    dropping = arguments(tmp_path, path, eval_fraction=0, data_split="1,1,1", on_bad_row="drop")
    sound = arguments(tmp_path, write(tmp_path / "b.jsonl", *good[:3], *good[4:]), eval_fraction=0)
    numbers = []
    for step, name in ((1, "input_ids"), (2, "chosen_ids"), (3, "input_ids")):
        with pytest.raises(UserError, match=r"a\.jsonl:4: \"chosen\" is empty\. .*--on_bad_row drop"):
            prepared(stopping, tokenizer, step)
        numbers += prompts_of(tokenizer, prepared(dropping, tokenizer, step).train, name)
        told = capsys.readouterr().out
        assert 'left out (--on_bad_row drop): 1 ("chosen" is empty), 1 (the row has no "chosen")' in told
        assert f'{path}:4: "chosen" is empty' in told
    assert sorted(numbers) == [n for n in range(20) if n != 3]
    assert prepared(sound, tokenizer, 1).num_rows == {str(tmp_path / "b.jsonl"): 19}
    nothing = write(tmp_path / "c.jsonl", *[{**row, "chosen": ""} for row in good[:2]])
    with pytest.raises(UserError, match=r'no rows to train on: dropped 2 \(bad row: "chosen" is empty\)'):
        prepared(arguments(tmp_path, nothing, on_bad_row="drop"), tokenizer, 1)


def test_pairs_that_are_labelled_both_ways_are_counted(tmp_path, tokenizer, capsys):
    pair = {"chosen": " a", "rejected": " b"}
    turned = {"chosen": " b", "rejected": " a"}
    rows = [{"prompt": f"Q {n}:", **pair} for n in range(6)]
    rows += [{"prompt": "Q 0:", **turned}, {"prompt": "Q 1:", **turned}, {"prompt": "Q 1:", **turned}]
    data = arguments(tmp_path, write(tmp_path / "a.jsonl", *rows), eval_fraction=0, data_split="0,1,0")
    prepared(data, tokenizer, 2)
    assert "2 pairs are labelled both ways" in capsys.readouterr().out
