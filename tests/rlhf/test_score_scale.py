import math

import pytest
import torch

from dschat.arguments import PpoArguments
from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.score_scale import NonFiniteScores, ScoreScale

ENDED = torch.tensor([True, True])
RUNNING = PpoArguments(score_normalization="running", reward_clip=0.0)


def shaped(scale: ScoreScale, *scores: float) -> list[float]:
    values = torch.tensor(scores)
    return scale.shaping_of(values)(values, ENDED).tolist()


def test_running_statistics_count_a_batch_in_before_it_is_shaped():
    scale = ScoreScale(RUNNING)
    assert shaped(scale, 1.0, 3.0) == [-1, 1]  # mean 2, std 1
    # 1 3 8 8: mean 5, variance (16 + 4 + 9 + 9) / 4
    assert shaped(scale, 8.0, 8.0) == [pytest.approx(3 / 9.5**0.5)] * 2


def test_running_statistics_go_on_after_a_checkpoint():
    first, second = ScoreScale(RUNNING), ScoreScale(RUNNING)
    shaped(first, 1.0, 3.0)
    second.load_state(first.state())
    assert shaped(second, 8.0, 8.0) == shaped(first, 8.0, 8.0)


def test_scores_that_are_all_not_finite_are_not_counted_in():
    scale = ScoreScale(RUNNING)
    scale.shaping_of(torch.tensor([math.nan, math.nan]))
    assert scale.state()["count"] == 0


def test_the_scale_of_step_2_is_for_the_reward_model_alone():
    args = PpoArguments(reward_clip=0.0)
    assert shaped(ScoreScale(args, (1.0, 2.0)), 5.0, 1.0) == [2, 0]
    assert shaped(ScoreScale(args, (1.0, 2.0), has_sources=True), 5.0, 1.0) == [5, 1]
    assert ScoreScale(args).state() is None


def test_scores_that_are_not_finite_are_counted_and_warned_of_once(capsys):
    nothing = torch.zeros(3, 1)
    analysis = AnswerAnalysis(nothing, nothing, nothing, None, torch.tensor([1.0, math.inf, 3.0]))
    scores = NonFiniteScores()
    for _ in range(2):
        replaced, num_bad = scores.replaced(analysis, ppo_step=4)
        assert (replaced.scores.tolist(), num_bad) == ([1, 2, 3], 1)
    assert capsys.readouterr().out.count("WARNING: PPO step 4: 1 of 3 scores are not finite.") == 1
