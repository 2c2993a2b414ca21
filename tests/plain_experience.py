"""What PPO learns from, by transformers and `numpy_ppo` alone: one answer at a time, no padding, no cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy_ppo
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dschat.rlhf.experience import Experience


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of an experience."""

    num_tokens: int
    """Of the tokenizer: what pads the vocabulary takes no part."""
    temperature: float
    kl_coef: float
    gae_lambda: float
    reward_clip: float
    missing_eos_penalty: float


@dataclass(frozen=True)
class PlainModels:
    """Actor, reference, critic and reward model as transformers loads them from folders, in fp32."""

    actor: PreTrainedModel
    reference: PreTrainedModel
    critic: PreTrainedModel
    reward: PreTrainedModel

    @staticmethod
    def load(*, actor: Path, reference: Path, critic: Path, reward: Path) -> "PlainModels":
        """Their folders."""
        language = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (actor, reference)]
        scoring = [
            AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in (critic, reward)
        ]
        return PlainModels(*language, *scoring)


def split(row: torch.Tensor, mask: torch.Tensor, prompt_length: int) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its answer, without padding."""
    is_token = mask.bool()
    prompt, answer = row[:prompt_length], row[prompt_length:]
    return prompt[is_token[:prompt_length]].tolist(), answer[is_token[prompt_length:]].tolist()


@torch.no_grad()
def distributions(
    model: PreTrainedModel, prompt: list[int], answer: list[int], settings: Settings
) -> torch.Tensor:
    """The log-probabilities of all tokens at each of the answer's places, [n, V] in fp64."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, : settings.num_tokens]
    return (logits.double() / settings.temperature).log_softmax(-1)


@torch.no_grad()
def outputs(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """A scoring model's output at each token from the prompt's last one on, [n + 1]."""
    hidden = model.base_model(torch.tensor([prompt + answer])).last_hidden_state[0]
    return model.score(hidden)[len(prompt) - 1 :, 0].double().numpy()


def differences(experience: Experience, models: PlainModels, settings: Settings) -> dict[str, float]:
    """How far each number of the experience is at most from the one that is computed here.

    Rewards, advantages and returns are computed of the experience's own log-probabilities, values and scores,
    so that theirs is the rounding of the formulas alone.
    """
    rollout, analysis = experience.rollout, experience.analysis
    far: dict[str, float] = {}

    def compare(name: str, ours: torch.Tensor, theirs: object) -> None:
        apart = np.abs(ours.double().numpy() - np.asarray(theirs))
        far[name] = max(far.get(name, 0.0), float(apart.max()))

    advantages = []
    for i, (row, mask) in enumerate(zip(rollout.input_ids, rollout.attention_mask, strict=True)):
        prompt, answer = split(row, mask, rollout.prompt_length)
        n = len(answer)
        policy, reference = (
            distributions(model, prompt, answer, settings) for model in (models.actor, models.reference)
        )
        compare("logprobs", analysis.logprobs[i, :n], policy[range(n), answer])
        compare("entropy", analysis.entropy[i, :n], -(policy.exp() * policy).sum(-1))
        compare("ref_logprobs", analysis.ref_logprobs[i, :n], reference[range(n), answer])
        compare("values", analysis.values[i, :n], outputs(models.critic, prompt, answer)[:-1])
        compare("scores", analysis.scores[i], outputs(models.reward, prompt, answer)[-1])
        if rollout.logprobs is not None:
            compare("sampled logprobs", rollout.logprobs[i, :n], policy[range(n), answer])

        old, ref, values = (
            column[i, :n].double().numpy()
            for column in (analysis.logprobs, analysis.ref_logprobs, analysis.values)
        )
        score = float(np.clip(analysis.scores[i].item(), -settings.reward_clip, settings.reward_clip))
        score -= 0 if rollout.ended[i] else settings.missing_eos_penalty
        rewards = numpy_ppo.rewards(score, old, ref, settings.kl_coef)
        advantages.append(numpy_ppo.gae(values, rewards, 1.0, settings.gae_lambda))
        compare("raw_advantages", experience.raw_advantages[i, :n], advantages[-1])
        compare("returns", experience.returns[i, :n], advantages[-1] + values)
        undiscounted = numpy_ppo.gae(values, rewards, 1.0, 1.0)[0] + values[0]
        compare("sum of rewards", torch.tensor(undiscounted), score - settings.kl_coef * (old - ref).sum())
    for i, expected in enumerate(numpy_ppo.whitened(advantages)):
        compare("advantages", experience.advantages[i, : len(expected)], expected)
        compare("beyond the answers", experience.advantages[i, len(expected) :].abs().sum(), 0.0)
    return far
