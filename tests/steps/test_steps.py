"""The three steps run for real, as a user starts them, on a small model and a small file of preferences."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from figures import timeless_lines, unwritten_metrics
from peft import PeftModel
from processes import ROOT, environment, python
from safetensors.torch import load_file
from tiny import save_counting_pairs, save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SFT, REWARD, PPO = (ROOT / name / "main.py" for name in ("step1_sft", "step2_reward", "step3_ppo"))
DPO = ROOT / "step2_reward" / "dpo.py"
PROMISED_METRICS = {
    "step",
    "score",
    "kl",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "ratio_mean",
    "ratio_max",
    "first_minibatch_ratio_error",
    "rollout_logprob_diff",
    "rollout_logprob_diff_max",
    "policy_loss",
    "value_loss",
    "explained_variance",
    "answer_length",
    "eos_share",
    "seconds_generation",
    "seconds_experience",
    "seconds_training",
    "seconds_saving",
    "tokens_per_second",
    "flops_per_second",
    "peak_share",
    "score_clipped_share",
    "k3",
    "score_minus_kl",
    "kl_coef",
    "value_clip_fraction",
    "advantage_mean",
    "advantage_std",
    "return_mean",
    "return_std",
    "actor_grad_norm",
    "critic_grad_norm",
    "actor_lr",
    "critic_lr",
    "peak_memory_gib",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and sixty preferences: the chosen answer counts on, the rejected one does not."""
    folder = tmp_path_factory.mktemp("steps")
    save_counting_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "base")
    return folder


def flags(folder: Path, output: str, *more: str) -> list[str]:
    return [
        f"--data_path={folder / 'pairs.jsonl'}",
        f"--data_output_path={folder / 'cache'}",
        f"--output_dir={folder / output}",
        "--dtype=fp32",
        *more,
    ]


def supervised(folder: Path, output: str, *more: str) -> list[str]:
    base = [f"--model_name_or_path={folder / 'base'}", "--learning_rate=3e-3"]
    return flags(folder, output, *base, "--num_train_epochs=3", *more)


def ppo(folder: Path, output: str, sft: str, reward: str, *more: str) -> list[str]:
    models = [f"--actor_model_name_or_path={folder / sft}", f"--critic_model_name_or_path={folder / reward}"]
    small = ["--max_answer_seq_len=8", "--num_warmup_steps=0", "--data_split=1,1,1"]
    return flags(folder, output, *models, *small, *more)


def batch(rows: int, **more: int) -> list[str]:
    return [f"--per_device_train_batch_size={rows}", *(f"--{name}={value}" for name, value in more.items())]


def ppo_batch(rows: int) -> list[str]:
    return [f"--per_device_generation_batch_size={rows}", f"--per_device_training_batch_size={rows // 2}"]


