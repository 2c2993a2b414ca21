"""Flags: batches of steps 1 and 2 and of DPO, and what each of the three has of its own."""

from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Batches of steps 1 and 2, and how often they are evaluated."""

    per_device_train_batch_size: int = flag(
        16, "Rows (step 2: pairs) a rank trains on at once.", at_resume="divided"
    )
    per_device_eval_batch_size: int = flag(
        16, "Rows (step 2: pairs) a rank evaluates at once.", at_resume="free"
    )
    max_tokens_per_batch: int = flag(
        0,
        "Most tokens, padding included, that a rank trains on at once. The rows of an optimiser step stay "
        "--per_device_train_batch_size times --gradient_accumulation_steps a rank, and are divided by this "
        "number instead: many short rows or few long ones at once. 0: by --per_device_train_batch_size.",
    )
    max_seq_len: int = flag(512, "Longest prompt and answer together, in tokens.")
    eval_interval: int = flag(
        0, "Optimiser steps between evaluations; 0 evaluates at the ends of epochs only.", at_resume="free"
    )
    eval_iters: int = flag(
        100, "Batches of an evaluation between epochs; 0, and an epoch's end, take all.", at_resume="free"
    )
    export_model: Literal["best", "last"] = flag(
        "last",
        "Which model is exported: that of the lowest evaluation loss among the evaluations during training "
        "(--eval_interval and the ends of epochs), or that of the last step.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "per_device_train_batch_size", "per_device_eval_batch_size")
        require_at_least(0, self, "eval_interval", "eval_iters", "max_tokens_per_batch")
        require(self.max_seq_len >= 4, f"--max_seq_len must be at least 4 tokens, got {self.max_seq_len}.")


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """Step 1's own settings."""

    sft_only_data_path: list[str] = flag(
        [], "More data sets, used whole and in this step only.", at_resume="free"
    )
    train_on_prompt: bool = flag(False, "Take the loss over the prompt too, not over the answer alone.")
    print_loss: bool = flag(False, "Print the loss of every optimiser step.", at_resume="free")


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Step 2's own settings."""

    loss_fn: Literal["log_sig", "log_exp"] = flag(
        "log_sig",
        "-log sigmoid(chosen - rejected), or log(1 + exp(rejected - chosen)): two forms of one loss.",
    )
    num_padding_at_beginning: int | None = flag(
        None, "Accepted for old scripts and not needed: padding is told by masks.", at_resume="free"
    )


@dataclass(frozen=True, kw_only=True)
class DpoOptions:
    """DPO's own settings, https://arxiv.org/abs/2305.18290."""

    beta: float = flag(
        0.1, "How strongly the policy is held to the reference model; ipo aims at a lead of 1 / (2 beta)."
    )
    label_smoothing: float = flag(
        0.0, "Share of the pairs taken to be labelled the wrong way round (cDPO); for sigmoid alone."
    )
    loss_type: Literal["sigmoid", "ipo"] = flag(
        "sigmoid",
        "DPO's logistic loss, of log-probabilities summed over an answer, or IPO's squared one, of means a "
        "token.",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in CPU memory outside of its passes (ZeRO stage 3: a layer's "
        "pass); once its log-probabilities are computed the model is dropped.",
        at_resume="free",
    )
    sft_only_data_path: list[str] = flag(
        [], "More data sets of pairs, used whole and in this step only.", at_resume="free"
    )
    print_loss: bool = flag(False, "Print the loss of every optimiser step.", at_resume="free")

    def __post_init__(self) -> None:
        require(self.beta > 0, f"--beta must be positive, got {self.beta}; 0.1 is usual.")
        require(
            0 <= self.label_smoothing < 0.5,
            f"--label_smoothing must lie in [0, 0.5), got {self.label_smoothing}: where half the labels are "
            "wrong there is nothing to learn.",
        )
        require(
            self.label_smoothing == 0 or self.loss_type == "sigmoid",
            f"--label_smoothing {self.label_smoothing} is no part of --loss_type {self.loss_type}; leave one "
            "of them out.",
        )
