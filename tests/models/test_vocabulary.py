"""A vocabulary longer than the tokenizer's: which softmax each step takes, and why they differ."""

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.data.token_batch import TokenBatch
from dschat.export.golden_outputs import golden_outputs
from dschat.models.forward import token_logprobs_of
from dschat.models.loading import create_hf_model
from dschat.rlhf.rollout.batch import RolloutBatch

IDS = torch.tensor([[5, 6, 7, 8, 9]])
PADDED = 500


@pytest.fixture
def model(tmp_path):
    path = save_tiny_model(tmp_path, vocab_size=PADDED)
    return create_hf_model(AutoModelForCausalLM, str(path), tiny_tokenizer())


def of_ppo(model) -> torch.Tensor:
    """Log-probabilities of the last three tokens as step 3 computes them."""
    ones = torch.ones_like(IDS)
    batch = RolloutBatch(IDS, ones, ones[:, 2:].bool(), ones[:, 0].bool(), ones[:, 0], prompt_length=2)
    return token_logprobs_of(model, batch.tokens, num_tokens=len(tiny_tokenizer()))


def test_step_1_learns_that_padding_rows_are_never_said_as_transformers_own_loss_does(model):
    mask = torch.tensor([[False, False, True, True, True]])
    batch = TokenBatch.of(IDS, mask, attention_mask=torch.ones_like(IDS))
    loss = -batch.in_rows(token_logprobs_of(model, batch)).sum() / 3
    labels = IDS.masked_fill(~mask, -100)
    torch.testing.assert_close(loss, model(input_ids=IDS, labels=labels).loss)
    loss.backward()
    assert (model.lm_head.weight.grad[len(tiny_tokenizer()) :].abs().sum(dim=1) > 0).all()


def test_step_3_leaves_them_out_and_a_manifest_promises_what_it_computes(model):
    num_tokens = len(tiny_tokenizer())
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, 1:-1].log_softmax(dim=-1)
        # P(y | not padding) = P(y) / P(not padding)
        kept = whole[..., :num_tokens].logsumexp(dim=-1)
        expected = whole.gather(-1, IDS[:, 2:, None]).squeeze(-1) - kept
        assert kept.max() < -0.05
        torch.testing.assert_close(of_ppo(model), expected)
    promised = golden_outputs(model, [IDS[0, 1:].tolist()], num_tokens=num_tokens, device="cpu")
    alone = model(input_ids=IDS[:, 1:]).logits[:, :-1, :num_tokens].log_softmax(dim=-1)
    mean = alone.gather(-1, IDS[:, 2:, None]).mean()
    torch.testing.assert_close(promised, mean.detach().double()[None], atol=1e-6, rtol=0)
