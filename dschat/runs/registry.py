"""Every metric that a step writes to `metrics.jsonl`: its unit, its meaning, its healthy values, what helps.

docs/metrics.md, the groups in trackers, the guard's remedies and reports are made of these entries.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Group = Literal["train", "eval", "eval_command", "actor", "critic", "rollout", "speed"]
STEPS = ("sft", "reward", "dpo", "rlhf")
SUPERVISED = STEPS[:3]
MEASURED = "eval/"
"""What the names of the numbers of --eval_command begin with in metrics.jsonl and summary.json."""
ANY = "NAME"
"""In an entry's name: whatever the run calls it, such as a source of scores."""


@dataclass(frozen=True)
class Metric:
    """A metric of some steps. `healthy` says which values are good, `low` and `high` bound them.

    `remedy` says what a value outside usually means and what to do, as the end of a sentence.
    """

    name: str
    group: Group
    unit: str
    meaning: str
    healthy: str = ""
    remedy: str = ""
    low: float = -math.inf
    high: float = math.inf
    steps: tuple[str, ...] = ("rlhf",)
    is_main: bool = False
    """Whether the console has it: of training beside the progress bar, of an evaluation in its line."""

    @property
    def tag(self) -> str:
        """The name in trackers, which says the group once: eval/loss, actor/grad_norm."""
        return f"{self.group}/{self.name.removeprefix(f'{self.group}_').removeprefix(MEASURED)}"

    def is_healthy(self, value: float) -> bool:
        """Whether a value is finite and within the bounds; without bounds any finite one is."""
        return math.isfinite(value) and self.low <= value <= self.high


def metric(name: str, step: str | None = None) -> Metric:
    """The entry of a metric, of this step ("sft", "reward", "dpo", "rlhf") where steps differ.

    The entry of "score_exact" is that of "score_NAME", under its own name. Raises `KeyError` for a metric
    that no entry describes.
    """
    found = [entry for entry in METRICS if step is None or step in entry.steps]
    for entry in found:
        if entry.name == name:
            return entry
    for entry in found:
        if entry.name.endswith(ANY) and name.startswith(entry.name.removesuffix(ANY)):
            return replace(entry, name=name)
    raise KeyError(f"{name!r} of step {step!r} has no entry in dschat/runs/registry.py")


