import numpy as np
import pytest
import torch

from dschat.rlhf.rollout.keyed_sampling import BLOCK, KeyedDraws, TokenDraw, draw, keyed_uniforms, row_keys


def keys(*prompts: int, sample: int = 0, seed: int = 1, ppo_step: int = 0) -> torch.Tensor:
    samples = torch.full((len(prompts),), sample)
    return row_keys(torch.tensor(prompts), samples, seed=seed, ppo_step=ppo_step)


def uniforms(num_rows: int) -> torch.Tensor:
    return keyed_uniforms(keys(*range(num_rows)), 1)[:, 0]


def test_the_numbers_of_a_row_do_not_depend_on_its_batch_its_place_or_the_length_of_answers():
    batch = keyed_uniforms(keys(11, 22, 33), 9)
    alone = keyed_uniforms(keys(33), 5)
    assert torch.equal(batch[2, :5], alone[0])


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"ppo_step": 1}, {"sample": 1}, {"seed": 1 + 2**32}, {"sample": 2**32}]
)
def test_the_numbers_depend_on_seed_step_and_sample(other):
    assert not (keyed_uniforms(keys(11), 50) == keyed_uniforms(keys(11, **other), 50)).any()


def test_the_numbers_depend_on_both_halves_of_the_prompt_key_and_on_the_position():
    numbers = keyed_uniforms(keys(11, 12, 11 + 2**32, -11), 50)
    assert len(set(numbers.flatten().tolist())) == 200


def test_the_numbers_lie_inside_0_and_1_and_are_uniform():
    numbers = keyed_uniforms(keys(*range(1000)), 1000).flatten()
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=256, min=0, max=1)
    chi_squared = ((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum().item()
    assert 0.7 < chi_squared / 255 < 1.3  # 3.4 standard deviations of sqrt(2 / 255) = 0.089 on either side


def test_the_numbers_of_neighbouring_rows_and_positions_are_uncorrelated():
    numbers = keyed_uniforms(keys(*range(500)), 400)
    for one, two in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].item()
        assert abs(correlation) < 0.01  # 2.2 standard errors of 200,000 numbers are 0.005


def test_draws_follow_the_softmax():
    logits = torch.linspace(-3, 3, 300)  # of three blocks, the last not full
    rows = keyed_uniforms(keys(*range(1000)), 50).flatten()
    tokens, _ = TokenDraw(num_tokens=300)(logits.expand(50_000, -1), rows)
    expected = torch.softmax(logits.double(), 0) * 50_000
    chi_squared = ((torch.bincount(tokens, minlength=300) - expected) ** 2 / expected).sum().item()
    assert chi_squared / 299 < 1.25  # 3 standard deviations of sqrt(2 / 299) = 0.082


def test_a_token_is_the_first_up_to_which_the_probabilities_are_more_than_the_number():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])  # cumulative shares 0, 1/2, 1/2, 3/4, 1, 1

    def drawn(number: float) -> int:
        return draw(weights, torch.tensor([number], dtype=torch.float64))[0].item()

    assert [drawn(number) for number in (1e-300, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53)] == [1, 1, 3, 3, 4, 4]


def test_draws_are_those_of_numpy_s_running_sum():
    generator = np.random.default_rng(0)
    weights = generator.exponential(size=(400, 1000)) ** 6
    rows = uniforms(400)
    ours, totals = draw(torch.tensor(weights).float(), rows)
    sums = weights.astype(np.float32).astype(np.longdouble).cumsum(axis=1)
    theirs = [
        np.searchsorted(row, float(u) * row[-1], side="right") for row, u in zip(sums, rows, strict=True)
    ]
    assert ours.tolist() == theirs
    np.testing.assert_allclose(totals, sums[:, -1].astype(float), rtol=1e-14)


@pytest.mark.parametrize("number", [2.0**-53, 0.3, 1 - 2.0**-53])
def test_a_token_of_probability_0_is_never_drawn(number):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 1000, generator=generator) ** 20  # many of them far below the sums' last bits
    weights[torch.rand(200, 1000, generator=generator) < 0.5] = 0
    weights[:, :BLOCK] = 0
    weights[:, -BLOCK:] = 0
    tokens, _ = draw(weights, torch.full((200,), number, dtype=torch.float64))
    assert (weights[torch.arange(200), tokens] > 0).all()


def test_a_draw_depends_neither_on_its_batch_nor_on_what_pads_the_vocabulary():
    logits = torch.randn(64, 700, generator=torch.Generator().manual_seed(0)) * 3
    rows = uniforms(64)
    sample = TokenDraw(num_tokens=700, with_logprobs=True)
    tokens, logprobs = sample(logits, rows)
    wide, wide_logprobs = sample(torch.nn.functional.pad(logits, (0, 4000), value=9.0), rows)
    assert torch.equal(wide, tokens)
    assert torch.equal(wide_logprobs, logprobs)
    alone = [sample(logits[row : row + 1], rows[row : row + 1]) for row in range(64)]
    assert torch.equal(torch.cat([token for token, _ in alone]), tokens)
    assert torch.equal(torch.cat([logprob for _, logprob in alone]), logprobs)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.8)])
def test_top_k_and_top_p_forbid_what_they_should(top_k, top_p):
    # softmax of these logits: 0.5, 0.25, 0.15, 0.10
    logits = torch.tensor([0.5, 0.25, 0.15, 0.10]).log().expand(500, -1)
    tokens, _ = TokenDraw(num_tokens=4, top_k=top_k, top_p=top_p)(logits, uniforms(500))
    kept = 2 if top_k else 3 if top_p < 1 else 4
    assert set(tokens.tolist()) == set(range(kept))


def test_a_low_temperature_is_nearly_greedy():
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(300, -1)
    assert not TokenDraw(num_tokens=3, temperature=0.05)(logits, uniforms(300))[0].any()


@pytest.mark.parametrize("greedy", [True, False])
def test_log_probabilities_have_the_temperature_and_no_filter(greedy):
    # the third is no token; at temperature 0.5 the probabilities 3/4 and 1/4 become 9/10 and 1/10
    logits = torch.tensor([[3.0, 1.0, 50.0]]).log()
    for filters in ({}, {"top_k": 1, "top_p": 0.1}):
        one = TokenDraw(num_tokens=2, temperature=0.5, greedy=greedy, with_logprobs=True, **filters)
        tokens, logprobs = one(logits, torch.tensor([0.2], dtype=torch.float64))
        assert (tokens.tolist(), logprobs.exp().tolist()) == ([0], pytest.approx([0.9]))
    rare, logprobs = TokenDraw(num_tokens=2, temperature=0.5, with_logprobs=True)(
        logits, torch.tensor([0.95], dtype=torch.float64)
    )
    assert (rare.tolist(), logprobs.exp().tolist()) == ([1], pytest.approx([0.1]))


def test_generate_has_one_token_to_choose_and_each_position_its_number():
    numbers = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)
    draws = KeyedDraws(TokenDraw(num_tokens=2, with_logprobs=True), numbers, prompt_length=3)
    for length, tokens in ((3, [0, 1]), (4, [1, 0])):
        scores = draws(torch.zeros(2, length), torch.zeros(2, 5))  # three of five are no tokens
        assert scores.argmax(dim=1).tolist() == tokens
        assert scores.isfinite().sum() == 2
    torch.testing.assert_close(draws.logprobs.exp(), torch.full((2, 2), 0.5))
    assert KeyedDraws(TokenDraw(num_tokens=2), numbers, prompt_length=3).logprobs is None
