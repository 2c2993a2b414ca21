"""The invariants of docs/ppo.md that need a model. Those that need DeepSpeed are in test_ppo_on_ranks.py."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tiny import FAMILIES, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dschat.arguments import PpoArguments
from dschat.data.packing import PADDED, RowLayout
from dschat.data.token_batch import TokenBatch
from dschat.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    truncated_importance_weights,
)
from dschat.models.forward import (
    logits_of,
    predictions_of,
    scores_of,
    token_logprobs_of,
    values_of,
)
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.softmax import logprobs_and_entropy, token_logprobs
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.actor_loss import actor_loss
from dschat.rlhf.experience import MicroBatch
from dschat.rlhf.rollout.batch import RolloutBatch

PROMPTS = ((10, 11, 12, 13, 14), (20, 21), (30, 31, 32))
ANSWERS = ((40, 41, 42, 0), (50, 0), (60, 61, 62, 63))  # token 0 ends; the last is cut at the limit
NUM_TOKENS = 10**6  # of the tokenizer: no limit here
LENGTHS = [len(answer) for answer in ANSWERS]


@dataclass(frozen=True)
class LaidOut(RolloutBatch):
    """Prompts and answers that models read in rows of a layout."""

    layout: RowLayout = PADDED

    @property
    def tokens(self) -> TokenBatch:
        return super().tokens.placed(self.layout)


def rollout_of(prompts, answers, *, pad: int = 1) -> RolloutBatch:
    """Prompts padded on the left, answers on the right, with `pad` in the padding."""
    width, length = max(map(len, prompts)), max(map(len, answers))
    ids = [
        [pad] * (width - len(p)) + list(p) + list(a) + [pad] * (length - len(a))
        for p, a in zip(prompts, answers, strict=True)
    ]
    mask = [
        [0] * (width - len(p)) + [1] * (len(p) + len(a)) + [0] * (length - len(a))
        for p, a in zip(prompts, answers, strict=True)
    ]
    answer_mask = torch.tensor(mask)[:, width:].bool()
    ended = torch.tensor([a[-1:] == (0,) for a in answers])
    rows = torch.arange(len(ids))
    return RolloutBatch(torch.tensor(ids), torch.tensor(mask), answer_mask, ended, rows, width)


BATCH = rollout_of(PROMPTS, ANSWERS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), family)


@pytest.fixture(scope="module")
def actor(folder):
    tokenizer = load_tokenizer(str(folder))
    options = {"dropout": 0.0, "attn_implementation": "auto"}
    return create_hf_model(AutoModelForCausalLM, str(folder), tokenizer, **options).eval()


@pytest.fixture(scope="module")
def critic(folder):
    tokenizer = load_tokenizer(str(folder))
    return create_critic_model(str(folder), tokenizer, None, attn_implementation="auto").eval()


def logprobs_of(model, batch: RolloutBatch) -> Tensor:
    return token_logprobs_of(model, batch.tokens, num_tokens=NUM_TOKENS)


def policy_loss(model, batch: RolloutBatch, advantages: Tensor, denominator: float) -> Tensor:
    logprobs = logprobs_of(model, batch)
    old = logprobs.detach() - 0.1  # ratios away from 1 and inside the clip
    return clipped_policy_loss(
        logprobs, old, advantages, batch.answer_mask, ratio_clip=0.2, denominator=denominator
    )


def value_loss(model, batch: RolloutBatch, returns: Tensor, denominator: float) -> Tensor:
    values = values_of(model, batch.tokens)
    return clipped_value_loss(
        values, values.detach(), returns, batch.answer_mask, value_clip=0.2, denominator=denominator
    )


def gradients(model, loss_of: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


EVERY_TERM = PpoArguments(
    ratio_clip=0.05, ratio_clip_high=0.2, dual_clip=1.05, entropy_coef=0.3, kl_in="loss", kl_estimator="k2"
)


def whole_actor_loss(model, batch: RolloutBatch, advantages: Tensor, num_tokens: int) -> Tensor:
    """Every term of the actor's loss; the old and the reference policy differ from token to token."""
    logprobs, entropy = predictions_of(model, batch.tokens, num_tokens=NUM_TOKENS)
    now = logprobs.detach()
    old, reference = now - 0.1 * advantages, now + 0.2 * advantages.abs()
    micro_batch = MicroBatch(batch, old, reference, 0 * old, advantages, 0 * old)
    return actor_loss(logprobs, entropy, micro_batch, EVERY_TERM, kl_coef=0.5, num_tokens=num_tokens).total


def targets(width: int) -> Tensor:
    """A target a token, the same for a token wherever padding puts it."""
    return torch.arange(1, 13).view(3, 4).float()[:, :width].sub(6.5) / 3


def test_logprobs_are_those_of_each_row_alone_without_padding(actor):
    together = logprobs_of(actor, BATCH)
    for i in range(3):
        ids = torch.tensor([PROMPTS[i] + ANSWERS[i]])
        logits = actor(input_ids=ids).logits.log_softmax(-1)[0, len(PROMPTS[i]) - 1 : -1]
        expected = logits[torch.arange(LENGTHS[i]), torch.tensor(ANSWERS[i])]
        torch.testing.assert_close(together[i, : LENGTHS[i]], expected, atol=1e-5, rtol=1e-5)


