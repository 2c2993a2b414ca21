import math
from dataclasses import replace

import pytest
import torch
from experiences import build_experience

from dschat.arguments import PpoArguments
from dschat.rlhf.experience import (
    AnswerAnalysis,
    Experience,
    MinibatchSampler,
    ScoreShaping,
    masked_variance,
)
from dschat.rlhf.rollout.batch import RolloutBatch

NUM_ROWS, PROMPT, ANSWER = 12, 3, 4
LENGTHS = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1, 4, 4, 2, 3])


def schedule(micro_batch_size=3, accumulation_steps=1, world_size=1, rank=0) -> MinibatchSampler:
    return MinibatchSampler(micro_batch_size, accumulation_steps, world_size, rank, seed=0)


def make_rollout() -> RolloutBatch:
    answer_mask = torch.arange(ANSWER) < LENGTHS[:, None]
    return RolloutBatch(
        input_ids=torch.arange(NUM_ROWS * (PROMPT + ANSWER)).view(NUM_ROWS, -1),
        attention_mask=torch.cat([torch.ones(NUM_ROWS, PROMPT).long(), answer_mask.long()], dim=1),
        answer_mask=answer_mask,
        ended=LENGTHS < ANSWER,
        prompt_rows=torch.arange(NUM_ROWS),
        prompt_length=PROMPT,
    )


def make_judgement() -> AnswerAnalysis:
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy, ref_logprobs, values = torch.randn(4, NUM_ROWS, ANSWER, generator=generator)
    scores = torch.randn(NUM_ROWS, generator=generator) * 4
    return AnswerAnalysis(logprobs, entropy, ref_logprobs, values, scores)


def make_experience(**settings) -> Experience:
    args = PpoArguments(kl_coef=0.2, **settings)
    shaping = ScoreShaping(clip=args.reward_clip, missing_eos_penalty=args.missing_eos_penalty)
    return build_experience(make_rollout(), make_judgement(), args, schedule(), shaping, ppo_step=3)


def test_scores_are_normalised_then_clipped_then_penalised():
    shaping = ScoreShaping(clip=2, missing_eos_penalty=0.5, mean=1, std=2)
    scores, ended = torch.tensor([2.0, 9.0, 9.0, -9.0]), torch.tensor([True, True, False, False])
    # (2-1)/2 = 0.5; (9-1)/2 = 4 -> 2; the same less 0.5; (-9-1)/2 = -5 -> -2 less 0.5
    assert shaping(scores, ended).tolist() == [0.5, 2, 1.5, -2.5]
    assert shaping.is_clipped(scores).tolist() == [False, True, True, True]


def test_a_clip_of_zero_clips_nothing():
    shaping = ScoreShaping(clip=0, missing_eos_penalty=0)
    scores = torch.tensor([100.0, 0.0])
    assert shaping(scores, torch.tensor([True, True])).tolist() == [100, 0]
    assert not shaping.is_clipped(scores).any()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_row_is_learned_from_exactly_once_a_pass(epoch):
    steps = schedule().optimizer_steps(LENGTHS, ppo_step=0, epoch=epoch)
    assert sorted(torch.cat(steps).tolist()) == list(range(NUM_ROWS))
    assert [len(rows) for rows in steps] == [3, 3, 3, 3]


def test_every_pass_and_every_ppo_step_has_a_permutation_of_its_own():
    orders = {
        tuple(torch.cat(schedule().optimizer_steps(LENGTHS, ppo_step=s, epoch=e)).tolist())
        for s in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation_steps", "world_size"),
    [(1, 6, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3), (1, 2, 3)],
)
def test_an_optimiser_step_holds_the_same_rows_however_it_is_divided(
    micro_batch_size, accumulation_steps, world_size
):
    whole = schedule(micro_batch_size=6).optimizer_steps(LENGTHS, ppo_step=1, epoch=0)
    parts = [schedule(micro_batch_size, accumulation_steps, world_size, rank) for rank in range(world_size)]
    for number, rows in enumerate(whole):
        held = []
        for part in parts:
            step_rows = part.optimizer_steps(LENGTHS, ppo_step=1, epoch=0)[number]
            micro_batches = part.micro_batches(step_rows)
            assert [len(m) for m in micro_batches] == [micro_batch_size] * accumulation_steps
            held += torch.cat(micro_batches).tolist()
        assert sorted(held) == sorted(rows.tolist())


def test_minibatches_carry_the_numbers_of_their_rows_and_the_token_count_of_all_ranks():
    experience = make_experience()
    minibatches = list(experience.minibatches(0))
    assert [m.is_first for m in minibatches] == [True, False, False, False]
    assert sum(m.num_tokens for m in minibatches) == LENGTHS.sum()
    for minibatch in minibatches:
        (part,) = minibatch.micro_batches
        rows = part.rollout.input_ids[:, 0] // (PROMPT + ANSWER)
        width = LENGTHS[rows].max()
        assert part.rollout.answer_mask.shape[1] == width
        assert minibatch.num_tokens == LENGTHS[rows].sum()
        assert torch.equal(part.returns, experience.returns[rows, :width])
        assert torch.equal(part.logprobs, experience.analysis.logprobs[rows, :width])


