import math

import pytest
import torch

from dschat.rlhf.rollout.keyed_sampling import (
    KeyedGumbelNoise,
    LogprobRecorder,
    gumbel_noise,
    row_keys,
    sampling_processors,
)


def keys(*prompts: int, sample: int = 0, seed: int = 1, ppo_step: int = 0) -> torch.Tensor:
    samples = torch.full((len(prompts),), sample)
    return row_keys(torch.tensor(prompts), samples, seed=seed, ppo_step=ppo_step)


def test_noise_of_a_row_does_not_depend_on_its_batch_or_place():
    batch = gumbel_noise(keys(11, 22, 33), 4, 100)
    alone = gumbel_noise(keys(33), 4, 100)
    assert torch.equal(batch[2], alone[0])


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"ppo_step": 1}, {"sample": 1}, {"seed": 1 + 2**32}, {"sample": 2**32}]
)
def test_noise_depends_on_seed_step_and_sample(other):
    assert not torch.equal(gumbel_noise(keys(11), 0, 50), gumbel_noise(keys(11, **other), 0, 50))


def test_noise_depends_on_both_halves_of_the_prompt_key_and_on_the_position():
    noise = gumbel_noise(keys(11, 12, 11 + 2**32, -11), 0, 50)
    assert len({tuple(row) for row in noise.tolist()}) == 4
    assert not torch.equal(noise, gumbel_noise(keys(11, 12, 11 + 2**32, -11), 1, 50))


def test_noise_is_finite_and_has_the_moments_of_gumbel():
    noise = gumbel_noise(keys(*range(200)), 3, 5000)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_the_largest_noise_reaches_far_enough_for_rare_tokens():
    # A million draws should exceed ln(10^6) = 13.8 with probability 1 - 1/e; all of ten must come near.
    largest = [gumbel_noise(keys(*range(200)), position, 5000).max().item() for position in range(10)]
    assert min(largest) > 11.5
    assert max(largest) > 14


def test_draws_follow_the_softmax():
    logits = torch.linspace(-3, 3, 64)
    counts = torch.zeros(64)
    for position in range(50):
        scores = KeyedGumbelNoise(keys(*range(1000)), 0)(torch.zeros(1000, position), logits.expand(1000, -1))
        counts += torch.bincount(scores.argmax(dim=1), minlength=64)
    expected = torch.softmax(logits, 0) * 50_000
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared / 63 < 1.6  # 1.6 is beyond the 99.8th percentile with 63 degrees of freedom


def test_neighbouring_rows_and_positions_are_uncorrelated():
    noise = gumbel_noise(keys(*range(100)), 0, 2000)
    later = gumbel_noise(keys(*range(100)), 1, 2000)
    for one, two in ((noise[:-1], noise[1:]), (noise, later), (noise[:, :-1], noise[:, 1:])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].item()
        assert abs(correlation) < 0.01  # 2.2 standard errors of 200,000 draws are 0.005


def test_the_position_counts_from_the_end_of_the_prompt():
    noise = KeyedGumbelNoise(keys(7), prompt_length=5)(torch.zeros(1, 8), torch.zeros(1, 40))
    assert torch.equal(noise, gumbel_noise(keys(7), 3, 40))


def test_top_k_and_top_p_forbid_what_they_should():
    # softmax of these logits: 0.5, 0.25, 0.15, 0.10
    logits = torch.tensor([0.5, 0.25, 0.15, 0.10]).log().expand(500, -1)
    prompts = torch.zeros(500, 3)

    def drawn(**settings) -> set[int]:
        processors = sampling_processors(
            keys(*range(500)), prompt_length=3, num_tokens=4, temperature=1.0, **settings
        )
        return set(processors(prompts, logits).argmax(dim=1).tolist())

    assert drawn(top_k=0, top_p=1.0) == {0, 1, 2, 3}
    assert drawn(top_k=2, top_p=1.0) == {0, 1}
    assert drawn(top_k=0, top_p=0.8) == {0, 1, 2}


def test_a_low_temperature_is_nearly_greedy():
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(300, -1)
    processors = sampling_processors(
        keys(*range(300)), prompt_length=0, num_tokens=3, temperature=0.05, top_k=0, top_p=1.0
    )
    assert set(processors(torch.zeros(300, 0), logits).argmax(dim=1).tolist()) == {0}


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    logits = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(300, 1)  # the tokenizer has two tokens
    settings = {"prompt_length": 0, "num_tokens": 2, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    processors = sampling_processors(keys(*range(300)), **settings)
    assert set(processors(torch.zeros(300, 0), logits).argmax(dim=1).tolist()) == {0, 1}


def test_a_recorder_scores_each_token_by_the_step_that_sampled_it():
    recorder = LogprobRecorder()
    prompt = torch.tensor([[9], [9]])
    # row 0 samples 0 then 1, row 1 samples 1 then 0: probabilities 3/4, 1/2 and 1/4, 1/2
    recorder(prompt, torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log())
    recorder(torch.tensor([[9, 0], [9, 1]]), torch.zeros(2, 2))
    logprobs = recorder.of(torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.75, 0.5], [0.25, 0.5]]))


def test_a_recorder_sees_the_temperature_but_no_filter():
    recorder = LogprobRecorder()
    settings = {"prompt_length": 1, "num_tokens": 2, "temperature": 0.5, "top_k": 1, "top_p": 0.1}
    processors = sampling_processors(keys(1), recorder=recorder, **settings)
    processors(torch.tensor([[9]]), torch.tensor([[3.0, 1.0, 50.0]]).log())  # the third is no token
    # squared: 9 and 1
    assert recorder.of(torch.tensor([[1]])).exp().item() == pytest.approx(0.1)
