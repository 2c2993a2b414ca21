"""Evaluations of PPO: the same figures on any ranks and in any batches, and what they mean."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python
from tiny import save_reward_model, save_tiny_model

from dschat.arguments import parse_arguments
from dschat.data.rows import Rows
from dschat.rlhf.experience import AnswerAnalysis, ScoreShaping
from dschat.rlhf.monitoring.evaluation import Evaluator, build_evaluator, samples_per_prompt

WORKER = ROOT / "tests" / "workers" / "evaluations.py"
FIGURES = {
    *("eval_score", "eval_score_stderr", "eval_kl", "eval_k3", "eval_score_minus_kl", "eval_entropy"),
    *("eval_objective", "eval_rollout_difference"),
    *(
        "eval_answer_length",
        "eval_eos_share",
        "eval_nonfinite_scores",
        "eval_guard_score",
        "eval_guard_score_stderr",
    ),
}
# Seven prompts fill no batch of 8, and on two ranks no equal parts: fillers are at work.
COMMON = {"num_eval_prompts": 7, "kl_coef": 0.5, "reward_clip": 0}
ONE_RANK = {**COMMON, "per_device_generation_batch_size": 8, "per_device_training_batch_size": 8}
TWO_RANKS = {**COMMON, "per_device_generation_batch_size": 4, "per_device_training_batch_size": 4}


def run(models: Path, settings: list[dict], *, ranks: int) -> list[list[dict]]:
    output = models / f"evaluations_of_{ranks}.json"
    python(WORKER, models, output, json.dumps(settings), ranks=ranks, timeout=600)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "actor", "llama")
    for seed, name in enumerate(("reward", "other_reward"), 1):
        save_tiny_model(folder / f"base_of_{name}", "llama", seed=seed)
        save_reward_model(folder / f"base_of_{name}", folder / name)
    return folder


@pytest.fixture(scope="module")
def one_rank(models) -> dict[str, list[dict]]:
    settings = {
        "plain": ONE_RANK,
        "in passes of two": {
            **ONE_RANK,
            "per_device_training_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
        "same reward model": {**ONE_RANK, "guard_reward_model_name_or_path": str(models / "reward")},
        "several answers": {**ONE_RANK, "eval_samples_per_prompt": 3},
        "shaped": {**ONE_RANK, "score_normalization": "running", "missing_eos_penalty": 3},
    }
    return dict(zip(settings, run(models, list(settings.values()), ranks=1), strict=True))


def untimed(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if not name.startswith("seconds")}


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert untimed(one) == pytest.approx(untimed(other), rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_the_promised_figures_are_there_and_finite(one_rank):
    for figures in one_rank["plain"]:
        assert untimed(figures).keys() == FIGURES
        assert all(map(math.isfinite, figures.values()))


@pytest.mark.slow
def test_a_policy_that_has_learned_nothing_has_no_kl_and_one_that_has_has(one_rank):
    before, after, _ = one_rank["plain"]
    assert before["eval_kl"] == before["eval_k3"] == 0
    assert after["eval_kl"] != 0
    assert after["eval_k3"] > 0


@pytest.mark.slow
def test_the_noise_of_all_evaluations_is_the_same(one_rank):
    _, after, again = one_rank["plain"]
    assert untimed(after) == untimed(again)


@pytest.mark.slow
def test_score_minus_kl_takes_the_beta_of_the_last_ppo_step_and_the_objective_the_first(one_rank):
    before, after, _ = one_rank["plain"]
    assert before["eval_score_minus_kl"] == before["eval_objective"] == before["eval_score"]
    for name in ("eval_score_minus_kl", "eval_objective"):  # a beta that is held
        assert after[name] == pytest.approx(after["eval_score"] - 0.5 * after["eval_kl"], abs=1e-6)


def test_a_steered_beta_moves_score_minus_kl_and_not_the_objective():
    kl, scores = torch.tensor([[0.5, 0.5], [2.0, 1.0]]), torch.tensor([3.0, 5.0])  # 1 and 3 nats, mean 2
    figures = {coef: evaluated(coef, scores, log_ratio=kl) for coef in (0.5, 4.0)}
    assert {coef: values["score_minus_kl"].item() for coef, values in figures.items()} == {
        0.5: 3.0,
        4.0: -4.0,
    }
    assert figures[0.5]["objective"] == figures[4.0]["objective"] == 4 - 0.5 * 2


@pytest.mark.slow
def test_the_objective_is_in_the_unit_that_ppo_learns_from(one_rank):
    before, after, _ = one_rank["shaped"]
    # Normalised by the first evaluation: its mean is 0, and what is left are the answers cut at the limit.
    assert before["eval_objective"] == pytest.approx(-3 * (1 - before["eval_eos_share"]), abs=1e-5)
    # The sample's std over sqrt 7; the population's is that of the sample times sqrt(6 / 7).
    std = before["eval_score_stderr"] * math.sqrt(6)
    moved = (after["eval_score"] - before["eval_score"]) / std
    penalty = 3 * (1 - after["eval_eos_share"])
    expected = moved - penalty - 0.5 * after["eval_kl"]
    assert after["eval_objective"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_second_reward_model_scores_the_same_answers(one_rank):
    for figures in one_rank["same reward model"]:
        assert figures["eval_guard_score"] == pytest.approx(figures["eval_score"], abs=1e-6)
        assert figures["eval_guard_score_stderr"] == pytest.approx(figures["eval_score_stderr"], abs=1e-6)
    assert one_rank["plain"][0]["eval_guard_score"] != pytest.approx(one_rank["plain"][0]["eval_score"])


def plain_evaluator() -> Evaluator:
    """One whose first beta is 0.5."""
    evaluator = Evaluator.__new__(Evaluator)
    evaluator._first_kl_coef = 0.5
    evaluator._shaping, evaluator._needs_scale = ScoreShaping(clip=0, missing_eos_penalty=0), False
    return evaluator


def evaluated(
    kl_coef: float,
    scores: torch.Tensor,
    *,
    log_ratio: torch.Tensor | None = None,
    real: list[bool] | None = None,
    evaluator: Evaluator | None = None,
) -> dict[str, torch.Tensor]:
    """The figures of answers of two tokens with these scores, each to a prompt of its own."""
    count = len(scores)
    mask = torch.ones(count, 2, dtype=torch.bool)
    rollout = SimpleNamespace(answer_mask=mask, ended=mask.all(dim=1), prompt_rows=torch.arange(count))
    reference = torch.zeros(count, 2)
    logprobs = reference if log_ratio is None else log_ratio
    judged = AnswerAnalysis(logprobs, reference, reference, None, scores)
    real = torch.tensor(real or [True] * count)
    return (evaluator or plain_evaluator())._of_answers(rollout, judged, real, kl_coef=kl_coef)


def test_a_score_that_is_not_finite_spoils_no_figure():
    evaluator = plain_evaluator()
    evaluator._needs_scale = True

    def figures(*scores: float) -> dict[str, torch.Tensor]:
        real = [True, True, True, False]
        return evaluated(0.5, torch.tensor(scores), real=real, evaluator=evaluator)

    nothing = figures(math.nan, math.nan, math.inf, 1.0)
    assert nothing["nonfinite_scores"] == 3
    assert evaluator._needs_scale  # there is nothing yet to bring scores to a scale by
    some = figures(1.0, math.nan, 3.0, math.inf)
    assert (some["score"], some["nonfinite_scores"]) == (2.0, 1)  # the last is a filler
    assert math.isfinite(some["objective"])


@pytest.mark.slow
def test_the_size_of_passes_changes_no_figure(one_rank):
    assert_same(one_rank["in passes of two"], one_rank["plain"])


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(models, one_rank):
    """Also where ZeRO-3 shards actor and reward models, and generation batches are small."""
    sharded = {"actor_zero_stage": 3, "critic_zero_stage": 3}
    small = {"per_device_generation_batch_size": 2, "generation_batches": 2}
    several = {**TWO_RANKS, "eval_samples_per_prompt": 3}
    *plain, several = run(models, [TWO_RANKS, {**TWO_RANKS, **sharded, **small}, several], ranks=2)
    for result in plain:
        assert_same(result, one_rank["plain"])
    assert_same(several, one_rank["several answers"])


@pytest.mark.slow
def test_several_answers_to_a_prompt_are_others(one_rank):
    once, several = one_rank["plain"][1], one_rank["several answers"][1]
    assert several["eval_score"] != pytest.approx(once["eval_score"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "num_held_out", "samples"),
    [("", 16, 1), ("", 200, 1), ("", 10, 2), ("", 3, 6), ("", 1, 8), ("--num_eval_prompts 100", 10, 8),
     ("--num_eval_prompts 10", 10, 1), ("--eval_samples_per_prompt 1", 3, 1),
     ("--eval_samples_per_prompt 9", 99, 9)],
)  # fmt: skip
def test_few_held_out_prompts_are_answered_several_times(flags, num_held_out, samples, capsys):
    """A PPO step samples 16 answers by default."""
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b"]
    args = parse_arguments("rlhf", [*models, *flags.split()])
    wanted = args.guard.num_eval_prompts or 16
    assert samples_per_prompt(args.guard.eval_samples_per_prompt, num_held_out, wanted) == samples
    is_told = samples > 1 and "samples" not in flags
    assert (f"answered {samples} times (--eval_samples_per_prompt)" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(("interval", "note"), [(10, "no prompts are held out (--eval_fraction"), (0, "")])
def test_without_held_out_prompts_or_interval_there_is_no_evaluator(interval, note, capsys):
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b"]
    args = parse_arguments("rlhf", [*models, f"--eval_interval={interval}"])
    rows = Rows.from_dict({"input_ids": [], "key": [], "length": []})
    assert build_evaluator(args, None, None, None, rows) is None
    assert note in capsys.readouterr().out
