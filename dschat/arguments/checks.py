"""Checks across groups, and a note, that several steps share."""

from dschat.arguments.flags import require
from dschat.arguments.model import ModelArguments
from dschat.arguments.rollout import RolloutArguments
from dschat.arguments.run import RunArguments
from dschat.console import messages


def check_engines(run: RunArguments, *models: ModelArguments) -> None:
    """DeepSpeed offloads optimiser states only where ZeRO shards them, and ZeRO++ is for ZeRO-3."""
    stages = [f"--{model.prefix}zero_stage 3" for model in models]
    for text in run.needs_stage_3:
        require(any(model.zero_stage == 3 for model in models), f"{text} needs {' or '.join(stages)}.")
    shared = [f"--{m.prefix}tensor_parallel_size" for m in models if m.tensor_parallel_size > 1]
    for text in run.over_neighbours:
        require(
            not shared,
            f"{text} cannot be combined with {' and '.join(shared)}: DeepSpeed groups "
            "neighbouring ranks for it, and those share layers; leave one of them out.",
        )
    adapters = " or ".join(f"--{model.prefix}lora_dim" for model in models)
    require(
        not run.enable_mixed_precision_lora or any(model.uses_lora for model in models),
        f"--enable_mixed_precision_lora shards the weights under adapters in 8 bits; add {adapters}, for "
        "example 64.",
    )
    for model in models:
        require(
            not run.offload or model.zero_stage > 0,
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
        require(only_optimize_lora, f"{given} trains the adapters alone; add --only_optimize_lora.")
        require(
            model.zero_stage < 3,
            f"{given} cannot be combined with --{p}zero_stage 3, which would shard packed weights; use "
            f"--{p}zero_stage 2.",
        )
        require(
            model.tensor_parallel_size == 1,
            f"{given} cannot be combined with --{p}tensor_parallel_size, which would cut packed weights; "
            "leave one of them out.",
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


def check_tensor_sizes(actor: ModelArguments, critic: ModelArguments, rollout: RolloutArguments) -> None:
    """Step 3's models have one number of tensor ranks, or one rank; pages of keys and values, all heads."""
    sizes = (actor.tensor_parallel_size, critic.tensor_parallel_size)
    require(
        1 in sizes or len(set(sizes)) == 1,
        f"--actor_tensor_parallel_size {sizes[0]} and --critic_tensor_parallel_size {sizes[1]} must be "
        "equal, or one of them 1: the ranks are divided once.",
    )
    require(
        actor.tensor_parallel_size == 1 or rollout.rollout_backend != "continuous",
        "--rollout_backend continuous cannot be combined with --actor_tensor_parallel_size: its pages "
        "are for all heads, of which a rank has a part; leave one of them out.",
    )


def note_padding_flag(value: int | None) -> None:
    """Say once that `--num_padding_at_beginning` changes nothing."""
    if value is not None:
        messages.note("--num_padding_at_beginning is not needed and ignored: padding is told by masks.")


def note_truncated_sampling(rollout: RolloutArguments) -> None:
    """Say that nothing accounts for what top-k and top-p leave out, where one of them is on."""
    top_k = [f"--top_k {rollout.top_k}"] if rollout.top_k > 0 else []
    top_p = [f"--top_p {rollout.top_p}"] if rollout.top_p < 1 else []
    if top_k or top_p:
        messages.note(
            f"answers are sampled with {' and '.join(top_k + top_p)}; PPO's ratios, KL and "
            "--rollout_correction are those of the whole softmax, and what was cut off is not corrected for "
            "(docs/ppo.md)."
        )
