"""Flags: evaluation in step 3, which actor is kept, and what the guard warns of."""

from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class GuardArguments:
    """Held-out evaluation, the best actor, and the guard against over-optimisation (docs/ppo.md)."""

    eval_interval: int = flag(
        10,
        "PPO steps between evaluations on held-out prompts; there is one before the first step and one after "
        "the last too. 0: none at all.",
        at_resume="free",
    )
    num_eval_prompts: int | None = flag(
        None, "Held-out prompts of an evaluation; default: as many as a PPO step samples answers."
    )
    eval_samples_per_prompt: int | None = flag(
        None,
        "Answers to each held-out prompt in an evaluation; default: 1, or where fewer prompts are held out "
        "than an evaluation takes as many as make up for them, at most 8.",
    )
    export_actor: Literal["best", "last"] = flag(
        "best",
        "Which actor the folder actor/ gets: of the best evaluation, where one is better than the start by "
        "more than noise, or of the last PPO step.",
        at_resume="free",
    )
    guard_reward_model_name_or_path: str | None = flag(
        None,
        "Folder or hub id of a second reward model, from which nothing is learned: it scores the held-out "
        "answers, and the guard warns where its score falls while the other's rises.",
        at_resume="free",
    )
    max_kl: float | None = flag(
        None,
        "The guard warns where KL in nats an answer is above this; default: three times --kl_target, or "
        "without one a quarter nat a token of the first answers, at least 2. inf: never.",
        at_resume="free",
    )
    min_entropy_ratio: float = flag(
        0.1,
        "The guard warns where the policy's entropy is below this share of its first one; 0: never.",
        at_resume="free",
    )
    max_length_ratio: float = flag(
        2.0,
        "The guard warns where answers are more than this many times as long as the first; inf: never.",
        at_resume="free",
    )
    min_eos_ratio: float = flag(
        0.5,
        "The guard warns where the share of answers with an end token is below this share of the first one; "
        "0: never.",
        at_resume="free",
    )
    patience: int = flag(
        5,
        "PPO steps in a row with the same warning after which the guard ends the run; 0: it only warns.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, "eval_interval", "patience")
        require(
            self.num_eval_prompts is None or self.num_eval_prompts > 0,
            f"--num_eval_prompts must be positive, got {self.num_eval_prompts}; --eval_interval 0 leaves the "
            "evaluation out.",
        )
        samples = self.eval_samples_per_prompt
        require(samples is None or samples > 0, f"--eval_samples_per_prompt must be positive, got {samples}.")
        require(
            self.max_kl is None or self.max_kl > 0,
            f"--max_kl must be positive, got {self.max_kl}; inf sets no limit.",
        )
        for name in ("min_entropy_ratio", "min_eos_ratio"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must lie in [0, 1), got {value}; 0 leaves it unwatched.")
        require(
            self.max_length_ratio > 1,
            f"--max_length_ratio must be above 1, got {self.max_length_ratio}; inf leaves length unwatched.",
        )
        require(
            self.guard_reward_model_name_or_path is None or self.eval_interval > 0,
            "--guard_reward_model_name_or_path scores the answers of evaluations, and --eval_interval 0 has "
            "none; leave one of them out.",
        )
