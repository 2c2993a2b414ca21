from types import SimpleNamespace

import pytest
import torch
from scripted_backend import END, PAD, ScriptedBackend, prompts

from dschat.errors import UserError
from dschat.rlhf.phase_times import PhaseTimes
from dschat.rlhf.rollout.agreement import RolloutCheck
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.sampler import CheckedSampler, RolloutSampler

SAMPLING = Sampling(max_answer_length=2, with_logprobs=True, seed=3)
TRAINED = torch.tensor([[-1.0, -2.0]])
SOUND = [[(7, -1.0), (END, -2.0)]]
APART = [[(8, -1.5), (END, -2.5)]]  # by 0.5 for each token


def checked(backend: ScriptedBackend, on_mismatch: str | None = "uncached") -> CheckedSampler:
    """A sampler whose answers all have the log-probabilities `TRAINED` under the training model."""

    def analyze(rollout: RolloutBatch, ppo_step: int) -> SimpleNamespace:
        return SimpleNamespace(logprobs=TRAINED, ppo_step=ppo_step)

    check = RolloutCheck(0.1, on_mismatch, engine=backend.name) if on_mismatch else None
    return CheckedSampler(RolloutSampler(backend, SAMPLING, PAD), analyze, check, PhaseTimes())


def test_the_batches_of_a_rank_become_one_and_the_noise_has_the_ppo_step_in_its_key():
    backend = ScriptedBackend(SOUND, [[(9, -1.0)]])
    rollout = RolloutSampler(backend, SAMPLING, PAD).sample([prompts([5]), prompts([6, 6])], ppo_step=4)
    assert rollout.input_ids.tolist() == [[PAD, 5, 7, END], [6, 6, 9, PAD]]
    assert [(sampling.seed, sampling.ppo_step) for sampling, _ in backend.calls] == [(3, 4), (3, 4)]


def test_answers_that_agree_are_taken_and_the_check_is_made_once(capsys):
    sampler = checked(ScriptedBackend(SOUND, APART), "stop")
    rollout, analysis = sampler.sample_and_analyze([prompts([5])], ppo_step=2)
    assert (rollout.answers.tolist(), analysis.ppo_step) == ([[7, END]], 2)
    assert "rollout check: the script against the training model over 2 tokens" in capsys.readouterr().out
    rollout, _ = sampler.sample_and_analyze([prompts([5])], ppo_step=3)
    assert rollout.answers.tolist() == [[8, END]]
    assert not capsys.readouterr().out


def test_answers_that_disagree_are_made_again_without_a_cache():
    backend = ScriptedBackend(APART, SOUND, APART)
    sampler = checked(backend)
    assert sampler.sample_and_analyze([prompts([5])], ppo_step=0)[0].answers.tolist() == [[7, END]]
    assert [cache for _, cache in backend.calls] == [True, False]
    assert sampler.sample_and_analyze([prompts([5])], ppo_step=1)[0].answers.tolist() == [[8, END]]


def test_evaluations_are_checked_every_time_and_say_nothing_where_all_is_well(capsys):
    backend = ScriptedBackend(SOUND, SOUND, APART)
    check = RolloutCheck(0.1, "stop", engine=backend.name, is_quiet=True)

    def analyze(rollout: RolloutBatch, ppo_step: int) -> SimpleNamespace:
        return SimpleNamespace(logprobs=TRAINED, ppo_step=ppo_step)

    sampler = CheckedSampler(
        RolloutSampler(backend, SAMPLING, PAD), analyze, check, PhaseTimes(), every_time=True
    )
    for _ in range(2):
        sampler.sample_and_analyze([prompts([5])], ppo_step=-1)
        assert check.difference.mean == 0
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="the script and the training model disagree"):
        sampler.sample_and_analyze([prompts([5])], ppo_step=-1)
    assert check.difference.mean == pytest.approx(0.5)


def test_a_run_resumed_without_a_cache_is_checked_without_one():
    backend = ScriptedBackend(APART)
    backend.uses_cache = False
    with pytest.raises(UserError, match="The KV cache is not to blame"):
        checked(backend).sample_and_analyze([prompts([5])], ppo_step=0)


def test_a_back_end_that_disagrees_stops_the_run_by_its_name():
    with pytest.raises(UserError, match="the script and the training model disagree"):
        checked(ScriptedBackend(APART), "stop").sample_and_analyze([prompts([5])], ppo_step=0)


def test_without_a_check_any_answers_are_taken():
    rollout, _ = checked(ScriptedBackend(APART), None).sample_and_analyze([prompts([5])], ppo_step=0)
    assert rollout.answers.tolist() == [[8, END]]
