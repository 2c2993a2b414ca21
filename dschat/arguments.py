"""Every flag, declared once: small groups of settings, composed into one frozen object for each step.

A group checks itself, a step's object checks across its groups, and `parse_arguments` turns the command line
into that object. Importing this module does not import torch, so `--help` answers at once.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from dschat.errors import ReadableParser, UserError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")

ROLLOUT_TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Mean difference of log-probabilities, generating against training, in nats a token at temperature 1."""


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_resume: Literal["same", "free", "divided"] = "same",
    **metadata: Any,
) -> Any:
    """A setting that is a command-line flag; without a default it is required.

    at_resume: whether a run that goes on from a checkpoint must have the same value (it decides what is
    learned), is free to have another (it does not, or what it names is compared by its content), or may
    divide the same batches in another way. `metadata` are further settings of argparse.
    """
    metadata = {"help": help, "at_resume": at_resume, "argparse": metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(group_class: type, prefix: str = "", **defaults: Any) -> Any:
    """A group inside a step's object: its flags carry `prefix`, and `defaults` replace the group's own."""
    known = {f.name for f in fields(group_class)}
    assert set(defaults) <= known, f"{group_class.__name__} has no {set(defaults) - known}"
    return field(metadata={"group": group_class, "prefix": prefix, "defaults": defaults})


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least(minimum: float, settings: Any, *names: str, prefix: str = "") -> None:
    """Each named setting must be at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        require(value >= minimum, f"--{prefix}{name} must be at least {minimum}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Where the data comes from and how it is shared between the steps."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "Data sets to blend: hub ids, local .json / .jsonl / .parquet files (also .gz), or saved folders; "
        "NAME:0.3 gives one a weight: training prompts then stand in proportion to the weights (1 without).",
        at_resume="free",
    )
    eval_data_path: list[str] = flag(
        [],
        "Data sets for evaluation; without them what --data_path publishes for it or --eval_fraction.",
        at_resume="free",
    )
    data_format: str | None = flag(
        None, "How rows are read: a layout or a known data set of docs/data.md; default: by their columns."
    )
    prompt_key: str | None = flag(None, "Column of the prompt, where it is not called prompt.")
    chosen_key: str | None = flag(None, "Column of the better answer, where it is not called chosen.")
    rejected_key: str | None = flag(None, "Column of the worse answer, where it is not called rejected.")
    messages_key: str | None = flag(None, "Column of the conversation, where it is not called messages.")
    data_split: str = flag(
        "2,4,4", "Shares of the training prompts for steps 1, 2 and 3; no prompt is in two of them."
    )
    data_output_path: str | None = flag(
        None,
        "Folder of the tokenised data; default: dschat below the user's cache folder, private to the user.",
        at_resume="free",
    )
    eval_fraction: float = flag(
        0.05, "Share of the prompts held out for evaluation, in every step the same, where a source has none."
    )
    max_train_samples: int | None = flag(
        None, "Train on this many rows of the step's share, chosen at random by --seed; default: all."
    )
    preprocessing_num_workers: int | None = flag(
        None, "Processes that tokenise; default: one a CPU core.", at_resume="free"
    )

    @property
    def shares(self) -> tuple[float, float, float]:
        """`--data_split` as three numbers."""
        return tuple(float(part) for part in self.data_split.split(","))

    def __post_init__(self) -> None:
        number = r"\s*\d+(\.\d*)?\s*"
        require(
            re.fullmatch(f"{number},{number},{number}", self.data_split) is not None
            and 0 < sum(self.shares) < float("inf"),
            f"--data_split needs three shares such as 2,4,4 (for steps 1, 2 and 3), got {self.data_split!r}.",
        )
        require(
            0 <= self.eval_fraction < 1,
            f"--eval_fraction must lie in [0, 1), got {self.eval_fraction}; 0.05 holds out every twentieth.",
        )
        for name in ("max_train_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} must be positive, got {value}.")


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Changes to the tokenizer that comes with the model."""

    add_eot_token: bool = flag(False, "Add --eot_token to the vocabulary and end every answer with it.")
    eot_token: str = flag("<|endoftext|>", "The end token that --add_eot_token adds.")
    chat_template: str | None = flag(
        None,
        "Jinja file of the chat template; or plain (Human: / Assistant:), or none (text as it is). Default: "
        "the tokenizer's own, else plain. It is saved with the model: give it in step 1 and then no more.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """One trained model. Step 3 has two of them, their flags prefixed with actor_ and critic_."""

    prefix: str = ""
    model_name_or_path: str = flag(help="Folder or hub id of the model to start from.", at_resume="free")
    learning_rate: float = flag(1e-5, "Peak learning rate.")
    weight_decay: float = flag(0.0, "AdamW's weight decay, not applied to biases and norms.")
    dropout: float = flag(0.0, "Dropout probability; the model's own setting is replaced by it.")
    gradient_checkpointing: bool = flag(
        False, "Recompute activations in the backward pass to save memory.", at_resume="free"
    )
    zero_stage: int = flag(
        0,
        "What ZeRO shards: 0 nothing, 1 optimiser states, 2 also gradients, 3 also weights.",
    )
    lora_dim: int = flag(0, "Rank of the LoRA adapters; 0 trains the weights themselves.")
    # With Adam a scale and a learning rate do much the same, so the scale is left at 1 at any rank.
    lora_alpha: float | None = flag(
        None, "LoRA adds alpha / dim times B A to a weight; default: alpha = dim, so that the factor is 1."
    )
    lora_dropout: float = flag(0.0, "Dropout probability of what goes into the adapters.")
    lora_module_name: str = flag(
        "",
        "Layers that get adapters: parts of their names, separated by commas; default: all linear layers.",
    )
    lora_config: str | None = flag(
        None,
        "JSON file of a PEFT LoraConfig, such as an adapter_config.json: all about the adapters but their "
        "learning rate, in place of the flags for rank, alpha, dropout and layers.",
    )
    lora_learning_rate: float = flag(5e-4, "Peak learning rate of the adapters.")
    load_in_4bit: bool = flag(
        False,
        "QLoRA: hold the weights under the adapters in 4 bits (NF4); needs bitsandbytes, which "
        "pip install 'dschat[qlora]' brings. What is exported is in --dtype again.",
    )

    @property
    def uses_lora(self) -> bool:
        """Whether the model gets adapters."""
        return self.lora_dim > 0 or self.lora_config is not None

    @property
    def loading_options(self) -> dict[str, Any]:
        """What `create_hf_model` and `create_critic_model` take from here."""
        return {"dropout": self.dropout, "load_in_4bit": self.load_in_4bit}

    def __post_init__(self) -> None:
        p = self.prefix
        require(
            self.zero_stage in (0, 1, 2, 3), f"--{p}zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}."
        )
        rates = ("learning_rate", "weight_decay", "lora_dim", "lora_learning_rate")
        require_at_least(0, self, *rates, prefix=p)
        require(
            self.lora_alpha is None or self.lora_alpha > 0,
            f"--{p}lora_alpha must be positive, got {self.lora_alpha}; the same as --{p}lora_dim is usual.",
        )
        require(
            0 <= self.lora_dropout < 1,
            f"--{p}lora_dropout must lie in [0, 1), got {self.lora_dropout}; RLHF uses 0.",
        )
        by_flag = {"lora_dim": 0, "lora_alpha": None, "lora_dropout": 0, "lora_module_name": ""}
        doubled = [f"--{p}{name}" for name, default in by_flag.items() if getattr(self, name) != default]
        require(
            self.lora_config is None or not doubled,
            f"--{p}lora_config {self.lora_config} and {', '.join(doubled)} exclude each other: the file "
            "gives everything (r, lora_alpha, lora_dropout, target_modules); leave one of them out.",
        )
        require(0 <= self.dropout < 1, f"--{p}dropout must lie in [0, 1), got {self.dropout}; RLHF uses 0.")


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments:
    """What the trained models of a step share."""

    num_train_epochs: int = flag(1, "Passes over the training data.")
    gradient_accumulation_steps: int = flag(
        1, "Micro-batches a rank adds up for one optimiser step.", at_resume="divided"
    )
    lr_scheduler_type: Literal[SCHEDULES] = flag("cosine", "Shape of the learning rate over the run.")
    num_warmup_steps: int = flag(0, "Optimiser steps in which the learning rate rises from 0.")
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    adam_beta1: float = flag(0.9, "AdamW's decay of the mean of gradients.")
    adam_beta2: float = flag(0.95, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    only_optimize_lora: bool = flag(
        False,
        "Train the adapters (and a reward model's head) alone; without it also what they do not cover: "
        "embeddings, norms, biases. A model without adapters is trained whole. In step 3 and in DPO a model "
        "with nothing but adapters to train is its own reference.",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_train_epochs", "gradient_accumulation_steps")
        require_at_least(0, self, "num_warmup_steps", "max_grad_norm")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must lie in [0, 1), got {value}.")
        require(self.adam_epsilon > 0, f"--adam_epsilon must be positive, got {self.adam_epsilon}.")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Precision, output and reproducibility."""

    output_dir: str | None = flag(
        None, "Folder for the trained model, logs and metrics; without it nothing is kept.", at_resume="free"
    )
    seed: int = flag(1234, "Decides the data split, the order of the data and every random draw.")
    dtype: Literal["bf16", "fp16", "fp32"] = flag("bf16", "Precision of weights and activations.")
    offload: bool = flag(False, "Keep optimiser states (and at ZeRO stage 3 the weights) in CPU memory.")
    enable_tensorboard: bool = flag(
        True, "Write TensorBoard logs; needs --output_dir or --tensorboard_path.", at_resume="free"
    )
    tensorboard_path: str | None = flag(
        None, "Folder of the TensorBoard logs; default: tensorboard/ in --output_dir.", at_resume="free"
    )
    deterministic: bool = flag(
        False,
        "Let torch use deterministic algorithms alone: slower on a GPU, and an error where there is none.",
    )
    trust_remote_code: bool = flag(
        False,
        "Run Python code that comes with a model or tokenizer; read it first. Without the flag none runs.",
        at_resume="free",
    )
    save_interval: int = flag(0, "Optimiser steps between checkpoints; 0 makes none.", at_resume="free")
    save_minutes: float = flag(0.0, "Minutes between checkpoints; 0 makes none.", at_resume="free")
    save_total_limit: int = flag(
        2,
        "Checkpoints kept, the newest; an older one goes when a newer is complete; 0 keeps all.",
        at_resume="free",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from a checkpoint: latest (also without a value) is the newest intact one in --output_dir, or "
        "the beginning where there is none; or a checkpoint's folder.",
        at_resume="free",
        nargs="?",
        const="latest",
    )
    max_skipped_steps: int = flag(
        20,
        "Optimiser steps in a row that may be skipped for a loss or gradient that is not finite; one more "
        "ends the run. 0: never. The default is more than fp16 skips to find its loss scale.",
        at_resume="free",
    )
    auto_micro_batch: bool = flag(
        False,
        "Where memory runs out, start again with half the micro-batch and twice the accumulation, which "
        "gives the same gradient; from the newest checkpoint, where there is one.",
        at_resume="free",
    )
    local_rank: int = flag(
        -1, "Set by the deepspeed launcher; torchrun sets the environment instead.", at_resume="free"
    )
    deepspeed: bool = flag(False, "Accepted for old scripts: DeepSpeed is always used.", at_resume="free")
    compute_fp32_loss: bool = flag(
        False, "Accepted for old scripts: losses are always computed in fp32.", at_resume="free"
    )
    debug: bool = flag(False, "Show the traceback of an error in the input.", at_resume="free")

    def __post_init__(self) -> None:
        require(
            0 <= self.seed < 2**63,
            f"--seed must lie between 0 and 2**63 - 1, got {self.seed}; 1234 is usual.",
        )
        require_at_least(0, self, "save_interval", "save_minutes", "save_total_limit", "max_skipped_steps")
        for name in ("save_interval", "save_minutes", "resume_from_checkpoint"):
            require(
                not getattr(self, name) or self.output_dir is not None,
                f"--{name} {getattr(self, name)} needs --output_dir, below which checkpoints are.",
            )


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Batches of steps 1 and 2, and how often they are evaluated."""

    per_device_train_batch_size: int = flag(
        16, "Rows (step 2: pairs) a rank trains on at once.", at_resume="divided"
    )
    per_device_eval_batch_size: int = flag(
        16, "Rows (step 2: pairs) a rank evaluates at once.", at_resume="free"
    )
    max_seq_len: int = flag(512, "Longest prompt and answer together, in tokens.")
    eval_interval: int = flag(
        0, "Optimiser steps between evaluations; 0 evaluates at the ends of epochs only.", at_resume="free"
    )
    eval_iters: int = flag(
        100, "Batches of an evaluation between epochs; 0, and an epoch's end, take all.", at_resume="free"
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "per_device_train_batch_size", "per_device_eval_batch_size")
        require_at_least(0, self, "eval_interval", "eval_iters")
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
        "Keep the reference model's weights in CPU memory (ZeRO stage 3) while its log-probabilities are "
        "computed; it is not in memory after that.",
        at_resume="free",
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
    rollout_gather: Literal["auto", "always", "never"] = flag(
        "auto",
        "ZeRO-3: gather the weights once a rollout phase, or a layer at a time; auto looks at free memory.",
        at_resume="free",
    )
    rollout_tolerance: float | None = flag(
        None,
        "Before training, sampled tokens are scored again by the training model: the mean difference of "
        "log-probabilities that passes; 0: no check; default: 1e-4 in fp32, 0.05 in bf16, 0.01 in fp16.",
        at_resume="free",
    )
    rollout_on_mismatch: Literal["stop", "uncached", "warn"] = flag(
        "stop",
        "Beyond that tolerance: end the run, generate without a KV cache (slow), or go on.",
        at_resume="free",
    )
    print_answers: bool = flag(False, "Print some prompts and answers.", at_resume="free")
    print_answers_interval: int = flag(1, "PPO steps between printed answers.", at_resume="free")

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
        if self.has_kl_loss and self.penalised_kl == "k1" and int(os.environ.get("RANK", 0)) == 0:
            print(
                "note: --kl_estimator k1 with --kl_in loss has a gradient that is zero on average and holds "
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
    export_actor: Literal["best", "last"] = flag(
        "best",
        "Which actor the folder actor/ gets: of the best evaluation, or of the last PPO step.",
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


@dataclass(frozen=True, kw_only=True)
class RlhfOptions:
    """Step 3's other settings."""

    reward_model_name_or_path: str | None = flag(
        None,
        "Folder or hub id of the reward model, where it is not the one that the critic starts from.",
        at_resume="free",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in CPU memory (ZeRO stage 3); no use where the actor trains "
        "adapters alone, as it is its own reference then.",
        at_resume="free",
    )
    offload_reward_model: bool = flag(
        False, "Keep the reward model's weights in CPU memory (ZeRO stage 3).", at_resume="free"
    )
    num_padding_at_beginning: int | None = flag(
        None, "Accepted for old scripts and not needed: padding is told by masks.", at_resume="free"
    )
    align_overflow: bool = flag(
        False,
        "In fp16: where gradients of actor or critic overflow, skip the step of both; both models' gradients "
        "are held at one time.",
    )
    enable_test_mode: bool = flag(False, "End after --test_stop_step PPO steps.")
    test_stop_step: int = flag(0, "PPO steps of a run with --enable_test_mode.")


NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
REWARD_MODEL = "model"
"""The name of the reward model among the sources of scores."""


@dataclass(frozen=True, kw_only=True)
class RewardSourceArguments:
    """Scores beside those of a reward model, or in place of one (docs/rewards.md)."""

    reward_function: list[str] = flag(
        [],
        "FILE.py:NAME, ... of Python functions NAME(prompts, answers, **columns) that score answers; without "
        "--critic_model_name_or_path and --reward_model_name_or_path there is no reward model.",
    )
    reward_endpoint: list[str] = flag([], "URLs, ... of servers that score answers, likewise.")
    reward_weights: list[str] = flag(
        [],
        "NAME=NUMBER, ... by which scores are multiplied before they are added: model, a function's name, "
        "endpoint (the second is endpoint_2); default: 1.",
    )
    reward_batch_size: int = flag(
        64, "Answers that a function or an endpoint is given at once.", at_resume="free"
    )
    reward_timeout: float = flag(
        30.0, "Seconds that a function may take for them; what has not returned is ended.", at_resume="free"
    )
    reward_on_error: float = flag(
        0.0, "Score of an answer for which a function raises, hangs, dies or returns no finite number."
    )
    reward_endpoint_timeout: float = flag(
        60.0, "Seconds without a byte from an endpoint before it is asked again.", at_resume="free"
    )
    reward_endpoint_retries: int = flag(
        5,
        "How often an endpoint is asked again, after 1 s, 2 s, 4 s, ..., before the run ends.",
        at_resume="free",
    )

    @property
    def has_sources(self) -> bool:
        """Whether anything but a reward model scores."""
        return bool(self.reward_function or self.reward_endpoint)

    @property
    def endpoints(self) -> dict[str, str]:
        """The endpoints' URLs by their names."""
        names = ["endpoint", *(f"endpoint_{n}" for n in range(2, len(self.reward_endpoint) + 1))]
        return dict(zip(names, self.reward_endpoint, strict=False))

    @property
    def names(self) -> list[str]:
        """The names of the functions, then of the endpoints."""
        return [spec.rpartition(":")[2] for spec in self.reward_function] + list(self.endpoints)

    @property
    def given_weights(self) -> dict[str, float]:
        """`--reward_weights` by name."""
        pairs = [entry.partition("=") for entry in self.reward_weights]
        return {name: float(number) for name, _, number in pairs}

    def __post_init__(self) -> None:
        for spec in self.reward_function:
            file, _, name = spec.rpartition(":")
            require(
                file.endswith(".py") and name.isidentifier(),
                f"--reward_function {spec!r} must be FILE.py:NAME, such as "
                "step3_ppo/rewards/gsm8k.py:exact_answer.",
            )
        for url in self.reward_endpoint:
            require(
                re.match(r"https?://[^/\s]", url) is not None,
                f"--reward_endpoint {url!r} must be a URL, such as http://localhost:8000/score.",
            )
        for entry in self.reward_weights:
            require(
                re.fullmatch(rf"\w+={NUMBER}", entry, re.IGNORECASE) is not None,
                f"--reward_weights {entry!r} must be NAME=NUMBER, such as model=0.5.",
            )
        require(
            self.has_sources or not self.reward_weights,
            "--reward_weights weighs scores against each other, and the reward model is alone; give "
            "--reward_function or --reward_endpoint, or leave it out.",
        )
        known = [REWARD_MODEL, *self.names]
        twice = [name for name in known if known.count(name) > 1]
        require(
            not twice,
            f"--reward_function: two sources of scores are called {twice[:1]}; weights and metrics go by "
            f"name ({REWARD_MODEL} is the reward model): call the function otherwise.",
        )
        require_at_least(1, self, "reward_batch_size")
        require_at_least(0, self, "reward_endpoint_retries")
        for name in ("reward_timeout", "reward_endpoint_timeout"):
            value = getattr(self, name)
            require(0 < value < 1e6, f"--{name} must be positive, got {value}; it is in seconds.")
        require(
            abs(self.reward_on_error) < float("inf"),
            f"--reward_on_error must be a finite number, got {self.reward_on_error}; 0 is usual.",
        )


def check_offload(offload: bool, *models: ModelArguments) -> None:
    """DeepSpeed offloads optimiser states only where ZeRO shards them."""
    for model in models:
        require(
            not offload or model.zero_stage > 0,
            f"--offload needs --{model.prefix}zero_stage 1, 2 or 3, got 0; add --{model.prefix}zero_stage 2.",
        )


def check_lora(only_optimize_lora: bool, *models: ModelArguments) -> None:
    """Adapters alone can be trained where there are some."""
    names = " or ".join(f"--{model.prefix}lora_dim" for model in models)
    require(
        not only_optimize_lora or any(model.uses_lora for model in models),
        f"--only_optimize_lora needs adapters to train; add {names}, for example 64, or a LoRA file.",
    )


def check_4bit(run: RunArguments, only_optimize_lora: bool, *models: ModelArguments) -> None:
    """Weights in 4 bits are not trained, and DeepSpeed can neither shard nor offload nor halve them."""
    for model in models:
        p, given = model.prefix, f"--{model.prefix}load_in_4bit"
        if not model.load_in_4bit:
            continue
        require(
            model.uses_lora,
            f"{given} needs adapters to train, as 4-bit weights cannot be; add --{p}lora_dim 64 or "
            f"--{p}lora_config.",
        )
        require(
            only_optimize_lora,
            f"{given} trains the adapters alone; add --only_optimize_lora.",
        )
        require(
            model.zero_stage < 3,
            f"{given} cannot be combined with --{p}zero_stage 3, which would shard packed weights; use "
            f"--{p}zero_stage 2.",
        )
        require(
            not run.offload,
            f"{given} cannot be combined with --offload, and adapters have small optimiser states; leave out "
            "--offload.",
        )
        require(
            run.dtype != "fp16",
            f"{given} cannot be combined with --dtype fp16: such a model cannot be cast; use --dtype bf16.",
        )


def note_padding_flag(value: int | None) -> None:
    """Say once that `--num_padding_at_beginning` changes nothing."""
    if value is not None and int(os.environ.get("RANK", 0)) == 0:
        print("note: --num_padding_at_beginning is not needed and ignored: padding is told by masks.")


@dataclass(frozen=True, kw_only=True)
class SftArguments:
    """Step 1."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments)
    batch: BatchArguments = group(BatchArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    sft: SftOptions = group(SftOptions)
    run: RunArguments = group(RunArguments)

    def __post_init__(self) -> None:
        check_offload(self.run.offload, self.model)
        check_lora(self.optimizer.only_optimize_lora, self.model)
        check_4bit(self.run, self.optimizer.only_optimize_lora, self.model)


@dataclass(frozen=True, kw_only=True)
class RewardArguments:
    """Step 2."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments, learning_rate=9e-6)
    batch: BatchArguments = group(BatchArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    reward: RewardOptions = group(RewardOptions)
    run: RunArguments = group(RunArguments)

    def __post_init__(self) -> None:
        check_offload(self.run.offload, self.model)
        check_lora(self.optimizer.only_optimize_lora, self.model)
        check_4bit(self.run, self.optimizer.only_optimize_lora, self.model)
        note_padding_flag(self.reward.num_padding_at_beginning)


@dataclass(frozen=True, kw_only=True)
class DpoArguments:
    """DPO on the pairs of step 2, in place of steps 2 and 3."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments, learning_rate=5e-7, lora_learning_rate=5e-6)
    batch: BatchArguments = group(BatchArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    dpo: DpoOptions = group(DpoOptions)
    run: RunArguments = group(RunArguments)

    def __post_init__(self) -> None:
        check_offload(self.run.offload, self.model)
        check_lora(self.optimizer.only_optimize_lora, self.model)
        check_4bit(self.run, self.optimizer.only_optimize_lora, self.model)
        require(
            not self.dpo.offload_reference_model or self.model.zero_stage == 3,
            "--offload_reference_model needs --zero_stage 3: a smaller stage shards no weights.",
        )


@dataclass(frozen=True, kw_only=True)
class RlhfArguments:
    """Step 3."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    actor: ModelArguments = group(ModelArguments, "actor_", learning_rate=1e-6)
    critic: ModelArguments = group(ModelArguments, "critic_", learning_rate=9e-6, model_name_or_path=None)
    optimizer: OptimizerArguments = group(OptimizerArguments, num_warmup_steps=100, adam_epsilon=1e-5)
    rollout: RolloutArguments = group(RolloutArguments)
    ppo: PpoArguments = group(PpoArguments)
    text: TextArguments = group(TextArguments)
    guard: GuardArguments = group(GuardArguments)
    rewards: RewardSourceArguments = group(RewardSourceArguments)
    rlhf: RlhfOptions = group(RlhfOptions)
    run: RunArguments = group(RunArguments)

    @property
    def rollout_size(self) -> int:
        """Answers a rank samples before each training phase."""
        return self.rollout.per_device_generation_batch_size * self.rollout.generation_batches

    @property
    def rollout_tolerance(self) -> float:
        """The mean difference in nats that passes the rollout check, 0 without one.

        The defaults are a few times what rounding makes of deep models. A temperature below 1 enlarges it.
        """
        if self.rollout.rollout_tolerance is not None:
            return self.rollout.rollout_tolerance
        return ROLLOUT_TOLERANCES[self.run.dtype] / min(1, self.rollout.temperature)

    @property
    def records_rollout_logprobs(self) -> bool:
        """Whether anything needs the log-probabilities with which tokens were sampled."""
        return self.rollout_tolerance > 0 or self.ppo.rollout_correction != "none"

    @property
    def aligns_overflow(self) -> bool:
        """Whether actor and critic skip optimiser steps together."""
        return self.rlhf.align_overflow and self.run.dtype == "fp16" and self.ppo.has_critic

    @property
    def reward_path(self) -> str | None:
        """Where the reward model is, None where other sources alone score."""
        return self.rlhf.reward_model_name_or_path or self.critic.model_name_or_path

    @property
    def model_paths(self) -> list[str]:
        """Where the models are that step 3 starts from."""
        guard = self.guard.guard_reward_model_name_or_path
        paths = (self.actor.model_name_or_path, self.critic.model_name_or_path, self.reward_path, guard)
        return [path for path in paths if path]

    @property
    def starting_critic(self) -> ModelArguments:
        """The critic's settings; without a model of its own it starts from the actor's."""
        path = self.critic.model_name_or_path or self.actor.model_name_or_path
        return dataclasses.replace(self.critic, model_name_or_path=path)

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of every source of scores, by name."""
        names = [*([REWARD_MODEL] if self.reward_path else []), *self.rewards.names]
        return {**dict.fromkeys(names, 1.0), **self.rewards.given_weights}

    def _check_scores(self) -> None:
        has_model = self.reward_path is not None
        require(
            has_model or self.rewards.has_sources,
            "nothing scores the answers: give the reward model of step 2 with --critic_model_name_or_path, "
            "a Python function with --reward_function FILE.py:NAME, or --reward_endpoint URL.",
        )
        known = [*([REWARD_MODEL] if has_model else []), *self.rewards.names]
        unknown = [name for name in self.rewards.given_weights if name not in known]
        require(
            not unknown,
            f"--reward_weights: no source of scores is called {', '.join(unknown)}; there are "
            f"{', '.join(known)}.",
        )
        require(
            has_model or self.ppo.score_scale != "step2",
            "--score_normalization step2 (--normalize_scores) is for the scores of a reward model, and there "
            "is none; use running, or leave it out.",
        )

    @property
    def reward_flag(self) -> str:
        """The flag that says so."""
        return f"--{'reward' if self.rlhf.reward_model_name_or_path else 'critic'}_model_name_or_path"

    @property
    def minibatch_size(self) -> int:
        """Answers a rank contributes to each optimiser step."""
        return self.ppo.per_device_training_batch_size * self.optimizer.gradient_accumulation_steps

    @property
    def updates_per_ppo_step(self) -> int:
        """Optimiser steps that learn from one rollout batch."""
        return self.ppo.ppo_epochs * (self.rollout_size // self.minibatch_size)

    def __post_init__(self) -> None:
        self._check_scores()
        trained = (self.actor, self.critic) if self.ppo.has_critic else (self.actor,)
        check_offload(self.run.offload, *trained)
        check_lora(self.optimizer.only_optimize_lora, *trained)
        check_4bit(self.run, self.optimizer.only_optimize_lora, *trained)
        require(
            not self.ppo.compares_answers or self.rollout.num_samples_per_prompt > 1,
            f"--advantage_estimator {self.ppo.advantage_estimator} compares the answers to one prompt and "
            f"needs --num_samples_per_prompt above 1, got {self.rollout.num_samples_per_prompt}; 4 is usual.",
        )
        note_padding_flag(self.rlhf.num_padding_at_beginning)
        if self.rlhf.align_overflow and not self.aligns_overflow and int(os.environ.get("RANK", 0)) == 0:
            print("note: --align_overflow is ignored: only --dtype fp16 overflows, and it takes a critic.")
        for model in (self.actor, self.critic):
            require(
                model.dropout == 0 and model.lora_dropout == 0,
                f"--{model.prefix}dropout and --{model.prefix}lora_dropout must be 0: PPO compares the "
                "probabilities of one set of weights, and dropout would change them from pass to pass.",
            )
        require(
            self.rollout_size % self.minibatch_size == 0,
            f"a rank samples {self.rollout_size} answers (--per_device_generation_batch_size times "
            f"--generation_batches) but an optimiser step takes {self.minibatch_size} "
            "(--per_device_training_batch_size times --gradient_accumulation_steps): the first must be a "
            f"multiple of the second; --generation_batches {self.minibatch_size} always is.",
        )
        require(
            not self.rlhf.offload_reference_model or self.actor.zero_stage == 3,
            "--offload_reference_model needs --actor_zero_stage 3: a smaller stage shards no weights.",
        )
        require(
            not self.rlhf.offload_reward_model or self.critic.zero_stage == 3,
            "--offload_reward_model needs --critic_zero_stage 3: a smaller stage shards no weights.",
        )
        require(
            not self.rlhf.enable_test_mode or self.rlhf.test_stop_step > 0,
            "--enable_test_mode needs --test_stop_step, the number of PPO steps to run.",
        )


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What scripts/inspect_data.py shows."""

    model_name_or_path: str = flag(help="Folder or hub id of the model whose tokenizer reads the data.")
    max_seq_len: int = flag(512, "Longest prompt and answer together, in tokens, as in steps 1 and 2.")
    num_rows: int = flag(3, "Rows shown of each data set.")
    num_sampled: int = flag(10_000, "Rows of each data set whose tokens are counted; all are read.")
    html: str = flag("inspect_data.html", "The page to write; empty: none.")
    seed: int = flag(1234, "Decides which rows are shown and counted.")
    debug: bool = flag(False, "Show the traceback of an error in the input.", at_resume="free")

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_rows", "num_sampled")
        require(self.max_seq_len >= 4, f"--max_seq_len must be at least 4 tokens, got {self.max_seq_len}.")


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """scripts/inspect_data.py."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    inspect: InspectOptions = group(InspectOptions)


STEPS: dict[str, type] = {
    "sft": SftArguments,
    "reward": RewardArguments,
    "dpo": DpoArguments,
    "rlhf": RlhfArguments,
    "inspect": InspectArguments,
}
StepArguments = SftArguments | RewardArguments | DpoArguments | RlhfArguments
SupervisedArguments = SftArguments | RewardArguments | DpoArguments


class FlagParser(ReadableParser, HfArgumentParser):
    """argparse, with one readable line for an error instead of a screen of usage."""

    def reject_unknown(self, remaining: Sequence[str]) -> None:
        """Raise `UserError` for flags that no group declares, with the name that was probably meant."""
        if remaining:
            name = remaining[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"{remaining[0]!r} belongs to no flag")
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown flag {name}" + (f" (did you mean {close[0]}?)" if close else ""))


def _flat_class(part: dataclasses.Field) -> type:
    """The flags of one group as a flat class that HfArgumentParser understands."""
    prefix, defaults = part.metadata["prefix"], part.metadata["defaults"]
    columns = []
    for f in fields(part.metadata["group"]):
        if "help" not in f.metadata:
            continue
        default, factory = defaults.get(f.name, f.default), f.default_factory
        metadata = {"help": f.metadata["help"], **f.metadata["argparse"]}
        spec = field(default=default, metadata=metadata)
        if factory is not dataclasses.MISSING:
            spec = field(default_factory=factory, metadata=metadata)
        columns.append((prefix + f.name, f.type, spec))
    flat = make_dataclass(f"{part.name}_flags", columns, kw_only=True)
    flat._argument_group_name = f"{part.name} ({' '.join(part.metadata['group'].__doc__.split())})"
    return flat


UNLIMITED = ("max_kl", "max_length_ratio")
"""Limits that inf switches off."""


def _check_numbers(flats: Sequence[Any]) -> None:
    """Raise `UserError` for nan, inf and numbers that no tensor holds."""
    for name, value in (item for flat in flats for item in vars(flat).items()):
        if name in UNLIMITED and value == float("inf"):
            continue
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise UserError(f"--{name} must be a finite number below 2**63, got {value}.")


def parse_arguments(
    step: Literal["sft", "reward", "dpo", "rlhf", "inspect"], argv: Sequence[str] | None = None
) -> StepArguments | InspectArguments:
    """The arguments of a step from the command line (`sys.argv` by default).

    Raises `UserError` for an unknown flag, a value of the wrong type, and settings that cannot work together.
    """
    parts = fields(STEPS[step])
    parser = FlagParser([_flat_class(part) for part in parts], allow_abbrev=False)
    *flats, remaining = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    parser.reject_unknown(remaining)
    _check_numbers(flats)
    groups = {}
    for part, flat in zip(parts, flats, strict=True):
        prefix = part.metadata["prefix"]
        values = {f.name.removeprefix(prefix): getattr(flat, f.name) for f in fields(flat)}
        if prefix:
            values["prefix"] = prefix
        groups[part.name] = part.metadata["group"](**values)
    return STEPS[step](**groups)


def write_arguments(arguments: StepArguments, path: Path) -> None:
    """Keep what a run was started with, as JSON, one object a group."""
    path.write_text(json.dumps(dataclasses.asdict(arguments), indent=2) + "\n")


@dataclass(frozen=True)
class Setting:
    """A flag of a run."""

    value: Any
    default: Any
    at_resume: Literal["same", "free", "divided"]


def settings(arguments: StepArguments) -> dict[str, Setting]:
    """Every flag of a step, by name; the default of a required one is MISSING."""
    found = {}
    for part in fields(arguments):
        for f in fields(part.metadata["group"]):
            if "help" not in f.metadata:
                continue
            default = part.metadata["defaults"].get(f.name, f.default)
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            value = getattr(getattr(arguments, part.name), f.name)
            found[part.metadata["prefix"] + f.name] = Setting(value, default, f.metadata["at_resume"])
    return found


def changed_flags(arguments: StepArguments) -> dict[str, Any]:
    """The flags whose values are not their defaults, by name; those without a default are among them."""
    return {
        name: setting.value
        for name, setting in settings(arguments).items()
        if setting.value != setting.default and name not in ("local_rank", "resume_from_checkpoint")
    }


def global_sizes(arguments: StepArguments, world_size: int) -> dict[str, int]:
    """What stays the same however ranks and micro-batches divide it, by the flags whose product it is."""
    if isinstance(arguments, RlhfArguments):
        return {
            "--per_device_generation_batch_size x --generation_batches": arguments.rollout_size * world_size,
            "--per_device_training_batch_size x --gradient_accumulation_steps": arguments.minibatch_size
            * world_size,
        }
    rows = arguments.batch.per_device_train_batch_size * arguments.optimizer.gradient_accumulation_steps
    return {"--per_device_train_batch_size x --gradient_accumulation_steps": rows * world_size}
