"""Optimiser steps with a loss or a gradient that is not finite, in every precision and ZeRO stage of a CPU.

[torchrun --nproc_per_node N] skipped_steps.py OUTPUT_FILE
What happens goes wrong on the last rank alone, in the first of two micro-batches.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dschat import distributed
from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.engines import (
    DeepSpeedEngine,
    build_trained_engine,
    learning_rate,
    skipped_because,
    train_config,
    train_on,
)

KINDS = ("fine", "loss", "infinite", "flat", "gradient", "fine")
"""Not finite is the loss with its gradient, the loss alone (of slope 1, then of slope 0), or the gradient."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(stage: int, dtype: str) -> DeepSpeedEngine:
    """Two linear layers with a learning rate that falls from step to step."""
    torch.manual_seed(0)
    model = ModelArguments(model_name_or_path="none", learning_rate=1e-2, weight_decay=0.5, zero_stage=stage)
    optimizer, run = OptimizerArguments(gradient_accumulation_steps=2), RunArguments(dtype=dtype)
    config = train_config(model, optimizer, run, per_device_batch_size=1)
    if dtype == "fp16":
        config["fp16"]["initial_scale_power"] = 8  # nothing overflows by itself
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return build_trained_engine(layers, model, optimizer, run, config=config, num_training_steps=10)


def weights(engine: DeepSpeedEngine) -> Tensor:
    """All of them, in one vector."""
    parameters = list(engine.module.parameters())
    with distributed.gathered(parameters):
        return torch.cat([p.detach().double().flatten() for p in parameters])


def start_error(engine: DeepSpeedEngine) -> float:
    """How far the fp32 weights that the optimiser steps on are from those of the module."""
    if isinstance(engine.optimizer, torch.optim.AdamW):  # which steps on the module's own
        return 0.0
    parameters = list(engine.module.parameters())
    with distributed.gathered(parameters):
        if hasattr(engine.optimizer, "fp32_groups"):
            groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
            pairs = [pair for own, fp32 in groups for pair in zip(own, fp32, strict=True)]
        else:
            pairs = [(p, safe_get_full_fp32_param(p)) for p in parameters]
        assert len(pairs) == len(parameters)
        return max((own.float() - fp32).abs().max().item() for own, fp32 in pairs)


def step(engine: DeepSpeedEngine, kind: str, dtype: torch.dtype) -> dict:
    """One optimiser step, and what it did."""
    before = weights(engine)
    for part in range(2):
        loss = engine(torch.full((1, 4), 1.0 + part, dtype=dtype)).float().sum()
        if part == 0 and distributed.rank() == distributed.world_size() - 1:
            # The root of 0 has an infinite slope.
            loss = {
                "fine": loss,
                "loss": loss * torch.nan,
                "infinite": loss + torch.inf,
                "flat": loss * 0 + torch.inf,
                "gradient": loss + (loss * 0).sqrt(),
            }[kind]
        train_on(engine, loss)
    change = (weights(engine) - before).abs().max().item()
    return {"because": skipped_because(engine), "change": change, "rate": learning_rate(engine)}


def main(output: Path) -> None:
    """Write what each step did; "apart" is how far the end is from that of a run of the fine steps alone."""
    seen = {}
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but the same code
    for stage, (name, dtype) in product(range(4), DTYPES.items()):
        engine, undisturbed = build(stage, name), build(stage, name)
        error = start_error(engine)
        steps = [step(engine, kind, dtype) for kind in KINDS]
        for _ in range(KINDS.count("fine")):
            step(undisturbed, "fine", dtype)
        apart = (weights(engine) - weights(undisturbed)).abs().max().item()
        seen[f"{name} at stage {stage}"] = {"start_error": error, "steps": steps, "apart": apart}
    if distributed.is_main_process():
        output.write_text(json.dumps(seen))


if __name__ == "__main__":
    distributed.setup()
    main(Path(sys.argv[1]))
    distributed.leave()
