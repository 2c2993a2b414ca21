"""Flags: advantages, KL penalty and losses of step 3, and the text that the actor learns beside them."""

from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require, require_at_least
from dschat.console import messages


@dataclass(frozen=True, kw_only=True)
class PpoArguments:
    """Hyper-parameters of PPO, https://arxiv.org/abs/1707.06347, as docs/ppo.md uses them."""

    per_device_training_batch_size: int = flag(16, "Answers a rank trains on at once.", at_resume="divided")
    ppo_epochs: int = flag(1, "Passes over each batch of experience.")
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = flag(
        "gae",
        "GAE with a critic; or without one: the score against the prompt's other answers (rloo, grpo), or "
        "the rewards to come (reinforce++).",
    )
    kl_coef: float = flag(0.1, "Weight of the KL penalty per token against the reference model.")
    kl_target: float | None = flag(
        None, "KL in nats an answer towards which --kl_coef is steered after each PPO step; default: held."
    )
    kl_horizon: int = flag(1000, "Answers over which that steering works: more steer more slowly.")
    kl_estimator: Literal["k1", "k2", "k3"] | None = flag(
        None,
        "Estimate of the KL that is penalised: log-ratio, half its square, or exp(-k1) - 1 + k1; default: k1 "
        "in the rewards, k3 in the loss.",
    )
    kl_in: Literal["reward", "loss"] | None = flag(
        None,
        "Where the KL penalty stands: in the rewards of tokens (default) or in the actor's loss (default of "
        "grpo).",
    )
    ratio_clip: float = flag(0.2, "Clip range of the policy ratio.")
    ratio_clip_high: float | None = flag(
        None, "Clip range of the policy ratio above 1, where it is to differ from --ratio_clip."
    )
    dual_clip: float | None = flag(
        None, "The loss of a token of negative advantage A is at most -c A; c > 1, 3 is usual; default: off."
    )
    rollout_correction: Literal["none", "tis"] = flag(
        "none",
        "Weigh each token's policy loss by how much likelier the training model finds it than the forward "
        "pass that sampled it did, at most --tis_cap times (truncated importance sampling).",
    )
    tis_cap: float = flag(2.0, "Largest weight of --rollout_correction tis.")
    entropy_coef: float = flag(0.0, "Weight of the policy's entropy per token, which the loss rewards.")
    critic_warmup_steps: int = flag(
        0, "PPO steps at the beginning in which the critic learns alone; the actor's schedule starts after."
    )
    target_approx_kl: float | None = flag(
        None,
        "End the update of a PPO step after an optimiser step whose approx_kl is above this; default: never.",
    )
    value_clip: float = flag(0.2, "Clip range of the value around its old prediction.")
    gamma: float = flag(1.0, "Discount of later rewards.")
    gae_lambda: float = flag(0.95, "GAE's lambda: 1 trusts the returns, 0 the critic.")
    reward_clip: float = flag(5.0, "Scores are clipped to this magnitude; 0 leaves them alone.")
    normalize_scores: bool = flag(
        False,
        "Shift and scale scores by the mean and standard deviation that step 2 wrote for its evaluation: "
        "--score_normalization step2 by its older name.",
    )
    score_normalization: Literal["none", "step2", "running"] | None = flag(
        None,
        "What brings scores to mean 0 and variance 1 before they are clipped: nothing (default), step 2's "
        "statistics, or those of all answers so far.",
    )
    missing_eos_penalty: float = flag(0.0, "Subtracted from the score of an answer cut at the length limit.")
    whiten_advantages: bool = flag(
        True,
        "Bring the advantages of a rollout batch to mean 0 and variance 1 (gae and reinforce++; rloo and "
        "grpo compare within a prompt's answers instead).",
    )
    enable_ema: bool = flag(False, "Keep a moving average of the actor and save it as actor_ema.")
    ema_decay: float = flag(0.992, "Decay of the moving average per optimiser step.")

    @property
    def has_kl_loss(self) -> bool:
        """Whether the KL penalty is a term of the actor's loss and not of the rewards."""
        return (self.kl_in or ("loss" if self.advantage_estimator == "grpo" else "reward")) == "loss"

    @property
    def has_critic(self) -> bool:
        """Whether advantages are made with a critic."""
        return self.advantage_estimator == "gae"

    @property
    def compares_answers(self) -> bool:
        """Whether advantages compare the answers to one prompt."""
        return self.advantage_estimator in ("rloo", "grpo")

    @property
    def penalised_kl(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the KL penalty."""
        return self.kl_estimator or ("k3" if self.has_kl_loss else "k1")

    def _check_kl(self) -> None:
        require_at_least(1, self, "kl_horizon")
        require(
            self.kl_target is None or self.kl_target > 0,
            f"--kl_target must be positive, got {self.kl_target}; 1 to 6 nats an answer are usual.",
        )
        require(
            self.kl_target is None or self.kl_coef > 0,
            "--kl_target multiplies --kl_coef, which must be positive to begin with, got 0; 0.1 is usual.",
        )
        if self.has_kl_loss and self.penalised_kl == "k1":
            messages.note(
                "--kl_estimator k1 with --kl_in loss has a gradient that is zero on average and holds "
                "nothing back; k2 and k3 do."
            )

    @property
    def ratio_clips(self) -> tuple[float, float]:
        """How far the ratio may go below 1 and above it."""
        return self.ratio_clip, self.ratio_clip if self.ratio_clip_high is None else self.ratio_clip_high

    @property
    def score_scale(self) -> Literal["none", "step2", "running"]:
        """What scores are normalised by."""
        return self.score_normalization or ("step2" if self.normalize_scores else "none")

    def _check_losses(self) -> None:
        require_at_least(0, self, "entropy_coef", "critic_warmup_steps")
        require(
            0 < self.ratio_clip < 1, f"--ratio_clip must lie in (0, 1), got {self.ratio_clip}; 0.2 is usual."
        )
        require(
            self.ratio_clip_high is None or self.ratio_clip_high > 0,
            f"--ratio_clip_high must be positive, got {self.ratio_clip_high}; 0.28 is usual.",
        )
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"--dual_clip must be above 1, got {self.dual_clip}; 3 is usual, and without the flag it is off.",
        )
        require(self.tis_cap > 1, f"--tis_cap must be above 1, got {self.tis_cap}; 2 is usual.")
        require(
            self.has_critic or self.critic_warmup_steps == 0,
            f"--critic_warmup_steps {self.critic_warmup_steps} needs a critic, and --advantage_estimator "
            f"{self.advantage_estimator} has none; leave it out.",
        )
        require(
            self.target_approx_kl is None or self.target_approx_kl > 0,
            f"--target_approx_kl must be positive, got {self.target_approx_kl}; 0.02 is usual.",
        )
        require(self.value_clip > 0, f"--value_clip must be positive, got {self.value_clip}; 0.2 is usual.")

    def __post_init__(self) -> None:
        self._check_kl()
        self._check_losses()
        require(
            not self.normalize_scores or self.score_scale == "step2",
            f"--normalize_scores and --score_normalization {self.score_normalization} contradict each other; "
            "leave the first out.",
        )
        require_at_least(1, self, "per_device_training_batch_size", "ppo_epochs")
        require_at_least(0, self, "kl_coef", "reward_clip", "missing_eos_penalty")
        for name in ("gamma", "gae_lambda", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name} must lie in [0, 1], got {value}.")


@dataclass(frozen=True, kw_only=True)
class TextArguments:
    """Text that the actor learns beside PPO, InstructGPT (https://arxiv.org/abs/2203.02155) Eq. 2."""

    unsupervised_dataset_name: list[str] = flag(
        [],
        "Hub id, or local .txt, .json, .jsonl or .parquet files, of plain text; without it there is none. It "
        "is cut to blocks of --max_prompt_seq_len + --max_answer_seq_len tokens.",
    )
    unsupervised_dataset_config_name: str | None = flag(
        None, "The configuration of that hub id, such as wikitext-2-raw-v1."
    )
    unsup_coef: float = flag(27.8, "Weight of the text's mean loss per token beside the policy loss.")

    def __post_init__(self) -> None:
        require_at_least(0, self, "unsup_coef")
        require(
            self.unsupervised_dataset_config_name is None or bool(self.unsupervised_dataset_name),
            f"--unsupervised_dataset_config_name {self.unsupervised_dataset_config_name} needs "
            "--unsupervised_dataset_name, the hub id that it belongs to.",
        )
