"""PPO on one page: a model of random weights learns to count, in under two minutes on a CPU.

    python examples/ppo_minimal.py

The prompt is a digit and a space; the answer should count up from it and then end: "3 " -> "456." No data, no
launcher, no DeepSpeed: what step 3 does in twenty files is here in four functions, with the losses and the
sampling of the library. `docs/ppo.md` has the mathematics in the same order.

What to expect (one thread of a server's CPU, 25 s):

    step   0  score 0.023  KL per token 0.000  '3 195 52'
    step  20  score 0.217  KL per token 0.444  '3 455608'
    step  40  score 0.617  KL per token 1.562  '3 456230'
    step  60  score 0.791  KL per token 2.092  '3 456.'
    step  79  score 0.918  KL per token 2.355  '3 456.'
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from dschat.losses import (
    advantages_and_returns,
    clipped_policy_loss,
    clipped_value_loss,
    kl_shaped_rewards,
    masked_mean,
    masked_whiten,
)
from dschat.rlhf.rollout.keyed_sampling import TokenDraw, keyed_uniforms, row_keys

SPACE, END, NUM_TOKENS = 10, 11, 12  # tokens 0 to 9 are the digits
COUNT, MAX_ANSWER = 3, 6
BATCH, EPOCHS, STEPS = 128, 2, 80
CONFIG = LlamaConfig(
    vocab_size=NUM_TOKENS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)


class Critic(nn.Module):
    """A model of its own that says after each token how much the rest of the answer will earn."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LlamaModel(CONFIG)
        self.head = nn.Linear(CONFIG.hidden_size, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L]"""
        return self.head(self.backbone(tokens).last_hidden_state).squeeze(2)


@torch.no_grad()
def sample(actor: nn.Module, prompts: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Answers, and 1 where a token of an answer counts: up to its end token. [B, P] -> [B, T], [B, T]."""
    rows = torch.arange(len(prompts))
    uniforms = keyed_uniforms(row_keys(prompts[:, 0], rows, seed=0, ppo_step=step), MAX_ANSWER)
    draw, tokens = TokenDraw(num_tokens=NUM_TOKENS), prompts
    for position in range(MAX_ANSWER):
        drawn, _ = draw(actor(tokens).logits[:, -1], uniforms[:, position])
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    answers = tokens[:, prompts.shape[1] :]
    ended_before = (answers == END).cumsum(dim=1) - (answers == END).long() > 0
    return answers, (~ended_before).float()


def score(prompts: Tensor, answers: Tensor) -> Tensor:
    """The reward: the share of COUNT digits and the end token that are right from the first on. [B]."""
    digits = prompts[:, :1] + torch.arange(1, COUNT + 1)
    right = torch.cat([digits, torch.full((len(prompts), 1), END)], dim=1)
    return (answers[:, : COUNT + 1] == right).long().cumprod(dim=1).float().mean(dim=1)


def logprobs_of(actor: nn.Module, tokens: Tensor, num_prompt: int) -> Tensor:
    """The log-probability of each token of the answers. [B, P + T] -> [B, T]."""
    logprobs = actor(tokens).logits[:, num_prompt - 1 : -1].log_softmax(dim=2)
    return logprobs.gather(2, tokens[:, num_prompt:, None]).squeeze(2)


def train() -> list[float]:
    """The mean score of each step's answers."""
    torch.manual_seed(0)
    actor, critic = LlamaForCausalLM(CONFIG), Critic()
    reference = copy.deepcopy(actor).requires_grad_(False)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5) for model in (actor, critic)]
    curve = []
    for step in range(STEPS):
        # 1. Sample answers and score them.
        prompts = torch.stack([torch.arange(BATCH) % (10 - COUNT), torch.full((BATCH,), SPACE)], dim=1)
        answers, mask = sample(actor, prompts, step)
        scores, tokens, num_prompt = score(prompts, answers), torch.cat([prompts, answers], dim=1), 2
        # 2. What the models say of them before the update. Column t is the decision to emit answer token t:
        #    its value is read at the token before it.
        with torch.no_grad():
            old_logprobs = logprobs_of(actor, tokens, num_prompt)
            ref_logprobs = logprobs_of(reference, tokens, num_prompt)
            old_values = critic(tokens)[:, num_prompt - 1 : -1] * mask
            rewards = kl_shaped_rewards(
                scores, old_logprobs, ref_logprobs, mask, kl_coef=0.01, score_clip=5.0
            )
            advantages, returns = advantages_and_returns(
                old_values, rewards, mask, gamma=1.0, gae_lambda=0.95
            )
            advantages = masked_whiten(advantages, mask)
        # 3. Learn from them.
        for _ in range(EPOCHS):
            policy_loss = clipped_policy_loss(
                logprobs_of(actor, tokens, num_prompt), old_logprobs, advantages, mask, ratio_clip=0.2
            )
            values = critic(tokens)[:, num_prompt - 1 : -1]
            value_loss = clipped_value_loss(values, old_values, returns, mask, value_clip=0.2)
            for optimizer, loss, model in zip(
                optimizers, (policy_loss, value_loss), (actor, critic), strict=True
            ):
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        curve.append(scores.mean().item())
        if step % 10 == 0 or step == STEPS - 1:
            kl = masked_mean(old_logprobs - ref_logprobs, mask).item()
            example = written(prompts[3], answers[3])
            print(f"step {step:3}  score {curve[-1]:.3f}  KL per token {kl:.3f}  {example}")
    return curve


def written(prompt: Tensor, answer: Tensor) -> str:
    """A prompt and its answer as text."""
    text = "".join("0123456789 ."[token] for token in [*prompt.tolist(), *answer.tolist()])
    return repr(text.partition(".")[0] + "." * ("." in text))


if __name__ == "__main__":
    train()
