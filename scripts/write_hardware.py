"""Write docs/hardware_table.md: which flags make known models fit on which GPUs, by the planner.

python scripts/write_hardware.py         writes the page; a test says when it is stale

The models are the configurations below: nothing is downloaded, and no weights are made.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from dschat.arguments import parse_arguments
from dschat.planning.hardware import Hardware
from dschat.planning.models import supervised_specs
from dschat.planning.plan import GB, Plan, plan_of
from dschat.planning.savings import changed, fitting
from dschat.rlhf.roles import engine_specs

PAGE = ROOT / "docs" / "hardware_table.md"
GPUS, MEMORIES = (1, 8, 64), (40, 80, 141)
START = """\
# Which models fit on which GPUs

Written by `scripts/write_hardware.py` from the configurations in it, with the planner of
[hardware.md](hardware.md). **Planned, not measured on a GPU.**

Everything is in bf16, without tensor or pipeline parallelism. Steps 1 and 2 have {rows} rows (pairs) of
{length} tokens per device and optimiser step, PPO {rows} answers of {half} tokens to prompts of as many.
The critic and the reward model of OPT are OPT-350m, those of Llama Llama-3.2-1B. A host has 8 GPUs, and
memory for all that is offloaded to it: `dschat plan` says how much that is.

A cell has the setting that costs least time of those that fit, in the order of `dschat plan --fit`, and the
GB that it takes: Z0 to Z3 is `--zero_stage`, "ck" `--gradient_checkpointing`, "off" `--offload`, and "2x2"
two micro-batches of two rows (`--per_device_train_batch_size 2 --gradient_accumulation_steps 2`).
"""
ROWS, LENGTH = 4, 1024


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> PretrainedConfig:
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return OPTConfig(**{**shape, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, **more})


def _llama(
    hidden: int, layers: int, heads: int, key_heads: int, wide: int, vocabulary: int, **more: Any
) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=wide,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        **more,
    )


CONFIGS = {
    "OPT-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "OPT-1.3b": _opt(2048, 24, 32),
    "OPT-2.7b": _opt(2560, 32, 32),
    "OPT-6.7b": _opt(4096, 32, 32),
    "OPT-13b": _opt(5120, 40, 40),
    "OPT-30b": _opt(7168, 48, 56),
    "OPT-66b": _opt(9216, 64, 72),
    "OPT-175b": _opt(12288, 96, 96),
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True),
    "Llama-2-7B": _llama(4096, 32, 32, 32, 11008, 32000),
    "Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256),
}
SHOWN = tuple(name for name in CONFIGS if name not in ("OPT-350m", "Llama-3.2-1B", "Llama-2-7B"))
IN_PPO = ("Llama-3.2-1B", "Llama-2-7B", "Llama-3-8B")
STEPS = {"sft": "Step 1, supervised fine-tuning", "reward": "Step 2, reward model", "rlhf": "Step 3, PPO"}


@cache
def arguments(step: str, model: str) -> Any:
    """The arguments of a step with a model, before anything is changed to make it fit."""
    shared = ["--data_path=data", "--dtype=bf16", "--gradient_accumulation_steps=1"]
    if step != "rlhf":
        sizes = [f"--per_device_train_batch_size={ROWS}", f"--max_seq_len={LENGTH}"]
        return parse_arguments(step, [f"--model_name_or_path={model}", *sizes, *shared])
    critic = "OPT-350m" if model.startswith("OPT") else "Llama-3.2-1B"
    models = [f"--actor_model_name_or_path={model}", f"--critic_model_name_or_path={critic}"]
    lengths = [f"--max_{part}_seq_len={LENGTH // 2}" for part in ("prompt", "answer")]
    sizes = [f"--per_device_{part}_batch_size={ROWS}" for part in ("generation", "training")]
    return parse_arguments("rlhf", [*models, *lengths, *sizes, *shared])


def plan(args: Any, gpus: int, memory: float = 0.0) -> Plan:
    """The plan on so many GPUs of so many GB."""
    hardware = Hardware(device="cuda", ranks=gpus, ranks_per_host=min(gpus, 8), device_memory=memory * GB)
    specs = engine_specs(args) if args.step == "rlhf" else supervised_specs(args)
    return plan_of(args, specs, hardware, configs=CONFIGS)


def cell(step: str, model: str, gpus: int, memory: int) -> str:
    """The cheapest setting that fits."""
    prefixes = ("actor_", "critic_") if step == "rlhf" else ("",)
    found = fitting(arguments(step, model), prefixes, lambda args: plan(args, gpus, memory), with_lora=False)
    if found is None:
        return "-"
    flags, planned = found
    size = flags["per_device_training_batch_size" if step == "rlhf" else "per_device_train_batch_size"]
    words = [f"Z{flags[prefixes[0] + 'zero_stage']}"]
    words += ["ck"] * flags[prefixes[0] + "gradient_checkpointing"] + ["off"] * flags["offload"]
    return f"{' '.join(words)} {size}x{ROWS // size}: {planned.peak / GB:.0f}"


def row(step: str, model: str) -> str:
    """A line of a step's table."""
    cells = [cell(step, model, gpus, memory) for gpus in GPUS for memory in MEMORIES]
    return f"| {model} | {' | '.join(cells)} |"


