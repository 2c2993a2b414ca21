"""Flags: how step 3 samples answers, and the check that generating and training agree."""

from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require, require_at_least

ROLLOUT_TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Mean difference of log-probabilities, generating against training, in nats per token at temperature 1."""


@dataclass(frozen=True, kw_only=True)
class RolloutArguments:
    """How answers are sampled."""

    per_device_generation_batch_size: int = flag(16, "Answers a rank samples at once.", at_resume="divided")
    generation_batches: int = flag(
        1, "Batches of answers a rank samples before each training phase.", at_resume="divided"
    )
    num_samples_per_prompt: int = flag(
        1, "Answers to each prompt in a PPO step; they count as answers in the sizes of batches."
    )
    max_prompt_seq_len: int = flag(256, "Longest prompt in tokens; longer ones are left out and counted.")
    max_answer_seq_len: int = flag(256, "Longest answer in tokens, its end token included.")
    temperature: float = flag(1.0, "Sampling temperature; the log-probabilities of PPO use it too.")
    top_p: float = flag(1.0, "Sample from the smallest set of tokens with this probability; 1 is off.")
    top_k: int = flag(0, "Sample from this many likeliest tokens; 0 is off.")
    rollout_backend: Literal["auto", "static", "continuous", "hf"] = flag(
        "auto",
        "What generates answers: static, a decoding loop of our own; continuous, transformers' continuous "
        "batching; hf, transformers' generate(); auto, the one of them that a timing at the start finds "
        "fastest, continuous only with FlashAttention. They give the same answers but for rounding.",
    )
    rollout_gather: Literal["auto", "always", "never"] = flag(
        "auto",
        "ZeRO-3: gather the weights once a rollout phase, or a layer at a time; auto looks at free memory.",
        at_resume="free",
    )
    rollout_tolerance: float | None = flag(
        None,
        "Before training and at evaluations, sampled tokens are scored again by the training model: the mean "
        "difference of log-probabilities that passes; 0: no check; default: 1e-4 in fp32, 0.05 in bf16, 0.01 "
        "in fp16.",
        at_resume="free",
    )
    rollout_on_mismatch: Literal["stop", "uncached", "warn"] = flag(
        "stop",
        "Beyond that tolerance: end the run, generate without a KV cache (slow), or go on.",
        at_resume="free",
    )
    print_answers: bool = flag(
        False,
        "Print samples of prompts and answers, as a table with scores, KL and lengths.",
        at_resume="free",
    )
    print_answers_interval: int = flag(
        1,
        "PPO steps between samples, which samples.jsonl and trackers have also where they are not printed.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        positive = ("per_device_generation_batch_size", "generation_batches", "max_prompt_seq_len",
                    "max_answer_seq_len", "print_answers_interval", "num_samples_per_prompt")  # fmt: skip
        require_at_least(1, self, *positive)
        require_at_least(0, self, "top_k")
        require(self.temperature > 0, f"--temperature must be positive, got {self.temperature}; 1 is usual.")
        require(0 < self.top_p <= 1, f"--top_p must lie in (0, 1], got {self.top_p}; 1 is off.")
        require(
            self.rollout_tolerance is None or self.rollout_tolerance >= 0,
            f"--rollout_tolerance must be at least 0, got {self.rollout_tolerance}; 0 is no check.",
        )