def test_scores_and_values_are_those_of_each_row_alone_without_padding(critic):
    values = values_of(critic, BATCH.tokens)
    scores = scores_of(critic, BATCH.tokens)
    for i in range(3):
        alone = critic.forward_value(torch.tensor([PROMPTS[i] + ANSWERS[i]]), return_value_only=True)[0]
        torch.testing.assert_close(
            values[i, : LENGTHS[i]], alone[len(PROMPTS[i]) - 1 : -1], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(scores[i], alone[-1], atol=1e-5, rtol=1e-5)


CHANGES = {
    "more padding": lambda: (BATCH.padded(9, 7, 1), torch.nn.functional.pad(targets(4), (0, 3), value=99.0)),
    "other tokens in the padding": lambda: (rollout_of(PROMPTS, ANSWERS, pad=77), targets(4)),
    "another order": lambda: (rollout_of(PROMPTS[::-1], ANSWERS[::-1]), targets(4).flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_losses_and_gradients_do_not_change_with(change, actor, critic):
    batch, changed_targets = CHANGES[change]()
    for model, loss in ((actor, policy_loss), (actor, whole_actor_loss), (critic, value_loss)):
        expected = gradients(model, lambda: loss(model, BATCH, targets(4), 10))  # noqa: B023
        actual = gradients(model, lambda: loss(model, batch, changed_targets, 10))  # noqa: B023
        assert expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


NOT_PACKED = ("bloom", "falcon_alibi")
LAYOUTS = (RowLayout(16), RowLayout(8, "mask"), RowLayout(8, "mask", in_one_row=True))


@pytest.mark.parametrize(
    "answers", [ANSWERS, ((40, 41, 42, 0), (), (0,))], ids=["", "empty and of one token"]
)
def test_no_layout_of_rows_and_no_short_answer_changes_losses_or_gradients(answers, family, actor, critic):
    padded = rollout_of(PROMPTS, answers)
    filled = torch.tensor([row for row, answer in enumerate(answers) if answer])
    for layout in LAYOUTS:
        if layout.separated_by and family in NOT_PACKED:
            continue
        batch = LaidOut(**vars(padded), layout=layout)
        torch.testing.assert_close(
            scores_of(critic, batch.tokens), scores_of(critic, padded.tokens), atol=1e-5, rtol=1e-5
        )
        for model, loss in ((actor, policy_loss), (actor, whole_actor_loss), (critic, value_loss)):
            few, wanted = padded.rows(filled), targets(4)[filled]
            expected = gradients(model, lambda: loss(model, few, wanted, 10))  # noqa: B023
            actual = gradients(model, lambda: loss(model, batch, targets(4), 10))  # noqa: B023
            assert expected.keys() == actual.keys()
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_micro_batches_add_up_to_the_gradient_of_the_whole(actor, critic):
    for model, loss in ((actor, policy_loss), (actor, whole_actor_loss), (critic, value_loss)):
        whole = gradients(model, lambda: loss(model, BATCH, targets(4), sum(LENGTHS)))  # noqa: B023
        parts = []
        for rows in ([0], [1, 2]):  # one row with four tokens, two rows with six: means of means would differ
            part, wanted = BATCH.rows(torch.tensor(rows)), targets(4)[rows]
            parts.append(gradients(model, lambda: loss(model, part, wanted, sum(LENGTHS))))  # noqa: B023
        for name in whole:
            torch.testing.assert_close(
                sum(p[name] for p in parts), whole[name], atol=1e-5, rtol=1e-4, msg=name
            )


@pytest.mark.parametrize("args", [PpoArguments(), EVERY_TERM], ids=["plain", "every term"])
def test_with_equal_engines_the_corrected_loss_is_the_same_to_the_last_bit(args):
    logits = torch.randn(3, 4, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, BATCH.answers)
    now = logprobs.detach()
    weights = truncated_importance_weights(now, now.clone(), BATCH.answer_mask, cap=2.0)
    results = []
    for chosen in (None, weights):
        batch = MicroBatch(BATCH, now + 0.1, now - 0.2, None, targets(4), targets(4), chosen)
        loss = actor_loss(logprobs, entropy, batch, args, kl_coef=0.5, num_tokens=10)
        results.append((loss.total.detach(), *torch.autograd.grad(loss.total, logits, retain_graph=True)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_end_token_receives_policy_gradient_and_value_regression(actor, critic):
    logits = logits_of(actor, BATCH.tokens, num_tokens=NUM_TOKENS).detach().requires_grad_()
    logprobs = token_logprobs(logits, BATCH.answers)
    clipped_policy_loss(logprobs, logprobs.detach(), targets(4), BATCH.answer_mask, ratio_clip=0.2).backward()
    is_reached = logits.grad.abs().sum(dim=-1) > 0
    assert torch.equal(is_reached, BATCH.answer_mask)  # end tokens inside, padding outside
    values = values_of(critic, BATCH.tokens).detach().requires_grad_()
    clipped_value_loss(values, values.detach(), targets(4) + 50, BATCH.answer_mask, value_clip=0.2).backward()
    assert torch.equal(values.grad != 0, BATCH.answer_mask)


def test_the_ratio_at_unchanged_weights_is_exactly_one_in_train_mode_too(actor):
    with torch.no_grad():
        old = logprobs_of(actor.eval(), BATCH)
    assert torch.equal(logprobs_of(actor.train(), BATCH).detach(), old)
    actor.eval()


def test_only_answer_logits_are_computed(actor):
    assert logits_of(actor, BATCH.tokens, num_tokens=NUM_TOKENS).shape == (3, 4, actor.config.vocab_size)
    assert logits_of(actor, BATCH.tokens, num_tokens=100).shape == (3, 4, 100)