def test_a_later_pass_is_never_called_the_first():
    assert not any(m.is_first for m in make_experience().minibatches(1))


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_whole_batch():
    experience = make_experience()
    valid = experience.advantages[experience.rollout.answer_mask]
    assert valid.mean().item() == pytest.approx(0, abs=1e-6)
    assert valid.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not experience.advantages[~experience.rollout.answer_mask].any()


def test_returns_are_taken_before_whitening():
    whitened, plain = make_experience(), make_experience(whiten_advantages=False)
    assert torch.equal(whitened.returns, plain.returns)
    assert torch.equal(plain.advantages, plain.raw_advantages)


def test_the_score_reaches_the_last_token_of_every_row():
    # gamma = lambda = 1 and values 0: the return at the last token is its reward alone
    args = PpoArguments(gae_lambda=1.0, kl_coef=0.0, reward_clip=0.0)
    judgement = replace(make_judgement(), values=torch.zeros(NUM_ROWS, ANSWER))
    shaping = ScoreShaping(clip=0, missing_eos_penalty=0)
    experience = build_experience(make_rollout(), judgement, args, schedule(), shaping, ppo_step=0)
    last = experience.returns[torch.arange(NUM_ROWS), LENGTHS - 1]
    torch.testing.assert_close(last, judgement.scores)


def test_with_kl_in_the_loss_the_rewards_are_the_scores_alone():
    experience = make_experience(kl_in="loss", gamma=1.0, gae_lambda=1.0, reward_clip=0.0)
    mask, scores = experience.rollout.answer_mask, experience.analysis.scores
    torch.testing.assert_close(experience.returns, scores[:, None] * mask)
    assert experience.metrics()["kl_coef"] == 0.2  # it multiplies the loss's term


def test_a_steered_kl_coefficient_takes_the_place_of_the_flag():
    args, shaping = PpoArguments(kl_coef=0.2), ScoreShaping(clip=0, missing_eos_penalty=0)
    build = (make_rollout(), make_judgement(), args, schedule(), shaping)
    steered = build_experience(*build, ppo_step=0, kl_coef=0.3)
    assert steered.metrics()["kl_coef"] == 0.3
    assert [m.kl_coef for m in steered.minibatches(0)] == [0.3] * 4
    assert not torch.equal(steered.returns, build_experience(*build, ppo_step=0).returns)


GROUPS = torch.tensor([0, 1, 2, 3] * 3)


def without_critic(**settings) -> Experience:
    args = PpoArguments(kl_coef=0.2, reward_clip=0.0, **settings)
    rollout, judgement = replace(make_rollout(), prompt_rows=GROUPS), replace(make_judgement(), values=None)
    shaping = ScoreShaping(clip=0, missing_eos_penalty=0)
    return build_experience(rollout, judgement, args, schedule(), shaping, ppo_step=0)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_rloo_compares_the_scores_less_the_kl_penalty_that_stands_in_the_rewards(kl_in):
    experience = without_critic(advantage_estimator="rloo", kl_in=kl_in)
    judged, mask = experience.analysis, experience.rollout.answer_mask
    earned = judged.scores.clone()
    if kl_in == "reward":
        earned -= 0.2 * ((judged.logprobs - judged.ref_logprobs) * mask).sum(dim=1)
    for row in range(NUM_ROWS):
        others = [other for other in range(NUM_ROWS) if other != row and GROUPS[other] == GROUPS[row]]
        expected = (earned[row] - earned[others].mean()) * mask[row]
        torch.testing.assert_close(experience.advantages[row], expected, atol=1e-5, rtol=1e-5)


def test_grpo_compares_the_scores_and_has_its_kl_in_the_loss():
    experience = without_critic(advantage_estimator="grpo")
    scores, mask = experience.analysis.scores, experience.rollout.answer_mask
    for group in range(4):
        rows = group == GROUPS
        expected = (scores[rows] - scores[rows].mean()) / scores[rows].std(unbiased=False)
        torch.testing.assert_close(experience.advantages[rows], expected[:, None] * mask[rows])


def test_reinforce_pp_whitens_the_returns_of_all_tokens():
    experience = without_critic(advantage_estimator="reinforce++")
    mask = experience.rollout.answer_mask
    assert torch.equal(experience.raw_advantages, experience.returns)
    returns = experience.returns[mask]
    expected = (returns - returns.mean()) / returns.std(unbiased=False)
    torch.testing.assert_close(experience.advantages[mask], expected)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_without_a_critic_nothing_is_said_of_one(estimator):
    experience = without_critic(advantage_estimator=estimator)
    assert "explained_variance" not in experience.metrics()
    assert all(m.micro_batches[0].values is None for m in experience.minibatches(0))


