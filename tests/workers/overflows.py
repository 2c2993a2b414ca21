"""Two small fp16 engines that step together, one of which overflows in the second of three steps; JSON out.

python overflows.py OUTPUT_FILE '[[STAGE, STAGE], ...]'
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from dschat.distributed.deepspeed_private import has_overflow
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.distributed.zero3 import gathered
from dschat.engines.deepspeed_config import get_train_ds_config
from dschat.engines.step import backward_on, learning_rate, take_steps_together


def build(stage: int):
    """A linear layer whose learning rate falls with every step that is taken."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    config = get_train_ds_config(stage=stage, dtype="fp16", max_grad_norm=0)
    config["fp16"]["hysteresis"] = 1  # the first overflow lowers the scale
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    engine.num_bad_losses, engine.skip_reason = 0, None  # as build_trained_engine leaves it
    return engine


def state(engine) -> dict:
    """What a step changes."""
    with gathered(engine.module.parameters()):
        weights = sum(p.double().sum().item() for p in engine.module.parameters())
    scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
    lr = learning_rate(engine)
    return {"weights": weights, "lr": lr, "skipped": engine.skipped_steps, "scale": scaler.cur_scale}


def run(stages: list[int]) -> list[dict]:
    """The state of both engines after each step."""
    engines = [build(stage) for stage in stages]
    states = []
    for factors in ((1e-3, 1e-3), (1e-3, 1e9), (1e-3, 1e-3)):
        for engine, factor in zip(engines, factors, strict=True):
            inputs = torch.ones(1, 8, dtype=torch.half, device=engine.device)
            backward_on(engine, engine(inputs).float().sum() * factor / mesh().world.size)
        overflows = [has_overflow(engine) for engine in engines]
        take_steps_together(engines)
        states.append({"overflows": overflows, "engines": [state(engine) for engine in engines]})
    return states


if __name__ == "__main__":
    init_process_group()
    torch.set_num_threads(1)
    results = [run(stages) for stages in json.loads(sys.argv[2])]
    if is_main_process():
        Path(sys.argv[1]).write_text(json.dumps(results))
    destroy_process_group()
