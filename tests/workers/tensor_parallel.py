"""Train models whose layers two tensor ranks share; export them, and write what was seen as JSON.

Usage: torchrun --nproc_per_node N tensor_parallel.py MODELS_FOLDER OUTPUT_FOLDER CASE...
A case is FAMILY-STAGE-KIND, KIND being lm or rm, with "lora" after it for adapters, "dropout" for dropout, or
"half" for fp16, in which the first step's gradients of a layer's share overflow on one rank alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.distributed import process_group, random_state
from dschat.distributed.collectives import all_gather_object, max_across_ranks, sum_across_ranks
from dschat.distributed.deepspeed_private import is_tensor_shard, own_shard
from dschat.distributed.mesh import mesh, set_parallel_sizes
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.step import gradient_norm, train_on
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.tokenizer import load_tokenizer

STEPS, LEARNING_RATE, MAX_NORM, EPSILON = 3, 1e-2, 0.5, 1e-3
ROWS = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(0))


def load(folder: Path, kind: str, config: dict | None) -> Any:
    """The model of the case before its adapters."""
    random_state.seed_everything(7)
    tokenizer, dropout = load_tokenizer(str(folder)), 0.2 if kind.endswith("dropout") else None
    if kind.startswith("lm"):
        return create_hf_model(AutoModelForCausalLM, str(folder), tokenizer, config, dropout=dropout)
    return create_critic_model(str(folder), tokenizer, config, dropout=dropout)


def loss_of(model: Any, rows: torch.Tensor, kind: str) -> torch.Tensor:
    """These rows' share of a loss of all ROWS."""
    if kind.startswith("lm"):
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        predicted = F.log_softmax(logits[:, :-1].float(), dim=-1)
        return -predicted.gather(2, rows[:, 1:, None]).sum() / 32
    return (model(input_ids=rows, return_values=True).float() - 1).pow(2).sum() / 36


def arguments(folder: Path, stage: int, kind: str, size: int = 1) -> ModelArguments:
    """The flags of the case."""
    return ModelArguments(
        model_name_or_path=str(folder),
        zero_stage=stage,
        tensor_parallel_size=size,
        learning_rate=LEARNING_RATE,
        lora_learning_rate=LEARNING_RATE,
        lora_dim=4 if kind.endswith("lora") else 0,
    )


def difference_over_tensor_ranks(parameter: torch.Tensor) -> torch.Tensor:
    """The largest between elements of what ought to be equal on the ranks of a tensor group."""
    own = parameter if (shard := own_shard(parameter)) is None else shard
    most, least = (max_across_ranks(own * sign, axis="tensor") for sign in (1, -1))
    return (most + least).abs().max()


def train(models: Path, output: Path, case: str) -> dict[str, Any]:
    """Losses and gradient norms of a few steps; the trained model in a folder of the case's name."""
    family, stage, kind = case.split("-")
    args = arguments(models / family, int(stage), kind, size=2)
    optimizer = OptimizerArguments(max_grad_norm=MAX_NORM, adam_epsilon=EPSILON, lr_scheduler_type="constant")
    run = RunArguments(dtype="fp16" if kind.endswith("half") else "fp32")
    if kind.endswith("half"):
        type(get_accelerator()).is_fp16_supported = lambda _: True  # torch computes in it on any CPU
    config = train_config(args, optimizer, run, per_device_batch_size=1)
    engine = build_trained_engine(
        load(models / family, kind, config), args, optimizer, run, config=config, num_training_steps=STEPS
    )
    seen: dict[str, Any] = {"losses": [], "norms": [], "skipped before": []}
    shards = [p for p in engine.module.parameters() if is_tensor_shard(p)]
    if kind.endswith("dropout"):
        engine.train()
        random_state.seed_ranks_apart(7)
    if kind.endswith("half") and mesh().world.rank == 0:
        overflows = iter([torch.inf])
        shards[0].register_hook(lambda gradient: gradient * next(overflows, 1))
    for _ in range(STEPS):
        seen["skipped before"].append(engine.skipped_steps)
        loss = loss_of(engine, ROWS[mesh().data.rank :: mesh().data.size], kind)
        train_on(engine, loss)
        seen["losses"].append(sum_across_ranks(loss, axis="data").item())
        seen["norms"].append(gradient_norm(engine))
    seen["shared"] = len(shards)
    replicas = [p for p in engine.module.parameters() if not is_tensor_shard(p)]
    seen["apart"] = max(difference_over_tensor_ranks(p).item() for p in replicas)
    seen["skipped"] = all_gather_object(engine.skipped_steps, axis="world")
    export_model(engine, load_tokenizer(args.model_name_or_path), output / case)
    return seen


def main(models: Path, output: Path, *cases: str) -> None:
    set_parallel_sizes(tensor=2)
    process_group.init_process_group()
    seen = {case: train(models, output, case) for case in cases}
    if mesh().is_main_process:
        (output / "seen.json").write_text(json.dumps(seen))
    process_group.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
