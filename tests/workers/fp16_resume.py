"""Small fp16 engines that are saved after an overflow and go on in fresh ones; JSON out.

[torchrun --nproc_per_node N] fp16_resume.py OUTPUT_FILE, with a folder of that name's own beside it.
"""

import json
import sys
from pathlib import Path

import torch

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.checkpoints.engine_state import load_engine, save_engine
from dschat.distributed.mesh import is_main_process
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.distributed.zero3 import gathered
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.step import DeepSpeedEngine, learning_rate, train_on

FACTORS = (1e-3, 1e9, 1e-3, 1e9, 1e9, 1e-3)
"""Of the loss; the large ones overflow, and the scale falls with every second of them at first."""

SAVED_AFTER = 2


def build(stage: int, seed: int) -> DeepSpeedEngine:
    """Two linear layers with a learning rate that falls from step to step."""
    torch.manual_seed(seed)
    model = ModelArguments(model_name_or_path="none", learning_rate=1e-2, zero_stage=stage)
    optimizer, run = OptimizerArguments(gradient_accumulation_steps=1), RunArguments(dtype="fp16")
    config = train_config(model, optimizer, run, per_device_batch_size=1)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    return build_trained_engine(layers, model, optimizer, run, config=config, num_training_steps=10)


def step(engine: DeepSpeedEngine, factor: float) -> dict:
    """One optimiser step, and the state after it."""
    train_on(engine, engine(torch.ones(1, 8, dtype=torch.half)).float().sum() * factor)
    with gathered(list(engine.module.parameters())):
        weights = [p.double().flatten().tolist() for p in engine.module.parameters()]
    scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
    return {"weights": weights, "lr": learning_rate(engine), "scale": scaler.cur_scale}


def main(output: Path) -> None:
    """The states of a run without and with an interruption, by ZeRO stage."""
    seen = {}
    for stage in range(4):
        engine = build(stage, seed=0)
        states = [step(engine, factor) for factor in FACTORS[:SAVED_AFTER]]
        folder = output.with_suffix(".engines") / str(stage)
        if is_main_process():
            folder.parent.mkdir(exist_ok=True)
        assert save_engine(engine, folder) is None
        states += [step(engine, factor) for factor in FACTORS[SAVED_AFTER:]]
        other = build(stage, seed=1)
        load_engine(other, folder)
        seen[stage] = {"whole": states, "rest": [step(other, factor) for factor in FACTORS[SAVED_AFTER:]]}
    if is_main_process():
        output.write_text(json.dumps(seen))


if __name__ == "__main__":
    init_process_group()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    destroy_process_group()