# fmt: off
_SUPERVISED = (
    Metric("loss", "train", "nats per token", "negative log-likelihood of the tokens to be learned",
           "falls quickly at first, then slowly; 1 to 3 for a pretrained model on text",
           "rises or jumps: lower --learning_rate, lengthen --num_warmup_steps; flat from the start: look "
           "at what is learned (dschat inspect); near 0: the model repeats its rows, fewer "
           "--num_train_epochs", low=0, steps=("sft",), is_main=True),
    Metric("loss", "train", "nats per pair",
           "ranking loss: -log sigmoid of the chosen answer's score less the rejected one's",
           "from 0.69, which is chance, to 0.3 to 0.65",
           "stays at 0.69: see `accuracy`; far above it: lower --learning_rate; near 0 while `eval_loss` "
           "rises: overfitted, fewer --num_train_epochs", low=0, high=0.75, steps=("reward",), is_main=True),
    Metric("loss", "train", "nats per pair", "the loss that --loss_type names",
           "sigmoid: exactly 0.693 at the first step, then down to 0.3 to 0.65",
           "stays at 0.693: raise --learning_rate; near 0 while `eval_loss` rises: overfitted, one epoch "
           "is usual", low=0, steps=("dpo",), is_main=True),
    Metric("accuracy", "train", "share of pairs",
           "pairs whose chosen answer has the higher score; a tie counts half",
           "0.6 to 0.8 on human preferences",
           "stays at 0.5: answers that --max_seq_len cuts, labels that are noise, a --learning_rate too "
           "low for the new head, or answers that differ in length alone; near 1: overfitted, or pairs "
           "that are told apart by a detail", low=0.5, steps=("reward",), is_main=True),
    Metric("accuracy", "train", "share of pairs",
           "pairs whose chosen answer has the larger implicit reward: --beta times the log-ratio to the "
           "reference model; a tie counts half",
           "0.6 to 0.8 on human preferences, after 0.5 at the first step",
           "stays at 0.5: raise --learning_rate, look at the pairs (dschat inspect)", low=0.5,
           steps=("dpo",), is_main=True),
    Metric("reward_margin", "train", "nats", "the chosen answer's implicit reward less the rejected one's",
           "rises from 0", "falls below 0: chosen and rejected may be the wrong way round", low=0,
           steps=("dpo",), is_main=True),
    Metric("chosen_reward", "train", "nats", "implicit reward of the chosen answer", "near 0 or above",
           "falls: see `chosen_logprob`", steps=("dpo",)),
    Metric("rejected_reward", "train", "nats", "implicit reward of the rejected answer", "falls",
           steps=("dpo",)),
    Metric("chosen_logprob", "train", "nats per answer",
           "log-probability of the chosen answer; per token with --loss_type ipo",
           "stays, or falls a little",
           "falls while `reward_margin` grows: the model unlearns both answers; a larger --beta or a lower "
           "--learning_rate holds it", high=0, steps=("dpo",)),
    Metric("rejected_logprob", "train", "nats per answer",
           "log-probability of the rejected answer; per token with --loss_type ipo", "falls", high=0,
           steps=("dpo",)),
    Metric("learning_rate", "train", "", "learning rate of the next optimiser step",
           "as the schedule has it", low=0, steps=SUPERVISED),
    Metric("grad_norm", "train", "", "norm of the gradient before it is clipped to --max_grad_norm",
           "of one size for most of the run",
           "grows from step to step: lower --learning_rate, lengthen --num_warmup_steps", low=0,
           steps=SUPERVISED),
    Metric("eval_loss", "eval", "as `loss`", "`loss` over the held-out rows", "falls, then stays",
           "rises while `loss` falls: overfitted; fewer --num_train_epochs, a lower --learning_rate, or "
           "--export_model best", low=0, steps=SUPERVISED, is_main=True),
    Metric("eval_perplexity", "eval", "tokens", "exp of `eval_loss`", "falls, then stays",
           "rises: see `eval_loss`", low=1, steps=("sft",), is_main=True),
    Metric("eval_accuracy", "eval", "share of pairs", "`accuracy` over the held-out pairs",
           "0.6 to 0.75 on human preferences",
           "within two standard errors of 0.5: see `accuracy`; below that: chosen and rejected may be the "
           "wrong way round; 0.05 and more under `accuracy`: overfitted", low=0.5, steps=("reward", "dpo"),
           is_main=True),
    Metric("eval_accuracy_stderr", "eval", "share of pairs",
           "standard error of `eval_accuracy`, the pairs of one prompt taken together", "0.02 or less",
           "larger: too few held-out pairs to tell models apart; --eval_fraction, --eval_data_path", low=0,
           high=0.05, steps=("reward", "dpo")),
    Metric("eval_pairs", "eval", "pairs", "held-out pairs", steps=("reward",)),
    Metric("eval_prompts", "eval", "prompts", "prompts of the held-out pairs", steps=("reward",)),
    Metric("eval_gain_over_length", "eval", "share of pairs",
           "`eval_accuracy` less that of the rule to prefer the longer answer, or the shorter, whichever is "
           "right more often", "above 0.05", "0 or less: the model has learned no more than length",
           steps=("reward",)),
    Metric("eval_gain_over_length_stderr", "eval", "share of pairs",
           "standard error of `eval_gain_over_length`", steps=("reward",)),
    Metric("eval_overconfidence", "eval", "probability",
           "the mean probability that the model gives to the answers that it prefers, less `eval_accuracy`",
           "within 0.02 of 0", "above: fewer epochs, a lower --learning_rate", steps=("reward",)),
    Metric("eval_overconfidence_stderr", "eval", "probability", "standard error of `eval_overconfidence`",
           steps=("reward",)),
    Metric("chosen_mean_score", "eval", "score", "mean score of the chosen held-out answers",
           "above `rejected_mean_score`", steps=("reward",)),
    Metric("rejected_mean_score", "eval", "score", "mean score of the rejected held-out answers",
           steps=("reward",)),
    Metric("score_mean", "eval", "score", "mean score of all held-out answers, which step 3 can bring to 0",
           steps=("reward",)),
    Metric("score_std", "eval", "score", "standard deviation of the scores of all held-out answers",
           "0.3 to 5", "near 0: the head has learned nothing, raise --learning_rate; tens: lower it", low=0,
           steps=("reward",)),
    *(
        Metric(f"eval_{name}", "eval", "nats", f"`{name}` over the held-out pairs", steps=("dpo",))
        for name in (
            "reward_margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"
        )
    ),
)
_PPO = (
    Metric("score", "rollout", "score",
           "mean raw score of the answers: the reward model's, or the weighted sum over all sources",
           "rises",
           "flat: raise --actor_learning_rate, lower --kl_coef; rises with `kl` while answers get worse: "
           "the policy exploits the reward model, see `kl`", is_main=True),
    Metric("score_std", "rollout", "score", "standard deviation of the raw scores", "well above 0",
           "near 0: all answers score alike and nothing is learned from them; look at answers "
           "(--print_answers)", low=0),
    Metric("score_clipped_share", "rollout", "share of answers", "answers whose score the clip changed",
           "near 0",
           "larger: the reward no longer tells those answers apart; raise --reward_clip, or "
           "--score_normalization step2", low=0, high=0.1),
    Metric("nonfinite_scores", "rollout", "answers",
           "answers whose score was not finite and counted as the mean of the others", "0",
           "--dtype bf16 or fp32 for a reward model that overflows", low=0, high=0),
    Metric("score_NAME", "rollout", "score", "mean raw score of one source, unweighted", "",
           "falls while `score` rises: the other sources outweigh it (--reward_weights)"),
    Metric("reward_errors_NAME", "rollout", "answers", "answers that a source of scores failed to score",
           "0",
           "the console names the first error of each kind; such answers count as --reward_on_error says"),
    Metric("answer_length", "rollout", "tokens", "mean length of an answer, its end token included",
           "about that of the start; within --max_length_ratio",
           "look at answers (--print_answers), raise --kl_coef, balance lengths in the reward model's "
           "data; where long answers are wanted, raise --max_length_ratio", low=1, is_main=True),
    Metric("eos_share", "rollout", "share of answers", "answers that end before the length limit",
           "above 0.5; within --min_eos_ratio of the start",
           "set --missing_eos_penalty, raise --kl_coef, look at answers (--print_answers); where long "
           "answers are wanted, raise --max_answer_seq_len", low=0.05),
    Metric("rollout_logprob_diff", "rollout", "nats",
           "mean difference, without sign, of a token's log-probabilities when sampled and before the "
           "update; with the check or --rollout_correction", "below --rollout_tolerance",
           "grows over the run: sampling and training drift apart; --rollout_correction tis, or --dtype "
           "fp32 for a while to see whether it is rounding", low=0, high=0.05),
    Metric("rollout_logprob_diff_max", "rollout", "nats", "the largest of these differences", "below 1",
           "see `rollout_logprob_diff`", low=0),
    Metric("tis_weight_mean", "rollout", "", "mean weight of a token with --rollout_correction tis",
           "near 1", "see `rollout_logprob_diff`", low=0.9, high=1.1),
    Metric("tis_truncated_share", "rollout", "share of tokens", "tokens whose weight is cut at --tis_cap",
           "near 0", "see `rollout_logprob_diff`", low=0, high=0.05),
    Metric("updates_done", "train", "optimiser steps", "optimiser steps of the PPO step", "as planned",
           "fewer: --target_approx_kl ended the update early; lower --actor_learning_rate where that is "
           "the rule", low=1),
    Metric("skipped_steps", "train", "optimiser steps",
           "updates that were skipped because loss or gradient was not finite; in PPO of actor and critic "
           "together", "0",
           "a few at the start of fp16 are harmless; else lower the learning rate, lengthen the warm-up, "
           "or --dtype bf16 or fp32", low=0, high=0, steps=STEPS),
    Metric("kl", "actor", "nats per answer",
           "KL to the reference model: the log-ratios (k1) summed over an answer, the mean over answers; "
           "may be below 0", "rises slowly, to 1 to 10; within --max_kl",
           "raise --kl_coef, give a --kl_target, or lower --actor_learning_rate or --ppo_epochs",
           is_main=True),
    Metric("k3", "actor", "nats per answer", "the same KL by the estimator that is never below 0", "as `kl`",
           "far above `kl`: a few tokens have become far less likely; see `kl`", low=0),
    Metric("kl_coef", "actor", "score per nat",
           "beta of the PPO step: --kl_coef, or where --kl_target has steered it", "steady near the end",
           "grows without end: --kl_target cannot be held, lower --actor_learning_rate", low=0),
    Metric("score_minus_kl", "actor", "score", "`score` less `kl_coef` times `kl`", "rises",
           "falls while `score` rises: the KL costs more than the score gains; lower --actor_learning_rate"),
    Metric("entropy", "actor", "nats per token", "entropy of the policy",
           "falls slowly; within --min_entropy_ratio",
           "raise --kl_coef, set --entropy_coef (0.01), or lower --actor_learning_rate", low=0,
           is_main=True),
    Metric("policy_loss", "actor", "", "clipped policy loss, the mean over the optimiser steps",
           "near 0: its size says nothing"),
    Metric("kl_loss", "actor", "nats per token", "KL term with --kl_in loss, before its coefficient",
           "as `kl`"),
    Metric("unsup_loss", "actor", "nats per token", "loss of the texts that are learned beside the answers",
           "steady, or falls", "rises: raise --unsup_coef"),
    Metric("approx_kl", "actor", "nats per token",
           "how far the update moved the policy: half the mean squared log-ratio", "1e-4 to 0.02",
           "larger: lower --actor_learning_rate or --ppo_epochs, or set --target_approx_kl; 0: nothing "
           "moves, raise --actor_learning_rate", low=0, high=0.05),
    Metric("approx_k3", "actor", "nats per token", "the same by the estimator k3", "as `approx_kl`",
           "see `approx_kl`", low=0, high=0.05),
    Metric("clip_fraction", "actor", "share of tokens", "tokens whose ratio is outside the clip range",
           "below 0.3",
           "larger: the update is too large for --ppo_epochs; --target_approx_kl ends such updates early",
           low=0, high=0.3),
    Metric("ratio_mean", "actor", "", "mean ratio of new to old probability", "near 1", "see `approx_kl`",
           low=0.9, high=1.1),
    Metric("ratio_max", "actor", "", "largest such ratio", "below 10", "see `approx_kl`", low=0, high=10),
    Metric("first_minibatch_ratio_error", "actor", "",
           "largest distance of a ratio from 1 before anything was learned", "0", "a bug: please report it",
           low=0, high=0),
    Metric("advantage_mean", "actor", "score", "mean advantage of a token before whitening", "near 0"),
    Metric("advantage_std", "actor", "score", "standard deviation of the advantages before whitening",
           "above 0", "0: all answers count alike and nothing is learned; look at `score_std`", low=0),
    Metric("actor_grad_norm", "actor", "", "norm of the actor's last gradient before it is clipped",
           "of one size for most of the run", "grows from step to step: lower --actor_learning_rate", low=0),
    Metric("actor_lr", "actor", "", "learning rate of the actor's next optimiser step",
           "as the schedule has it", low=0),
    Metric("value_loss", "critic", "score\u00b2", "clipped value loss, the mean over the optimiser steps",
           "falls",
           "rises: lower --critic_learning_rate, or bring scores to one scale (--score_normalization)",
           low=0, is_main=True),
    Metric("value_clip_fraction", "critic", "share of tokens", "values that moved beyond --value_clip",
           "below 0.3",
           "larger: lower --critic_learning_rate, or bring scores to one scale (--score_normalization)",
           low=0, high=0.3),
    Metric("explained_variance", "critic", "share",
           "share of the returns' variance that the critic explains, before the update",
           "above 0, rising towards 1",
           "below 0 for long: the critic lags; raise --critic_learning_rate, or let the actor wait for it "
           "(--critic_warmup_steps)", low=0, high=1),
    Metric("return_mean", "critic", "score", "mean return of a token", "follows `score`"),
    Metric("return_std", "critic", "score", "standard deviation of the returns", "above 0", low=0),
    Metric("critic_grad_norm", "critic", "", "norm of the critic's last gradient before it is clipped",
           "of one size for most of the run", "grows from step to step: lower --critic_learning_rate",
           low=0),
    Metric("critic_lr", "critic", "", "learning rate of the critic's next optimiser step",
           "as the schedule has it", low=0),
)
_EVALUATION = (
    Metric("eval_score", "eval", "score", "`score` of an evaluation", "rises with `score`",
           "flat or falling while `score` rises: the policy learns the training prompts; more prompts, "
           "fewer --num_train_epochs"),
    Metric("eval_score_stderr", "eval", "score",
           "standard error of `eval_score`, the answers to one prompt taken together",
           "small beside the gain in `eval_score`", "larger: more --num_eval_prompts", low=0),
    Metric("eval_score_minus_kl", "eval", "score", "`eval_score` less `kl_coef` of the line times `eval_kl`",
           "rises", "see `score_minus_kl`"),
    Metric("eval_objective", "eval", "score",
           "what the best actor is chosen by: shaped scores less the first beta times the KL", "rises",
           "falls: the best actor is behind; make the next run shorter, or raise --kl_coef"),
    Metric("eval_rollout_difference", "eval", "nats", "`rollout_logprob_diff` of the evaluation's answers",
           "below --rollout_tolerance", "beyond it --rollout_on_mismatch decides", low=0, high=0.05),
    Metric("eval_guard_score", "eval", "score", "mean score of the answers by the second reward model, raw",
           "rises with `eval_score`",
           "take the best actor, raise --kl_coef, or train the reward model on more or other comparisons"),
    Metric("eval_guard_score_stderr", "eval", "score", "standard error of `eval_guard_score`",
           "small beside the change in `eval_guard_score`", "larger: more --num_eval_prompts", low=0),
)
_SPEED = (
    Metric("tokens_per_second", "speed", "tokens/s",
           "tokens read or written, padding left out, of all ranks, over the time of the step without "
           "evaluation and saving", "steady", "falls: see which of the seconds grow; docs/performance.md",
           low=0, steps=STEPS),
    Metric("flops_per_second", "speed", "FLOP/s", "operations that the models need, over the same time",
           "steady", low=0, steps=STEPS),
    Metric("peak_share", "speed", "share",
           "`flops_per_second` of a rank over the matrix products that its device was measured to do",
           "0.3 and more on a GPU", "low: larger micro-batches; docs/performance.md", low=0, steps=STEPS),
    Metric("seconds_data", "speed", "s", "waiting for the next batch", "near 0",
           "larger: the disk of --data_output_path is slow", low=0, steps=SUPERVISED),
    Metric("seconds_forward_backward", "speed", "s", "forward and backward passes", low=0, steps=SUPERVISED),
    Metric("seconds_optimizer", "speed", "s", "the optimiser step", "less than `seconds_forward_backward`",
           "larger: fewer, larger optimiser steps; --offload makes them slow", low=0, steps=SUPERVISED),
    Metric("seconds_generation", "speed", "s", "sampling answers", low=0),
    Metric("seconds_experience", "speed", "s",
           "the passes of actor, reference, critic and reward model over the answers", low=0),
    Metric("seconds_training", "speed", "s", "the updates of actor and critic", low=0),
    Metric("seconds_evaluation", "speed", "s",
           "that of the line; in steps 1, 2 and DPO those since the step before, with --eval_command", "",
           "long: a larger --eval_interval, fewer held-out rows or prompts", low=0, steps=STEPS),
    Metric("seconds_saving", "speed", "s", "checkpoints and best models since the step before", "",
           "long: a larger --save_interval", low=0, steps=STEPS),
    Metric("peak_memory_gib", "speed", "GiB",
           "most memory that rank 0 has used: of its device, on a CPU resident",
           "steady after the first steps", "grows: please report it", low=0),
)

METRICS: tuple[Metric, ...] = (
    *_SUPERVISED, *_PPO,
    Metric(f"{MEASURED}NAME", "eval_command", "", "a number of it, in a line of its own", steps=STEPS),
    *(  # what an evaluation measures as a rollout does
        replace(entry, name=f"eval_{entry.name}", group="eval", meaning=f"`{entry.name}` of an evaluation")
        for entry in _PPO
        if entry.name in (
            "score_NAME", "kl", "k3", "entropy", "answer_length", "eos_share", "nonfinite_scores"
        )
    ),
    *_EVALUATION, *_SPEED,
)
"""The entries of all steps, in the order of docs/metrics.md."""
# fmt: on
