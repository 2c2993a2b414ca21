"""Steps of a small engine in fp32, and in fp16 at ZeRO 0 and 1: weights and gradient norms as JSON.

fp16_steps.py OUTPUT_FILE. DeepSpeed takes a CPU for one without fp16, in which torch computes there.
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.step import gradient_norm, train_on


def run(dtype: str, stage: int) -> list[float]:
    """What three steps end with, whose gradients are so small that Adam's epsilon counts."""
    model = ModelArguments(model_name_or_path="none", learning_rate=1e-2, zero_stage=stage)
    optimizer = OptimizerArguments(lr_scheduler_type="constant", adam_epsilon=1e-4)
    run = RunArguments(dtype=dtype)
    config = train_config(model, optimizer, run, per_device_batch_size=1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 1)
    engine = build_trained_engine(layer, model, optimizer, run, config=config, num_training_steps=9)
    norms = []
    for _ in range(3):
        output = engine(torch.linspace(0.1, 1, 8)[None].to(engine.module.weight.dtype))
        train_on(engine, output.float().sum() * 1e-4)
        norms.append(gradient_norm(engine))
    return [*engine.module.weight[0].tolist(), *norms]


if __name__ == "__main__":
    type(get_accelerator()).is_fp16_supported = lambda _: True
    init_process_group()
    torch.set_num_threads(1)
    seen = [run("fp32", 0), run("fp16", 0), run("fp16", 1)]
    Path(sys.argv[1]).write_text(json.dumps(seen))
    destroy_process_group()