def step_table(step: str) -> list[str]:
    """A step's heading and table; "-" is what does not fit."""
    heads = [f"{gpus} x {memory} GB" for gpus in GPUS for memory in MEMORIES]
    lines = ["", f"## {STEPS[step]}", "", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return [*lines, *(row(step, model) for model in SHOWN), "", '"-": it does not fit.']


WAYS = {
    "full": {},
    "LoRA": {"lora_dim": 64},
    "QLoRA": {"lora_dim": 64, "load_in_4bit": True},
}


def ppo_row(model: str, way: str) -> str:
    """GB of PPO with a model on 1 and on 8 GPUs, by ZeRO stage."""
    cells = []
    for gpus in (1, 8):
        for stage, offload in ((2, False), (3, False), (2, True), (3, True)):
            flags: dict[str, Any] = {"offload": offload, "only_optimize_lora": way != "full"}
            for prefix in ("actor_", "critic_"):
                own = {"zero_stage": stage, "gradient_checkpointing": True, **WAYS[way]}
                flags |= {prefix + name: value for name, value in own.items()}
            args = changed(arguments("rlhf", model), flags)
            cells.append("refused" if args is None else f"{plan(args, gpus).peak / GB:.0f}")
    return f"| {model} | {way} | {' | '.join(cells)} |"


def ppo_table() -> list[str]:
    """PPO's memory in full, with LoRA and with QLoRA."""
    heads = [f"{gpus} x Z{stage}" for gpus in (1, 8) for stage in ("2", "3", "2 off", "3 off")]
    return [
        *("", "## PPO in full, with LoRA and with QLoRA", ""),
        "GB of one GPU with gradient checkpointing and the batch above as one micro-batch. LoRA is "
        "`--actor_lora_dim 64 --critic_lora_dim 64 --only_optimize_lora`, QLoRA `--actor_load_in_4bit "
        '--critic_load_in_4bit` beside it, which the steps refuse where it says "refused".',
        *("", f"| actor | | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"),
        *(ppo_row(model, way) for model in IN_PPO for way in WAYS),
    ]


RECIPES = {
    "dschat sft": ("sft", {"lora_dim": 64, "gradient_checkpointing": True}),
    "dschat reward": ("reward", {"lora_dim": 64, "gradient_checkpointing": True}),
    "dschat dpo": ("dpo", {"lora_dim": 64, "gradient_checkpointing": True}),
    "dschat ppo": ("rlhf", {"lora_dim": 64, "gradient_checkpointing": True}),
}


def recipe(command: str, model: str = "Llama-3-8B") -> str:
    """A line with a step's LoRA flags for one GPU and what they take."""
    step, settings = RECIPES[command]
    prefixes = ("actor_", "critic_") if step == "rlhf" else ("",)
    flags = {prefix + name: value for prefix in prefixes for name, value in settings.items()}
    args = changed(arguments(step, model), {**flags, "only_optimize_lora": True})
    assert args is not None, "the flags go together"
    spelt = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())
    return f"| `{command} {spelt} --only_optimize_lora` | {plan(args, 1).peak / GB:.0f} |"


def recipes() -> list[str]:
    """LoRA on one GPU in each step."""
    return [
        *("", "## LoRA on one GPU", ""),
        "Llama-3-8B with the batch above as one micro-batch, beside the flags for models and data. Planned, "
        "not measured on a GPU.",
        *("", "| flags | GB |", "|---|---:|", *map(recipe, RECIPES)),
    ]


def page() -> str:
    """The whole page."""
    start = START.format(rows=ROWS, length=f"{LENGTH:,}", half=LENGTH // 2)
    tables = [line for step in STEPS for line in step_table(step)]
    return "\n".join([start.rstrip(), *tables, *ppo_table(), *recipes(), ""])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