@pytest.fixture(scope="module")
def one_rank(folder) -> Path:
    """All three steps on one rank, with plain python, from another working directory."""
    split = ["--data_split=1,1,1", "--profile=1"]
    python(SFT, *supervised(folder, "sft", *split, *batch(8)), cwd=folder)
    python(REWARD, *supervised(folder, "reward", *split, *batch(8, eval_interval=2)), cwd=folder)
    python(
        PPO,
        *ppo(
            folder, "ppo", "sft", "reward", *ppo_batch(8), "--enable_ema", "--print_answers", "--profile=1-2"
        ),
        cwd=folder,
    )
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_sft_lowers_the_perplexity_and_reports_it_before_during_and_after(one_rank):
    result = summary(one_rank / "sft")
    assert result["eval_perplexity"] < 0.8 * result["initial_eval_perplexity"]
    assert result["eval_perplexity"] == pytest.approx(math.exp(result["eval_loss"]))
    losses = [line["loss"] for line in lines(one_rank / "sft") if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_reward_model_reports_accuracy_with_its_standard_error(one_rank):
    result = summary(one_rank / "reward")
    p, n = result["eval_accuracy"], result["num_eval_rows"]  # a pair a prompt
    assert result["eval_accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert result["score_mean"] == pytest.approx(
        (result["chosen_mean_score"] + result["rejected_mean_score"]) / 2
    )
    evaluations = [line["step"] for line in lines(one_rank / "reward") if "eval_accuracy" in line]
    assert evaluations[:2] == [0, 2]


@pytest.mark.slow
def test_steps_1_and_2_write_the_metrics_of_the_registry_and_no_others(one_rank):
    assert unwritten_metrics("sft", one_rank / "sft") == []
    assert unwritten_metrics("reward", one_rank / "reward") == []


@pytest.mark.slow
def test_the_verdict_on_the_reward_model_travels_with_it(one_rank):
    result = summary(one_rank / "reward")
    assert result["eval_pairs"] == result["eval_prompts"] == result["num_eval_rows"]  # a pair a prompt
    numbers = (
        f"{result['eval_accuracy']:.3f} +- {result['eval_accuracy_stderr']:.3f} of {result['eval_pairs']}"
    )
    assert numbers in result["verdict"]
    assert json.loads((one_rank / "reward" / "manifest.json").read_text())["verdict"] == result["verdict"]
    assert f"## Verdict\n\n{result['verdict']}" in (one_rank / "reward" / "README.md").read_text()


def report(folder: Path) -> dict:
    return json.loads((folder / "reward_report.json").read_text())


@pytest.mark.slow
def test_step_2_reports_on_all_its_held_out_pairs(one_rank):
    """Also where evaluations between are of some pairs only, which the last was not."""
    found, result = report(one_rank / "reward"), summary(one_rank / "reward")
    assert (found["pairs"], found["prompts"]) == (result["eval_pairs"], result["eval_prompts"])
    assert found["accuracy"]["value"] == pytest.approx(result["eval_accuracy"])
    for name in ("gain_over_length", "overconfidence"):
        assert found[name]["value"] == pytest.approx(result[f"eval_{name}"])
    assert result["verdict"].partition(":")[0].removesuffix(", overfitted") == found["verdict"]
    assert found["data"] == [str(one_rank / "pairs.jsonl")]
    html = (one_rank / "reward" / "reward_report.html").read_text()
    assert f"<b>{found['verdict']}</b>" in html
    assert "Count on from" in html or not found["mistakes"]
    exported = json.loads((one_rank / "reward" / ".export.json").read_text())["files"]
    assert {"reward_report.html", "reward_report.json"} <= set(exported)  # so it leaves with the model
    log = (one_rank / "reward" / "log.txt").read_text()
    assert f"report on the reward model: {found['verdict']} ({one_rank / 'reward'}/reward_report.html)" in log


@pytest.mark.slow
def test_ppo_writes_every_promised_metric_each_step_and_all_are_finite(one_rank):
    before, *steps = lines(one_rank / "ppo")
    assert before["step"] == before["eval_kl"] == 0
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert len(steps) == 3  # nineteen prompts, eight a step
    for line in steps:
        assert [line[name] for name in PROMISED_METRICS if not math.isfinite(line[name])] == []
        assert line["first_minibatch_ratio_error"] == 0
    assert steps[0]["kl"] == 0
    assert summary(one_rank / "ppo")["ppo_steps"] == 3


@pytest.mark.slow
def test_ppo_tells_what_its_actor_gains_over_the_start(one_rank):
    evaluations = {line["step"]: line for line in lines(one_rank / "ppo") if "eval_score" in line}
    assert evaluations.keys() == {0, 3}
    result = summary(one_rank / "ppo")
    assert result["initial_eval_score"] == evaluations[0]["eval_score"]
    assert result["best_eval_score"] == evaluations[result["best_step"]]["eval_score"]
    exported = evaluations[result["actor_step"]]
    for name in ("score", "objective"):
        gained = exported[f"eval_{name}"] - evaluations[0][f"eval_{name}"]
        assert result[f"{name}_gain"] == pytest.approx(gained, abs=1e-6)
    assert result["verdict"] in (one_rank / "ppo" / "actor" / "README.md").read_text()
    assert not (one_rank / "ppo" / "best").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sft", "ppo/actor", "ppo/actor_ema"])
def test_the_actor_generates_from_its_folder_with_its_own_tokenizer(model, one_rank):
    tokenizer = AutoTokenizer.from_pretrained(one_rank / model)
    language_model = AutoModelForCausalLM.from_pretrained(one_rank / model)
    tokens = tokenizer("\n\nHuman: Count on from one, friend.\n\nAssistant:", return_tensors="pt")
    ids = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    assert language_model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["reward", "ppo/critic"])
def test_the_reward_model_is_a_sequence_classifier_for_everyone(model, one_rank):
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        one_rank / model, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert classifier.config.num_labels == 1


