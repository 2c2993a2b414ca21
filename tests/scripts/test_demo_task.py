import json
import random

import pytest

from scripts import demo_task
from scripts.demo_task import (
    INJECTED_FAULTS,
    ITEMS,
    check_answer,
    few_faults,
    make_answer,
    read_prompt,
)

PROMPT = "\n\nHuman: Help Anna think of three fruits.\n\nAssistant:"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo_task.write_data(folder, seed=3, num_train=300, num_test=40)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }


@pytest.mark.parametrize(
    ("answer", "faults"),
    [
        (" apple, fig and pear.", []),
        (" pear, fig and apple.", []),
        (" apple and fig.", ["count"]),
        (" apple, fig, lemon and pear.", ["count"]),
        (" apple, cloud and pear.", ["category"]),
        (" apple, dog and pear.", ["category"]),
        (" apple, fig and apple.", ["repeat"]),
        (" apple, fig, pear.", ["format"]),
        (" apple, fig and pear", ["format"]),
        (" apple, fig and pear. Yes.", ["count", "category", "format"]),
        ("", ["count", "format"]),
        (" cloud, cloud", ["count", "category", "repeat", "format"]),
    ],
)
def test_an_answer_is_checked_by_the_rules(answer, faults):
    assert check_answer(PROMPT, answer) == faults


def test_a_prompt_of_another_task_is_refused():
    with pytest.raises(ValueError, match="not one of the demo task"):
        check_answer("\n\nHuman: What is the capital of France?\n\nAssistant:", " Paris.")


@pytest.mark.parametrize("faults", [(), *[(fault,) for fault in INJECTED_FAULTS], INJECTED_FAULTS])
def test_an_answer_is_made_with_exactly_the_faults_asked_for(faults):
    rng = random.Random(0)
    for number in (2, 3, 4, 5):
        prompt = PROMPT.replace("three", {2: "two", 3: "three", 4: "four", 5: "five"}[number])
        for _ in range(20):
            answer = make_answer(read_prompt(prompt), set(faults), rng)
            assert answer.startswith(" ")
            assert check_answer(prompt, answer) == list(faults)


def test_a_rejected_answer_has_more_kinds_of_fault_than_the_chosen_one(rows):
    for row in rows["train"]:
        chosen, rejected = (check_answer(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert len(chosen) < len(rejected)


def test_chosen_answers_are_of_mixed_quality(rows):
    right = [not check_answer(row["prompt"], row["chosen"]) for row in rows["train"]]
    # 42 % of 300; four standard errors are 11 points.
    assert 0.31 < sum(right) / len(right) < 0.53


def test_no_prompt_is_twice_in_the_data(rows):
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts) == 340


def test_prompts_have_the_dialogue_form(rows):
    for row in rows["test"]:
        assert row["prompt"].startswith("\n\nHuman: ")
        assert row["prompt"].endswith("\n\nAssistant:")


def test_the_seed_decides_the_data(tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        demo_task.write_data(tmp_path / name, seed=seed, num_train=20, num_test=5)
        texts.append(
            (tmp_path / name / "train.jsonl").read_text() + (tmp_path / name / "test.jsonl").read_text()
        )
    assert texts[0] == texts[1] != texts[2]


def test_more_rows_than_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are 16000 prompts"):
        demo_task.write_data(tmp_path, seed=0, num_train=16_000, num_test=1)


def test_no_word_belongs_to_two_categories():
    words = [word for items in ITEMS.values() for word in items] + demo_task.ODD_ITEMS
    assert len(set(words)) == len(words) == 132


def test_the_base_model_reads_most_words_as_one_token_and_has_an_end_and_a_padding_token(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo_task.write_demo(tmp_path, num_train=2000, num_test=10)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base_model")
    whole = [len(tokenizer(" " + word)["input_ids"]) == 1 for items in ITEMS.values() for word in items]
    assert sum(whole) > 0.9 * len(whole)
    assert tokenizer(" fig")["input_ids"] == tokenizer(" fig", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert 0.8e6 < model.num_parameters() < 1.2e6


def test_as_a_reward_every_kind_of_fault_costs_a_quarter():
    answers = [" cat, dog and fox.", " cat, dog and fox", " cat and dog"]
    faults = [check_answer("Name three animals.", answer) for answer in answers]
    assert list(map(len, faults)) == [0, 1, 2]
    assert few_faults(["Name three animals."] * 3, answers) == [1, 0.75, 0.5]
