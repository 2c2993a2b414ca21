"""The registry of metrics: `tests/steps` compares it with what the steps write."""

import math
import re

import pytest

from dschat.arguments import flags_of
from dschat.runs.registry import METRICS, STEPS, metric


def test_a_name_is_one_metric_in_each_step():
    for step in STEPS:
        entries = [entry for entry in METRICS if step in entry.steps]
        for values in ([e.name for e in entries], [e.meaning for e in entries], [e.tag for e in entries]):
            assert sorted(set(values)) == sorted(values)


def test_the_flags_that_remedies_name_are_those_of_the_steps():
    for entry in METRICS:
        text = f"{entry.meaning} {entry.healthy} {entry.remedy}"
        for name in re.findall(r"--(\w+)", text):
            assert all(name in flags_of(step) for step in entry.steps), f"{entry.name}: --{name}"


def test_the_metrics_that_remedies_name_are_written_by_the_same_steps():
    for entry in METRICS:
        for name in re.findall(r"`(\w+)`", f"{entry.meaning} {entry.healthy} {entry.remedy}"):
            assert all(metric(name, step) for step in entry.steps)


def test_a_name_that_steps_share_is_looked_up_by_step():
    assert metric("loss", "sft").unit == "nats per token"
    assert metric("loss", "reward").unit == "nats per pair"
    assert metric("score_std", "reward").group == "eval"
    assert metric("score_std", "rlhf").group == "rollout"


def test_sources_of_scores_have_names_of_their_own():
    assert metric("score_exact", "rlhf").tag == "rollout/score_exact"
    assert metric("eval_score_exact", "rlhf").tag == "eval/score_exact"
    assert metric("eval/loss", "sft").tag == "eval_command/loss" != metric("eval_loss", "sft").tag
    assert metric("reward_errors_exact").meaning == metric("reward_errors_NAME").meaning
    with pytest.raises(KeyError, match="'accuracy_of_life' of step None has no entry"):
        metric("accuracy_of_life")


def test_values_are_healthy_within_the_bounds_and_finite():
    assert [metric("clip_fraction").is_healthy(x) for x in (0.0, 0.3, 0.31, math.nan)] == [1, 1, 0, 0]
    assert metric("actor_grad_norm").tag == "actor/grad_norm"
    assert not metric("policy_loss").is_healthy(math.inf)
    assert metric("policy_loss").is_healthy(-3.0)