@pytest.mark.slow
def test_every_optimiser_step_says_how_fast_it_was(one_rank):
    for name in ("sft", "reward"):
        steps = [line for line in lines(one_rank / name) if "loss" in line]
        assert [0 < line["peak_share"] <= 1 for line in steps] == [True] * len(steps)
        for line in steps:
            phases = ("data", "forward_backward", "optimizer")
            spent = sum(line[f"seconds_{phase}"] for phase in phases)
            assert line["tokens_per_second"] * spent == pytest.approx(
                round(line["tokens_per_second"] * spent)
            )
        assert " of the peak; time: data " in (one_rank / name / "log.txt").read_text()


@pytest.mark.slow
def test_every_step_is_profiled_where_it_is_asked_for(one_rank):
    for name, steps, span in (
        ("sft", "step 1", "backward"),
        ("reward", "step 1", "backward"),
        ("ppo", "steps 1 to 2", "generation"),
    ):
        page = (one_rank / name / "profile" / "summary.md").read_text()
        assert page.startswith(f"# Profile of {steps}\n")
        assert " of the measured peak." in page
        with gzip.open(one_rank / name / "profile" / "trace.json.gz") as trace:
            assert span in {event.get("name") for event in json.load(trace)["traceEvents"]}


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers_and_reads_the_cache(one_rank):
    result = python(SFT, *supervised(one_rank, "sft_again", "--data_split=1,1,1", *batch(8)), afresh=True)
    assert "tokenising" not in result.stdout

    def timeless(name: str) -> dict:
        return {key: value for key, value in summary(one_rank / name).items() if key != "seconds"}

    assert timeless("sft_again") == timeless("sft")
    assert timeless_lines(one_rank / "sft_again") == timeless_lines(one_rank / "sft")


def assert_close(ours: list[dict], theirs: list[dict], names: tuple[str, ...]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in set(names) & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (name, one["step"])


@pytest.mark.slow
def test_two_ranks_at_stage_three_give_the_numbers_of_one_in_every_step(one_rank):
    split = "--data_split=1,1,1"
    python(SFT, *supervised(one_rank, "sft2", split, "--zero_stage=3", *batch(4)), ranks=2)
    assert_close(lines(one_rank / "sft2"), lines(one_rank / "sft"), ("loss", "eval_loss"))
    half = batch(2, gradient_accumulation_steps=2, eval_interval=2)
    python(REWARD, *supervised(one_rank, "reward2", split, "--zero_stage=3", *half), ranks=2)
    names = ("loss", "accuracy", "eval_loss", "eval_accuracy", "eval_accuracy_stderr", "chosen_mean_score")
    assert_close(lines(one_rank / "reward2"), lines(one_rank / "reward"), names)
    ours, theirs = report(one_rank / "reward2"), report(one_rank / "reward")
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
    assert ours["overconfidence"] == pytest.approx(theirs["overconfidence"], abs=1e-4)
    assert [wrong["prompt"] for wrong in ours["mistakes"]] == [
        wrong["prompt"] for wrong in theirs["mistakes"]
    ]
    assert summary(one_rank / "reward2")["model_step"] == summary(one_rank / "reward")["model_step"]
    zero3 = ["--actor_zero_stage=3", "--critic_zero_stage=3"]
    python(PPO, *ppo(one_rank, "ppo2", "sft", "reward", *ppo_batch(4), *zero3), ranks=2)
    names = ("score", "kl", "entropy", "policy_loss", "value_loss", "answer_length", "approx_kl")
    names += ("eval_score", "eval_kl", "eval_objective", "eval_score_minus_kl", "eval_answer_length")
    assert_close(lines(one_rank / "ppo2"), lines(one_rank / "ppo"), names)


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_two_ranks_from_any_directory(one_rank, tmp_path):
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        launcher,
        *("--num_gpus", "2", "--master_port", "29732"),  # the default one is the README test's
        PPO,
        *ppo(one_rank, "ppo_launched", "sft", "reward", *ppo_batch(4)),
    ]
    path = f"{launcher.parent}:{environment()['PATH']}"
    subprocess.run(
        command, check=True, cwd=tmp_path, env=environment(PATH=path), timeout=600, capture_output=True
    )
    assert_close(lines(one_rank / "ppo_launched"), lines(one_rank / "ppo"), ("score", "kl", "value_loss"))


