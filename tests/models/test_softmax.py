"""Log-probabilities and entropies against hand-made numbers and a computation of its own in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dschat.models import softmax
from dschat.models.softmax import logprobs_and_entropy, token_logprobs

# softmax of (0, ln 3) is (1/4, 3/4); at temperature 2 the logits are (0, ln sqrt 3), weights 1 and 1.7320508.
LOGITS = torch.tensor([[[0.0, math.log(3.0)]]])


@pytest.mark.parametrize(
    ("token", "temperature", "probability"),
    [(0, 1.0, 0.25), (1, 1.0, 0.75), (0, 2.0, 1 / 2.7320508), (1, 2.0, 1.7320508 / 2.7320508)],
)
def test_token_logprobs_are_of_the_softmax_at_that_temperature(token, temperature, probability):
    actual = token_logprobs(LOGITS, torch.tensor([[token]]), temperature=temperature)
    assert actual.exp().item() == pytest.approx(probability)


def test_entropy_of_a_quarter_and_three_quarters():
    # -(0.25 ln 0.25 + 0.75 ln 0.75) = 0.25 * 1.3862944 + 0.75 * 0.2876821
    _, entropy = logprobs_and_entropy(LOGITS, torch.tensor([[0]]))
    assert entropy.item() == pytest.approx(0.5623351)


def sample(dtype: torch.dtype = torch.float32, *, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 15 rows over 7 tokens, and a token of each row."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 7, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, 7, (3, 5), generator=generator)


def hold_at_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many fp32 elements, on any machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(softmax, "FP32_ELEMENTS_PER_THREAD", elements)


@pytest.fixture(params=[16, 1 << 17])
def rows_at_once(request, monkeypatch):
    """Two rows of seven at once, and all of them."""
    hold_at_once(request.param, monkeypatch)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("of_logprobs", "of_entropy"), [(1, 0), (0, 1), (1, 1)])
def test_values_and_gradients_are_those_of_a_softmax_in_float64(temperature, of_logprobs, of_entropy):
    logits, tokens = sample()
    weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def total(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return (of_logprobs * weights[0] * logprobs + of_entropy * weights[1] * entropy).sum()

    exact = logits.double().requires_grad_()
    distribution = torch.distributions.Categorical(logits=exact / temperature)
    expected = distribution.log_prob(tokens), distribution.entropy()
    total(*expected).backward()

    logits.requires_grad_()
    actual = logprobs_and_entropy(logits, tokens, temperature=temperature)
    total(*(value.double() for value in actual)).backward()
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("rows_at_once")
def test_token_logprobs_have_the_value_and_gradient_of_cross_entropy():
    logits, tokens = sample()
    logits.requires_grad_()
    reference = logits.detach().clone().requires_grad_()
    expected = -torch.nn.functional.cross_entropy(reference.flatten(0, 1), tokens.flatten(), reduction="none")
    expected.sum().backward()
    actual = token_logprobs(logits, tokens)
    actual.sum().backward()
    torch.testing.assert_close(actual.flatten(), expected)
    torch.testing.assert_close(logits.grad, reference.grad)


def test_values_are_fp32_and_the_gradient_has_the_dtype_of_the_logits():
    logits = torch.zeros(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    values = logprobs_and_entropy(logits, torch.zeros(1, 2, dtype=torch.long))
    sum(value.sum() for value in values).backward()
    assert all(value.dtype == torch.float32 for value in values)
    assert logits.grad.dtype == torch.bfloat16
    assert values[0][0, 0].item() == pytest.approx(-math.log(4))
    assert values[1][0, 0].item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logprob_has_the_same_bits_with_and_without_gradient_and_entropy(dtype):
    """The first ratio of a PPO step is 1 for this."""
    logits, tokens = sample(dtype)
    unchanged = logits.clone()
    with torch.no_grad():
        expected = token_logprobs(logits, tokens, temperature=0.7)
        others = [logprobs_and_entropy(logits, tokens, temperature=0.7)[0]]
    logits.requires_grad_()
    others.append(token_logprobs(logits, tokens, temperature=0.7))
    others.append(logprobs_and_entropy(logits, tokens, temperature=0.7)[0])
    assert all(torch.equal(other, expected) for other in others)
    assert torch.equal(
        logits, unchanged
    )  # fp32 logits need no cast, and are worked on in a copy all the same


def test_a_logprob_does_not_depend_on_the_rows_beside_it(monkeypatch):
    logits, tokens = sample(torch.bfloat16)
    whole = token_logprobs(logits, tokens)
    hold_at_once(7, monkeypatch)
    assert torch.equal(token_logprobs(logits, tokens), whole)
    assert torch.equal(token_logprobs(logits[1:2, 3:], tokens[1:2, 3:]), whole[1:2, 3:])


def test_extreme_logits_give_neither_infinity_nor_nan():
    logits, tokens = sample(scale=3e4)
    logits.requires_grad_()
    values = logprobs_and_entropy(logits, tokens)
    sum(value.sum() for value in values).backward()
    assert all(value.isfinite().all() for value in (*values, logits.grad))
    assert (values[1] >= 0).all()


def test_a_token_that_sampling_excludes_has_no_part_in_the_others_logprobs():
    # ln(1/4) and ln(3/4) as without it
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]]).expand(2, 3)
    actual = token_logprobs(logits, torch.tensor([0, 1]))
    assert actual.exp().tolist() == pytest.approx([0.25, 0.75])


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest fp32 tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return output


def test_fp32_copies_are_of_a_few_rows_in_both_passes(monkeypatch):
    hold_at_once(4 * 64, monkeypatch)
    logits = torch.randn(100, 64).bfloat16().requires_grad_()
    with LargestTensor() as forward:
        values = logprobs_and_entropy(logits, torch.zeros(100, dtype=torch.long))
    loss = values[0].sum() + values[1].sum()
    with LargestTensor() as backward:
        loss.backward()
    # four rows of 64 at once, or three or four numbers of each of 100 rows
    assert forward.elements <= 300
    assert backward.elements <= 300