def test_metrics_of_a_batch_worked_out_by_hand():
    # two answers of two and one tokens; log-ratios to the reference (0.5, -0.1) and (0.2)
    rollout = RolloutBatch(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        answer_mask=torch.tensor([[True, True], [True, False]]),
        ended=torch.tensor([True, False]),
        prompt_rows=torch.arange(2),
        prompt_length=1,
    )
    judgement = AnswerAnalysis(
        logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 7.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.9], [-3.2, 0.0]]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, 100.0]]),
        values=torch.zeros(2, 2),
        scores=torch.tensor([6.0, 2.0]),
    )
    args = PpoArguments(kl_coef=0.5, gae_lambda=1.0)
    shaping = ScoreShaping(clip=5, missing_eos_penalty=0)
    metrics = build_experience(rollout, judgement, args, schedule(2), shaping, ppo_step=0).metrics()
    assert metrics["score"] == 4
    assert metrics["score_clipped_share"] == 0.5
    assert metrics["kl"] == pytest.approx((0.4 + 0.2) / 2)
    # exp(-k1) - 1 + k1: 0.1065307 + 0.0051709 and 0.0187308
    assert metrics["k3"] == pytest.approx((0.1117016 + 0.0187308) / 2, abs=1e-6)
    assert metrics["score_minus_kl"] == pytest.approx(4 - 0.5 * 0.3)
    assert metrics["entropy"] == 2
    assert (metrics["answer_length"], metrics["eos_share"]) == (1.5, 0.5)
    # rewards: -0.25, 0.05 + 5; and -0.1 + 2: returns 4.8, 5.05, 1.9
    assert metrics["return_mean"] == pytest.approx((4.8 + 5.05 + 1.9) / 3)
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6)


def test_masked_variance_is_the_populations():
    assert masked_variance(torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[1, 1, 0]])).item() == 4


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce++"])
def test_tokens_are_weighed_by_training_over_sampling_probability_with_any_estimator(estimator):
    judgement, ratios = make_judgement(), torch.tensor([0.5, 1.0, 3.0, 1.2])
    rollout = replace(
        make_rollout(), logprobs=judgement.logprobs - ratios.log(), prompt_rows=torch.arange(NUM_ROWS) // 2
    )
    args = PpoArguments(advantage_estimator=estimator, rollout_correction="tis", tis_cap=2.0)
    shaping = ScoreShaping(clip=0, missing_eos_penalty=0)
    experience = build_experience(rollout, judgement, args, schedule(), shaping, ppo_step=3)
    expected = torch.tensor([0.5, 1.0, 2.0, 1.2]).expand(NUM_ROWS, -1)
    mask = rollout.answer_mask
    torch.testing.assert_close(experience.weights, torch.where(mask, expected, 1))
    for minibatch in experience.minibatches(0):
        (part,) = minibatch.micro_batches
        rows = part.rollout.input_ids[:, 0] // (PROMPT + ANSWER)
        assert torch.equal(part.weights, experience.weights[rows, : part.rollout.answer_mask.shape[1]])
    # 12, 10, 7 and 4 answers reach the first to the fourth token
    metrics = experience.metrics()
    assert metrics["tis_weight_mean"] == pytest.approx((12 * 0.5 + 10 + 7 * 2 + 4 * 1.2) / 33)
    assert metrics["tis_truncated_share"] == pytest.approx(7 / 33)
    assert metrics["rollout_logprob_diff_max"] == pytest.approx(math.log(3), abs=1e-5)
    apart = 12 * math.log(2) + 7 * math.log(3) + 4 * math.log(1.2)
    assert metrics["rollout_logprob_diff"] == pytest.approx(apart / 33, abs=1e-5)


def test_without_correction_nothing_is_weighed():
    experience = make_experience()
    assert experience.weights is None
    assert not [name for name in experience.metrics() if name.startswith(("tis", "rollout"))]


def test_a_score_that_is_not_finite_becomes_the_mean_of_the_others():
    nothing = torch.zeros(4, 1)
    scores = torch.tensor([1.0, torch.inf, 4.0, torch.nan])
    finite, num_bad = AnswerAnalysis(nothing, nothing, nothing, None, scores).with_finite_scores()
    assert finite.scores.tolist() == [1.0, 2.5, 4.0, 2.5]
    assert num_bad == 2


def test_where_no_score_is_finite_they_stay_so_that_every_update_is_skipped():
    nothing = torch.zeros(2, 1)
    judgement, num_bad = AnswerAnalysis(
        nothing, nothing, nothing, None, torch.tensor([torch.nan, -torch.inf])
    ).with_finite_scores()
    assert num_bad == 2
    assert not judgement.scores.isfinite().any()
