"""What scripts/migrate.py knows of other projects beside the names of their flags: values and defaults."""

from __future__ import annotations

import re
from collections.abc import Callable

Words = dict[str, str]
"""Values by the name of our flag, without a prefix where step 3 has one for each model."""
Rule = Callable[[str], tuple[Words, str]]
"""A value of theirs to ours, and what there is to say."""

TRUE = ("true", "yes", "1", "")
LENGTHS = ("max_length", "max_seq_length", "max_len", "cutoff_len", "model_max_length")
"""What others call the length of prompt and answer together."""


def is_true(value: str) -> bool:
    """Whether a switch is on; a flag without a value is."""
    return value.lower() in TRUE


def _switch(flag: str, on: str, off: str | None = None) -> Rule:
    """A switch of theirs as a value of ours."""

    def rule(value: str) -> tuple[Words, str]:
        chosen = on if is_true(value) else off
        return ({flag: chosen} if chosen else {}), ""

    return rule


def _choice(flag: str, values: Words, otherwise: str) -> Rule:
    """Names of theirs for values of ours; an empty name of ours is the default."""

    def rule(value: str) -> tuple[Words, str]:
        ours = values.get(value.lower())
        if ours is None:
            return {}, f"{value}: {otherwise}"
        return ({flag: ours} if ours else {}), "" if ours else "the default here"

    return rule


def _tuner(value: str) -> tuple[Words, str]:
    if value in ("lora", "qlora"):
        return {"only_optimize_lora": "true"}, "adapters alone are trained"
    return {}, "all weights are trained" if value == "full" else f"{value} is not there: LoRA or all weights"


def _targets(value: str) -> tuple[Words, str]:
    if value in ("all", "all-linear"):
        return {}, "all linear layers, the default here"
    return {"lora_module_name": value.replace(" ", ",")}, ""


def _deepspeed(value: str) -> tuple[Words, str]:
    """A file of settings by its name, such as ds_z3_offload_config.json; DeepSpeed-Chat's switch has none."""
    if value in TRUE:
        return {}, "DeepSpeed is always used"
    stage = re.search(r"z(?:ero)?_?([0-3])", value)
    if stage is None:
        return (
            {},
            f"{value} is not read: --zero_stage, --offload, and --deepspeed_config_override for the rest",
        )
    offload = {"offload": "true"} if "offload" in value else {}
    return {"zero_stage": stage[1], **offload}, f"by the name of {value}"


def _plugin(value: str) -> tuple[Words, str]:
    stages = {"ddp": "0", "zero2": "2", "zero2_cpu": "2", "gemini": "3", "gemini_auto": "3"}
    if value not in stages:
        return {}, f"{value}: see --tensor_parallel_size and --pipeline_parallel_size"
    return {"zero_stage": stages[value], **({"offload": "true"} if value == "zero2_cpu" else {})}, ""


def _datasets(value: str) -> tuple[Words, str]:
    names = value.replace(",", " ")
    return {"data_path": names}, "names of a registry are not known here: give hub ids or files"


def _four_bits(value: str) -> tuple[Words, str]:
    return ({"load_in_4bit": "true"}, "") if value == "4" else ({}, f"{value} bits are not there, 4 are")


def _trackers(value: str) -> tuple[Words, str]:
    if value in ("none", "", "[]"):
        return {}, "without the flag nothing is sent"
    return {"report_to": value.replace(",", " ")}, ""


def _renamed(flag: str) -> Rule:
    return lambda value: ({flag: value}, "")


def _nothing(text: str) -> Rule:
    return lambda value: ({}, text)


DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
}
ATTENTION = {"fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "fa3": "flash_attention_3"}
ATTENTION |= {name: name for name in ("flash_attention_2", "flash_attention_3", "sdpa", "eager")}
ATTENTION |= {"auto": "", "disabled": "eager"}

RULES: dict[str, Rule] = {
    "bf16": _switch("dtype", "bf16"),
    "fp16": _switch("dtype", "fp16"),
    "pure_bf16": _switch("dtype", "bf16"),
    **dict.fromkeys(
        ("torch_dtype", "dtype", "mixed_precision", "precision"),
        _choice("dtype", DTYPES | {"auto": ""}, "--dtype is bf16, fp16 or fp32"),
    ),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type"), _tuner),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules"), _targets),
    "use_peft": _switch("only_optimize_lora", "true"),
    "packing": _switch("packing", "on", "off"),
    "deepspeed": _deepspeed,
    "plugin": _plugin,
    "dataset": _datasets,
    **dict.fromkeys(
        ("flash_attn", "attn_implementation", "attn_impl"),
        _choice("attn_implementation", ATTENTION, "--attn_implementation has other choices"),
    ),
    "use_flash_attn": _switch("attn_implementation", "flash_attention_2"),
    **dict.fromkeys(("quantization_bit", "bits"), _four_bits),
    **dict.fromkeys(
        ("pref_loss", "loss_type"),
        _choice(
            "loss_type", {"sigmoid": "sigmoid", "ipo": "ipo", "nll": ""}, "--loss_type is sigmoid or ipo"
        ),
    ),
    "template": _nothing("the template of the tokenizer is used; --chat_template takes a Jinja file"),
    **dict.fromkeys(
        ("stage", "rlhf_type", "do_train", "task_type"),
        _nothing("the program is the step, and always trains"),
    ),
    "report_to": _trackers,
    "use_wandb": _switch("report_to", "wandb"),
    **dict.fromkeys(
        ("total_episodes", "num_episodes"),
        _nothing("--num_train_epochs counts passes over the prompts, each of which has one answer"),
    ),
    "dataset_train_split": _nothing("--data_path NAME:split=SPLIT"),
    "dataset_test_split": _nothing("--eval_data_path NAME:split=SPLIT"),
    **dict.fromkeys(("disable_actor_dropout", "disable_critic_dropout"), _nothing("the default here")),
    "prompt_dataset": _renamed("data_path"),
    "experience_batch_size": _renamed("per_device_generation_batch_size"),
    "num_collect_steps": _renamed("generation_batches"),
    "num_update_steps": _renamed("ppo_epochs"),
    "accumulation_steps": _renamed("gradient_accumulation_steps"),
    "grad_checkpoint": _switch("gradient_checkpointing", "true"),
    "reward_type": _nothing("a reward model scores, and --reward_function FILE.py:NAME is a rule"),
    "plot_loss": _nothing("curves are in TensorBoard and metrics.jsonl"),
    "ddp_timeout": _nothing("ranks wait two hours for each other"),
    "tokenizer_dir": _nothing("the tokenizer is the model's"),
    "conversation_template_config": _nothing(
        "the template of the tokenizer is used; --chat_template takes a file"
    ),
}
"""By the name of their flag."""

ACTOR = ("model_name_or_path", "model", "pretrain", "sft_model_path", "model_name")
"""What others call the model that PPO trains."""
REWARD_MODEL = ("reward_model", "reward_model_path", "rm_pretrain", "rm_checkpoint_path", "reward_pretrain")
"""What others call the reward model, from which our critic starts as well."""

TRL = {"num_train_epochs": "3", "per_device_train_batch_size": "8", "lr_scheduler_type": "linear"}
LLAMA_FACTORY = {**TRL, "learning_rate": "5e-5", "max_seq_len": "2048"}
DEFAULTS: dict[tuple[str, str], Words] = {
    ("DeepSpeed-Chat", "sft"): {"learning_rate": "1e-3", "dtype": "fp16", "dropout": "the model's own"},
    ("DeepSpeed-Chat", "reward"): {"learning_rate": "5e-5", "dtype": "fp16", "dropout": "the model's own"},
    ("DeepSpeed-Chat", "dpo"): {"learning_rate": "1e-3", "dtype": "fp16", "dropout": "the model's own"},
    ("DeepSpeed-Chat", "rlhf"): {
        "actor_learning_rate": "9.65e-6",
        "critic_learning_rate": "5e-6",
        "dtype": "fp16",
        "seed": "none",
        "temperature": "none: it decodes greedily",
    },
    ("TRL", "sft"): {**TRL, "learning_rate": "2e-5", "max_seq_len": "1024", "gradient_checkpointing": "on"},
    ("TRL", "dpo"): {**TRL, "learning_rate": "1e-6", "max_seq_len": "1024", "gradient_checkpointing": "on"},
    ("TRL", "reward"): {
        **TRL,
        "learning_rate": "1e-4",
        "max_seq_len": "1024",
        "gradient_checkpointing": "on",
    },
    ("TRL", "rlhf"): {
        "num_train_epochs": "3",
        "lr_scheduler_type": "linear",
        "actor_learning_rate": "3e-6",
        "critic_learning_rate": "3e-6",
        "kl_coef": "0.05",
        "ppo_epochs": "4",
        "max_answer_seq_len": "53",
        "temperature": "0.7",
    },
    **{("LLaMA-Factory", step): LLAMA_FACTORY for step in ("sft", "reward", "dpo", "rlhf")},
    ("ms-swift", "sft"): {
        "lr_scheduler_type": "cosine",
        "warmup_ratio": "0.05",
        "lora_dim": "8: it trains LoRA",
    },
}
"""Their defaults where ours are others, by our flag; of TRL 1.16, its PPO of 1.12."""
