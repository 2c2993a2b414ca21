"""Optimiser steps with a loss or a gradient that is not finite, in every precision and ZeRO stage of a CPU.

[torchrun --nproc_per_node N] skipped_steps.py OUTPUT_FILE
What happens goes wrong on the last rank alone, in the first of two micro-batches.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.distributed import process_group, zero3
from dschat.distributed.mesh import mesh
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.step import DeepSpeedEngine, learning_rate, skipped_because, train_on

KINDS = ("fine", "loss", "gradient", "fine")


def build(stage: int, dtype: str) -> DeepSpeedEngine:
    """Two linear layers with a learning rate that falls from step to step."""
    torch.manual_seed(0)
    model = ModelArguments(model_name_or_path="none", learning_rate=1e-2, zero_stage=stage)
    optimizer, run = OptimizerArguments(gradient_accumulation_steps=2), RunArguments(dtype=dtype)
    config = train_config(model, optimizer, run, per_device_batch_size=1)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return build_trained_engine(layers, model, optimizer, run, config=config, num_training_steps=10)


def weights(engine: DeepSpeedEngine) -> Tensor:
    """All of them, in one vector."""
    parameters = list(engine.module.parameters())
    with zero3.gathered(parameters):
        return torch.cat([p.detach().double().flatten() for p in parameters])


def step(engine: DeepSpeedEngine, kind: str, dtype: torch.dtype) -> dict:
    """One optimiser step, and what it did."""
    before = weights(engine)
    for part in range(2):
        loss = engine(torch.full((1, 4), 1.0 + part, dtype=dtype)).float().sum()
        if part == 0 and mesh().world.rank == mesh().world.size - 1:
            # The root of 0 has an infinite slope.
            loss = {"fine": loss, "loss": loss * torch.nan, "gradient": loss + (loss * 0).sqrt()}[kind]
        train_on(engine, loss)
    change = (weights(engine) - before).abs().max().item()
    return {"because": skipped_because(engine), "change": change, "rate": learning_rate(engine)}


def main(output: Path) -> None:
    """Write what each step did; "apart" is how far the end is from that of a run of the fine steps alone."""
    seen = {}
    for stage, (name, dtype) in product(range(4), {"fp32": torch.float32, "bf16": torch.bfloat16}.items()):
        engine, undisturbed = build(stage, name), build(stage, name)
        steps = [step(engine, kind, dtype) for kind in KINDS]
        for _ in range(KINDS.count("fine")):
            step(undisturbed, "fine", dtype)
        apart = (weights(engine) - weights(undisturbed)).abs().max().item()
        seen[f"{name} at stage {stage}"] = {"steps": steps, "apart": apart}
    if mesh().is_main_process:
        output.write_text(json.dumps(seen))


if __name__ == "__main__":
    process_group.init_process_group()
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
