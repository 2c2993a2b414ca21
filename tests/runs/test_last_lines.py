"""What a step says last, and that the command it prints runs."""

import json
import os
import shlex
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_counting_pairs, save_tiny_model

from dschat.arguments import parse_arguments
from dschat.runs.last_lines import achieved, next_commands, print_last_lines
from scripts import chat

STEPS = ("step1_sft", "step2_reward", "step3_ppo")


def next_of(step: str, *flags: str) -> list[list[str]]:
    """The words of the next commands."""
    return [shlex.split(line) for _, line in next_commands(parse_arguments(step, [*flags]).description)]


def flags_in(words: list[str]) -> dict[str, str]:
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


def finished(folder: Path, step: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"step": step}))
    return folder


def test_the_figures_in_a_phrase():
    reward = {"eval_accuracy": 0.7, "eval_accuracy_stderr": 0.02, "verdict": "good: 0.7"}
    assert achieved("reward", reward) == "accuracy 0.700 ± 0.020 on held-out pairs: good"
    ppo = {"initial_eval_score": 1.0, "actor_step": 7, "verdict": "better than the start: score +2"}
    assert achieved("rlhf", ppo) == (
        "score 1.000 on held-out prompts before PPO; actor/ (PPO step 7) is better than the start: score +2"
    )
    assert achieved("rlhf", {"ppo_steps": 3, "score": 1.0, "kl": 0.5}).startswith("last of 3 PPO steps")


def test_without_a_folder_nothing_is_named(capsys):
    print_last_lines(parse_arguments("sft", ["--model_name_or_path", "m"]).description)
    assert capsys.readouterr().out == "done. Nothing is kept, as there is no --output_dir.\n"


def test_the_next_step_has_the_data_and_the_settings_of_memory_and_a_folder_of_its_own(tmp_path):
    out, data = tmp_path / "my runs" / "sft", "it's mine.jsonl"
    (tmp_path / "my runs" / "reward").mkdir(parents=True)
    flags = ["--data_path", data, "b", "--output_dir", str(out), "--lora_dim", "8", "--only_optimize_lora"]
    rates = ["--learning_rate", "1e-3", "--chat_template", "plain"]
    reward, dpo = next_of("sft", "--model_name_or_path", "m", *flags, *rates)
    args = parse_arguments("reward", reward[2:])
    assert (args.model.model_name_or_path, args.data.data_path) == (str(out), [data, "b"])
    assert (args.model.lora_dim, args.optimizer.only_optimize_lora) == (8, True)
    assert args.run.output_dir == f"{tmp_path}/my runs/reward_2"  # the first is taken
    assert (args.model.learning_rate, args.tokenizer.chat_template) == (9e-6, None)
    assert parse_arguments("dpo", dpo[2:]).run.output_dir == f"{tmp_path}/my runs/dpo"


def test_ppo_trains_what_step_1_wrote(tmp_path):
    sft, out = finished(tmp_path / "step1_sft", "sft"), str(tmp_path / "step2_reward")
    flags = ["--output_dir", out, "--max_seq_len", "64", "--zero_stage", "2"]
    for base in (str(sft), "some/base"):
        (line,) = next_of("reward", "--model_name_or_path", base, *flags)
        args = parse_arguments("rlhf", line[2:])
        assert (args.actor.model_name_or_path, args.critic.model_name_or_path) == (str(sft), out)
        assert (args.actor.zero_stage, args.critic.zero_stage, args.rollout.max_answer_seq_len) == (2, 2, 32)
        assert args.run.output_dir == str(tmp_path / "step3_ppo")
    (line,) = next_of(
        "reward", "--model_name_or_path", "some/base", "--output_dir", str(tmp_path / "a" / "b")
    )
    assert flags_in(line)["--actor_model_name_or_path"] == "some/base"


def test_data_whose_columns_a_comparison_cannot_be_told_are_not_named(tmp_path):
    flags = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--data_path", "d"]
    assert "--data-path" in next_of("dpo", *flags)[0]
    assert "--prompt" in next_of("dpo", *flags, "--prompt_key", "question")[0]


def test_several_ranks_start_the_next_step_with_as_many(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in next_of("sft", "--model_name_or_path", "m", "--output_dir", str(tmp_path / "sft")):
        assert words[words.index("--nproc_per_node") + 1] == "2"
        assert words[words.index("--nproc_per_node") + 2].endswith(".py")


def test_several_hosts_start_the_next_step_together(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "10.0.0.1")):
        monkeypatch.setenv(name, value)
    for words in next_of("sft", "--model_name_or_path", "m", "--output_dir", str(tmp_path / "sft")):
        given = flags_in(words)
        assert (given["--nnodes"], given["--nproc_per_node"]) == ("2", "2")
        assert given["--rdzv_endpoint"] == "10.0.0.1:29400"


@pytest.mark.slow
def test_the_printed_commands_run_one_after_the_other(tmp_path):
    save_counting_pairs(tmp_path / "pairs of mine.jsonl")
    save_tiny_model(tmp_path / "base")
    start = ["--model_name_or_path", "base", "--output_dir", "runs/sft", "--data_path", "pairs of mine.jsonl"]
    settings = ["--max_seq_len", "64", "--dtype", "fp32", "--max_train_samples", "6"]
    words, seen = [str(ROOT / "step1_sft" / "main.py"), *start, *settings], []
    while "compare.py" not in words[0]:
        said = python(*words, cwd=tmp_path).stdout
        seen.append(words[0])
        lines = said.partition("\ndone: ")[2].splitlines()
        words, *others = [shlex.split(line)[1:] for line in lines if line.startswith("    ")]
        assert lines[-1].startswith("    ")  # nothing comes after it
    assert [os.path.relpath(path, ROOT) for path in seen] == [f"{name}/main.py" for name in STEPS]
    told = python(*words, cwd=tmp_path).stdout
    assert "before" in told
    assert "after" in told
    (program, *flags) = others[0]
    assert program == str(ROOT / "scripts" / "chat.py")
    assert vars(chat.parse(flags)) | {"model": "runs/ppo/actor", "reward_model": "runs/reward"} == vars(
        chat.parse(flags)
    )
