"""Steps 1 and 2 and DPO on small models, each case run as its program runs, all in one process a rank.

[torchrun --nproc_per_node N] pipelines.py FOLDER PIPELINE_SIZE TENSOR_SIZE CASE...
Writes FOLDER/N_PIPELINE_SIZE_TENSOR_SIZE/CASE, an output folder, and CASE_resumed where the case resumes.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from processes import ROOT
from tiny import save_counting_pairs, save_tiny_model, tiny_tokenizer

from dschat.arguments import parse_arguments
from dschat.distributed import collectives, process_group
from dschat.distributed.mesh import mesh
from dschat.program import prepare

PROGRAMS = {"sft": "step1_sft/main.py", "reward": "step2_reward/main.py", "dpo": "step2_reward/dpo.py"}

FAMILIES = (
    *(
        "llama",
        "opt",
        "qwen3",
        "gpt2",
        "gpt_neox",
        "opt_projected",
        "qwen2",
        "mistral",
        "gemma",
        "phi",
        "gptj",
    ),
    *("bloom", "mixtral", "falcon", "falcon_alibi", "qwen3_moe"),
)
LORA = ("--lora_dim=4", "--lora_learning_rate=3e-3")
CASES = {
    **{
        f"{step}_{family}_{stage}": (step, family, [f"--zero_stage={stage}"])
        for step in PROGRAMS
        for stage, families in ((0, FAMILIES), (1, FAMILIES[:4]))
        for family in families
    },
    "lora": ("sft", "llama", ["--zero_stage=1", *LORA]),
    "lora_only": ("sft", "qwen3", [*LORA, "--only_optimize_lora"]),
    "dpo_lora_only": ("dpo", "llama", [*LORA, "--only_optimize_lora"]),
    "reward_lora": ("reward", "gpt2", [*LORA, "--zero_stage=1"]),
    "recomputed": ("sft", "opt", ["--gradient_checkpointing"]),
    "recomputed_lora": ("reward", "llama", [*LORA, "--only_optimize_lora", "--gradient_checkpointing"]),
    "packed": ("sft", "llama", ["--packing=on"]),
    "partial": ("sft", "qwen3", ["--gradient_accumulation_steps=3"]),  # 12 rows a step, the last has 7
    "budget": ("sft", "qwen3", ["--max_tokens_per_batch=300"]),
    "best": ("reward", "opt", ["--export_model=best", "--eval_interval=1", "--eval_iters=1"]),
    "bf16": ("sft", "qwen3", ["--dtype=bf16"]),
    "bf16_1": ("sft", "qwen3", ["--dtype=bf16", "--zero_stage=1"]),
    "dropout": ("sft", "llama", ["--dropout=0.1"]),
    "unclipped": ("sft", "qwen3", ["--max_grad_norm=0"]),
    "clipped": ("sft", "qwen3", ["--max_grad_norm=0.1", "--zero_stage=1"]),
    "grown": ("sft", "grown", []),
    "grown_tied": ("dpo", "grown_tied", []),
}  # fmt: skip
"""Step, family and flags by name."""

RESUMED = (
    "sft_qwen3_0",
    "sft_qwen3_1",
    "sft_llama_1",
    "lora",
    "lora_only",
    "partial",
    "bf16",
    "bf16_1",
    "dropout",
    "reward_opt_1",
)
"""Cases that are also resumed from the checkpoint after their second step."""


def main(folder: Path, pipeline_size: int, tensor_size: int, cases: list[str]) -> None:
    """Run the cases one after the other."""
    place = folder / f"{mesh().world.size}_{pipeline_size}_{tensor_size}"
    sizes = [f"--pipeline_parallel_size={pipeline_size}", f"--tensor_parallel_size={tensor_size}"]
    rows = 4 * pipeline_size * tensor_size // mesh().world.size
    sizes.append(f"--per_device_train_batch_size={rows}")
    for case in cases:
        run(folder, place / case, sizes, *CASES[case], "--save_interval=2")
        if case in RESUMED:
            checkpoint = place / case / "checkpoints" / "step_00000002"
            resume = f"--resume_from_checkpoint={checkpoint}"
            run(folder, place / f"{case}_resumed", sizes, *CASES[case], resume)


def run(folder: Path, output: Path, sizes: list, step: str, family: str, more: list, *last: str) -> None:
    """One program: two optimiser steps of eight rows in two micro-batches.

    Adam's epsilon is large, or rounding would move the weights whose gradient is 0.
    """
    flags = [
        *(f"--model_name_or_path={folder / family}", f"--data_path={folder / 'pairs.jsonl'}"),
        *(
            f"--data_output_path={output.parent / 'cache'}",
            f"--output_dir={output}",
            "--no_enable_tensorboard",
        ),
        *("--preprocessing_num_workers=1", "--eval_fraction=0.1", "--data_split=1,1,0", "--dtype=fp32"),
        *("--learning_rate=3e-3", "--attn_implementation=eager", "--pad_to_multiple_of=8", "--packing=off"),
        *("--adam_epsilon=1e-3", "--gradient_accumulation_steps=2", "--overwrite_output_dir"),
        *(*sizes, *more, *last),
    ]
    if any(flag.startswith("--resume") for flag in last):
        flags.remove("--overwrite_output_dir")
    args = parse_arguments(step, flags)
    program(step).main(args, prepare(args))
    collectives.barrier(axis="world")


def program(step: str) -> ModuleType:
    """A step's program as a module."""
    spec = importlib.util.spec_from_file_location(step, ROOT / PROGRAMS[step])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_models(folder: Path, cases: list[str]) -> None:
    """The data, and the models of the cases."""
    save_counting_pairs(folder / "pairs.jsonl")
    for family in {CASES[case][1] for case in cases}:
        grown = {"grown": "llama", "grown_tied": "qwen3"}
        tokenizer = tiny_tokenizer(pad_token=None) if family in grown else None
        save_tiny_model(folder / family, grown.get(family, family), tokenizer=tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    process_group.destroy_process_group()