@pytest.mark.slow
def test_bf16_trains_too(one_rank):
    more = ("--data_split=1,1,1", "--dtype=bf16", "--zero_stage=2", "--gradient_checkpointing", *batch(8))
    measure = "test -f {model}/model.safetensors && echo '{\"acc\": 0.5}'"
    python(SFT, *supervised(one_rank, "sft_bf16", *more, "--eval_command", measure))
    result = summary(one_rank / "sft_bf16")
    assert result["eval_loss"] < result["initial_eval_loss"]
    assert (result["eval/acc"], lines(one_rank / "sft_bf16")[-1]["eval/acc"]) == (0.5, 0.5)
    model = AutoModelForCausalLM.from_pretrained(one_rank / "sft_bf16", dtype="auto")
    assert model.dtype == torch.bfloat16


LORA = ("--lora_dim=4", "--lora_learning_rate=1e-2", "--data_split=1,1,1")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "alone"), [(SFT, False), (REWARD, True)], ids=["sft", "reward"])
def test_adapters_learn_the_same_on_two_ranks_at_any_stage(program, alone, folder, tmp_path):
    more = (*LORA, "--gradient_checkpointing", *(["--only_optimize_lora"] if alone else []))
    python(program, *supervised(folder, tmp_path / "one", *more, *batch(8)))
    result = summary(tmp_path / "one")
    assert result["eval_loss"] < 0.98 * result["initial_eval_loss"]
    names = ("loss", "eval_loss", "learning_rate", "grad_norm", "eval_accuracy")
    one = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for stage in (2, 3):
        output = tmp_path / f"stage{stage}"
        python(program, *supervised(folder, output, *more, f"--zero_stage={stage}", *batch(4)), ranks=2)
        assert_close(lines(output), lines(tmp_path / "one"), names)
        two = load_file(output / "adapter" / "adapter_model.safetensors")
        torch.testing.assert_close(two, one, atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_train_in_bf16_and_load_on_their_base_model(stage, folder, tmp_path):
    more = (
        *LORA,
        "--only_optimize_lora",
        "--dtype=bf16",
        f"--zero_stage={stage}",
        "--gradient_checkpointing",
    )
    python(SFT, *supervised(folder, tmp_path / "sft", *more, *batch(4)), ranks=2)
    result = summary(tmp_path / "sft")
    assert result["eval_loss"] < 0.98 * result["initial_eval_loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, tmp_path / "sft" / "adapter").merge_and_unload()
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.state_dict(), adapted.state_dict(), atol=1e-2, rtol=1e-2)


BAD_INPUT = {
    "unknown flag": (SFT, ["--model_name=x"], ["unknown flag --model_name"]),
    "missing file": (SFT, ["--data_path=gone.jsonl"], ["gone.jsonl", "--data_path"]),
    "malformed line": (SFT, ["--data_path={bad}/malformed.jsonl"], ["malformed.jsonl:2: "]),
    "no answer": (REWARD, ["--data_path={bad}/no_answer.jsonl"], ["no_answer.jsonl:2: "]),
    "empty split": (REWARD, ["--data_split=1,0,1"], ["--data_split"]),
    "no weights": (SFT, ["--model_name_or_path={bad}/empty_model"], ["--model_name_or_path", "weights"]),
    "nothing to optimise": (SFT, ["--only_optimize_lora"], ["--only_optimize_lora", "--lora_dim"]),
    "adapters on no layer": (
        PPO,
        ["--critic_lora_dim=4", "--critic_lora_module_name=qkv"],
        ["--critic_lora_module_name 'qkv'", "rwtransformer.layers.*.self_attn.q_proj"],
    ),
    "no file of adapters": (REWARD, ["--lora_config=gone.json"], ["--lora_config gone.json", "JSON"]),
    "no folder": (SFT, ["--output_dir={bad}/file/out"], ["--output_dir", "cannot be written"]),
    "fp16 on a CPU": (SFT, ["--dtype=fp16"], ["--dtype fp16", "bf16"]),
    "offload at stage 0": (SFT, ["--offload"], ["--offload", "--zero_stage 2"]),
    "prompts too long": (PPO, ["--max_prompt_seq_len=2"], ["--max_prompt_seq_len"]),
    "another tokenizer for the critic": (
        PPO,
        [
            "--critic_model_name_or_path={bad}/other_tokenizer",
            "--reward_model_name_or_path={bad}/other_tokenizer",
        ],
        ["--critic_model_name_or_path", "different tokenizers", "'<|another|>'"],
    ),
    "answers beyond the positions": (
        PPO,
        ["--actor_model_name_or_path={bad}/gpt2", "--max_answer_seq_len=600"],
        ["512 positions", "--max_answer_seq_len"],
    ),
    "a base model as reward model": (
        PPO,
        ["--critic_model_name_or_path={folder}/base"],
        ["--critic_model_name_or_path", "score.weight", "step 2"],
    ),
    "a reward model for DPO": (
        DPO,
        ["--model_name_or_path={bad}/reward"],
        ["--model_name_or_path", "is a reward model"],
    ),
    "a mistyped folder": (
        PPO,
        ["--critic_model_name_or_path=base/nothere"],
        ["--critic_model_name_or_path 'base/nothere'", "no such folder"],
    ),
    "a second reward model of another tokenizer": (
        PPO,
        ["--guard_reward_model_name_or_path={bad}/other_tokenizer"],
        ["--guard_reward_model_name_or_path", "another tokenizer or chat template"],
    ),
    "a base model as second reward model": (
        PPO,
        ["--guard_reward_model_name_or_path={folder}/base"],
        ["--guard_reward_model_name_or_path", "score.weight", "step 2"],
    ),
    "no reward function": (
        PPO,
        ["--reward_function={bad}/rules.py:score"],
        ["--reward_function", "no function 'score' (found: scores)"],
    ),
    "no statistics": (PPO, ["--normalize_scores"], ["--normalize_scores", "manifest.json"]),
}


@pytest.mark.slow
def test_a_function_scores_in_place_of_a_reward_model_and_the_critic_starts_from_the_actor(folder):
    """One bad answer a batch raises: it is named, counted, and ends nothing."""
    rule = folder / "rule.py"
    rule.write_text(
        "def start(prompts, answers, chosen):\n"
        "    if any('nine' in right for right in chosen):\n"
        "        raise ValueError('nine is too much')\n"
        "    return [float(answer[:1] == right[:1]) for answer, right in zip(answers, chosen)]\n"
    )
    models = [f"--actor_model_name_or_path={folder / 'base'}", f"--reward_function={rule}:start"]
    small = ["--max_answer_seq_len=8", "--num_warmup_steps=0", "--data_split=0,0,1", *ppo_batch(8)]
    told = python(PPO, *flags(folder, "ppo_rule", *models, *small), cwd=folder).stdout
    assert "loading the reward model" not in told
    assert told.count("reward start: ValueError: nine is too much (rule.py:3); answer") == 1
    before, *steps = lines(folder / "ppo_rule")
    assert before["eval_score"] == pytest.approx(before["eval_score_start"])
    for line in steps:
        assert line["score"] == pytest.approx(line["score_start"])
        assert math.isfinite(line["value_loss"])
    assert 0 < sum(line["reward_errors_start"] for line in steps) < 8 * len(steps) / 2  # a quarter has it
    AutoModelForSequenceClassification.from_pretrained(folder / "ppo_rule" / "critic")
    AutoModelForCausalLM.from_pretrained(folder / "ppo_rule" / "actor")


@pytest.mark.slow
def test_an_endpoint_that_is_not_there_ends_the_run_with_one_message(folder):
    models = [f"--actor_model_name_or_path={folder / 'base'}", "--reward_endpoint=http://127.0.0.1:9/score"]
    rest = ["--max_answer_seq_len=4", "--data_split=0,0,1", "--reward_endpoint_retries=1", *ppo_batch(4)]
    no_critic = ["--advantage_estimator=rloo", "--num_samples_per_prompt=2"]
    argv = flags(folder, "unserved", *models, *rest, *no_critic)
    result = python(PPO, *argv, cwd=folder, check=False, env={"no_proxy": "127.0.0.1"})
    assert result.returncode == 2
    assert "as large as the actor" in result.stdout
    assert "attempt 2 of 2 in 1 s" in result.stdout
    assert "Traceback" not in result.stderr
    assert "error: --reward_endpoint http://127.0.0.1:9/score: " in result.stderr
    assert "refused, 2 times in a row" in result.stderr
    assert not (folder / "unserved" / "summary.json").exists()


@pytest.mark.slow
def test_a_reward_model_of_another_family_tokenizer_and_template_serves(folder):
    """It reads text, and the critic starts from the actor."""
    other = tiny_tokenizer(["another vocabulary"], bos=True)
    other.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    base = save_tiny_model(folder / "gpt2_base", "gpt2", tokenizer=other)
    save_reward_model(base, folder / "gpt2_reward")
    outputs = [f"{folder}/other_{ranks}" for ranks in (1, 2)]
    told = ""
    for ranks, output in zip((1, 2), outputs, strict=True):
        flags = [*ppo(folder, output, "base", "gpt2_reward"), "--dtype=fp32"]
        flags += [f"--guard_reward_model_name_or_path={folder / 'gpt2_reward'}"]
        sizes = [f"--per_device_{name}_batch_size={8 // ranks}" for name in ("generation", "training")]
        told = python(PPO, *flags, *sizes, ranks=ranks, cwd=folder).stdout
    assert "the critic starts from the actor with a fresh head" in told
    (before, *one), (before_on_two, *two) = (lines(Path(output)) for output in outputs)
    assert before_on_two["eval_score"] == pytest.approx(before["eval_score"], abs=1e-4)
    assert before["eval_guard_score"] == pytest.approx(before["eval_score"], abs=1e-6)  # it reads likewise
    assert one[0]["first_minibatch_ratio_error"] == 0
    for name in ("score", "kl", "value_loss", "policy_loss", "score_std"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=1e-4)
    config = AutoModelForSequenceClassification.from_pretrained(f"{outputs[0]}/critic").config
    assert config.model_type == "llama"
    card = Path(outputs[0], "critic", "README.md").read_text(encoding="utf-8")
    assert f"from `{folder / 'base'}` with dschat" in card  # the actor, where the critic started


@pytest.fixture(scope="module")
def bad(folder) -> Path:
    bad = folder / "bad"
    bad.mkdir()
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (bad / "malformed.jsonl").write_text(good + '{"prompt": "d",\n')
    (bad / "no_answer.jsonl").write_text(good + '{"prompt": "d", "chosen": "", "rejected": "c"}\n')
    (bad / "file").write_text("")
    (bad / "rules.py").write_text("def scores(prompts, answers):\n    return [1.0] * len(answers)\n")
    (bad / "empty_model").mkdir()
    (bad / "empty_model" / "config.json").write_text((folder / "base" / "config.json").read_text())
    other = AutoTokenizer.from_pretrained(folder / "base")
    other.add_tokens(["<|another|>"])
    save_reward_model(save_tiny_model(bad / "base", tokenizer=other), bad / "other_tokenizer")
    save_reward_model(folder / "base", bad / "reward")
    save_tiny_model(bad / "gpt2", "gpt2")
    return bad


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_message_before_a_model_is_loaded(name, folder, bad):
    program, extra, parts = BAD_INPUT[name]
    usual = (
        ppo(folder, "unused", "base", "bad/reward")
        if program == PPO
        else supervised(folder, "unused", "--data_split=1,1,1")
    )
    result = python(
        program, *usual, *(e.format(bad=bad, folder=folder) for e in extra), check=False, cwd=folder
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert "loading the" not in result.stdout
    assert "peak: " not in result.stdout
    message = result.stderr[result.stderr.index("error:") :]
    for part in parts:
        assert part in message


@pytest.mark.slow
def test_debug_shows_the_traceback(folder):
    result = python(SFT, *supervised(folder, "unused", "--data_path=gone.jsonl", "--debug"), check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.slow
def test_ppo_without_a_critic_and_with_text_beside_it(one_rank):
    """With all that has metrics of its own; with the run that has a critic these are all in the registry."""
    rule = one_rank / "length.py"
    rule.write_text("def length(prompts, answers):\n    return [len(answer) / 9 for answer in answers]\n")
    text = one_rank / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall.\n" for n in range(200)))
    result = python(
        PPO,
        *ppo(one_rank, "grpo", "sft", "reward", *ppo_batch(8), "--max_prompt_seq_len=64"),
        *("--advantage_estimator=grpo", "--num_samples_per_prompt=4", "--score_normalization=running"),
        *("--kl_in=loss", "--rollout_correction=tis", f"--reward_function={rule}:length"),
        f"--guard_reward_model_name_or_path={one_rank / 'reward'}",
        *("--kl_target=1", f"--unsupervised_dataset_name={text}", "--unsup_coef=1"),
        cwd=one_rank,
    )
    assert "no critic: --advantage_estimator grpo needs none" in result.stdout
    assert not (one_rank / "grpo" / "critic").exists()
    AutoModelForCausalLM.from_pretrained(one_rank / "grpo" / "actor")
    _, first, *_, last = lines(one_rank / "grpo")
    assert first["first_minibatch_ratio_error"] == last["first_minibatch_ratio_error"] == 0
    assert last["unsup_loss"] < first["unsup_loss"]
    assert last["kl_coef"] != first["kl_coef"]
    assert unwritten_metrics("rlhf", one_rank / "ppo", one_rank / "grpo") == []
