"""Flags: a trained model, its LoRA adapters and its optimiser."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from dschat.arguments.flags import flag, require, require_at_least


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
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = flag(
        "auto",
        "Which attention of transformers. auto: on a CPU what a timing at the start finds fastest for each "
        "range of widths, else what transformers chooses for the model, mostly sdpa.",
    )
    zero_stage: int = flag(
        0, "What ZeRO shards: 0 nothing, 1 optimiser states, 2 also gradients, 3 also weights."
    )
    tensor_parallel_size: int = flag(
        1, "Ranks that share the weights of each layer; they read the same rows. See docs/parallel.md."
    )
    lora_dim: int = flag(0, "Rank of the LoRA adapters; 0 trains the weights themselves.")
    # With Adam a scale and a learning rate do much the same, so the scale is left at 1 at any rank.
    lora_alpha: float | None = flag(
        None, "LoRA adds alpha / dim times B A to a weight; default: alpha = dim, so that the factor is 1."
    )
    lora_dropout: float = flag(0.0, "Dropout probability of what goes into the adapters.")
    lora_module_name: str = flag(
        "", "Layers that get adapters: parts of their names, separated by commas; default: all linear layers."
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
        return {
            "dropout": self.dropout,
            "load_in_4bit": self.load_in_4bit,
            "attn_implementation": self.attn_implementation,
        }

    def __post_init__(self) -> None:
        p = self.prefix
        require(
            self.zero_stage in (0, 1, 2, 3), f"--{p}zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}."
        )
        require_at_least(1, self, "tensor_parallel_size", prefix=p)
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

    num_train_epochs: float = flag(
        1.0, "Passes over the rows that are used for training, 0.5 for half of one; steps are rounded up."
    )
    gradient_accumulation_steps: int = flag(
        1, "Micro-batches a rank adds up for one optimiser step.", at_resume="divided"
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"
    ] = flag("cosine", "Shape of the learning rate over the run.")
    num_warmup_steps: int = flag(0, "Optimiser steps in which the learning rate rises from 0.")
    warmup_ratio: float | None = flag(
        None, "Share of the run in which it does, in place of --num_warmup_steps; 0.03 to 0.1 are usual."
    )
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
    adam_beta1: float = flag(0.9, "AdamW's decay of the mean of gradients.")
    adam_beta2: float = flag(0.95, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    only_optimize_lora: bool = flag(
        False,
        "Train the adapters (a reward model's head and new tokens' rows too) alone; without it also what "
        "they do not cover: embeddings, norms, biases. A model without adapters is trained whole. In step 3 "
        "and in DPO a model "
        "with nothing but adapters to train is its own reference.",
    )

    def __post_init__(self) -> None:
        require(
            self.num_train_epochs > 0,
            f"--num_train_epochs must be positive, got {self.num_train_epochs:g}; 0.5 is half of one pass.",
        )
        require_at_least(1, self, "gradient_accumulation_steps")
        require_at_least(0, self, "num_warmup_steps", "max_grad_norm")
        require(
            self.warmup_ratio is None or 0 <= self.warmup_ratio <= 1,
            f"--warmup_ratio must lie in [0, 1], got {self.warmup_ratio}: it is a share of the run; "
            "--num_warmup_steps is a number of optimiser steps.",
        )
        require(
            self.warmup_ratio is None or self.lr_scheduler_type != "constant",
            "--lr_scheduler_type constant has no warm-up, so --warmup_ratio has no use; take "
            "constant_with_warmup.",
        )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must lie in [0, 1), got {value}.")
        require(self.adam_epsilon > 0, f"--adam_epsilon must be positive, got {self.adam_epsilon}.")

    def warmup_steps(self, num_training_steps: int) -> int:
        """Optimiser steps of warm-up in a run of so many."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * num_training_steps)
        return min(self.num_warmup_steps, num_training_steps)
