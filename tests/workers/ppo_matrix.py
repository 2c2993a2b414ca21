"""Two PPO steps for each of several cases; what was seen as JSON.

[torchrun --nproc_per_node N] ppo_matrix.py MODELS_FOLDER OUTPUT_FILE ZERO_STAGE CASES
MODELS_FOLDER holds an actor and a reward model; CASES is a JSON file of {name: case}. A case has "flags" of
step 3, and may have the "mode" of static decoding. Written are of each case the metrics and the answers of
each step, how far its experience is from plain code's, and whether greedy answers are found again.
"""

import gc
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_experience import PlainModels, Settings, differences, distributions, split
from ppo_steps import GLOBAL_ROWS, build_engine, prompts

from dschat.arguments import RlhfArguments, parse_arguments
from dschat.data.packing import RowLayout
from dschat.distributed.collectives import barrier
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.export.export import export_model
from dschat.models.attention import set_attention
from dschat.models.config import read_config
from dschat.models.packing_trial import choose_row_layout
from dschat.rlhf.ppo_trainer import build_trainer
from dschat.rlhf.roles import engine_specs
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.choice import CHOICE, build_backend
from dschat.runs.measured_choices import MeasuredChoices


def arguments(folder: Path, stage: int, flags: dict[str, Any]) -> RlhfArguments:
    """Two optimiser steps a pass, two passes; the same answers on any number of ranks."""
    ranks = mesh().world.size
    common = {
        "actor_model_name_or_path": folder / "actor",
        "critic_model_name_or_path": folder / "reward",
        "actor_zero_stage": stage,
        "critic_zero_stage": stage,
        # Adam divides a gradient by its size, rounding included; the large epsilon lets small ones be small.
        "adam_epsilon": 1e-3,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "num_warmup_steps": 0,
        "ppo_epochs": 2,
        "max_answer_seq_len": 12,
        "num_samples_per_prompt": 2,
        "missing_eos_penalty": 0.5,
        "reward_clip": 1,
        "temperature": 0.9,
        "entropy_coef": 0.01,
        "reuse_first_pass": "none",  # so that the first ratio is of two passes
        "dtype": "fp32",
        "per_device_generation_batch_size": GLOBAL_ROWS // ranks,
        "per_device_training_batch_size": GLOBAL_ROWS // 2 // ranks,
    }
    return parse_arguments("rlhf", [f"--{name}={value}" for name, value in {**common, **flags}.items()])


def layout_of(args: RlhfArguments) -> RowLayout:
    """The layout that a run with these flags has."""
    configs = {}
    for spec in engine_specs(args):
        configs[spec.name] = read_config(spec.path, 0.0)
        set_attention(configs[spec.name], spec.settings.attn_implementation)
    return choose_row_layout(
        args.widths,
        configs,
        MeasuredChoices(measures=False),
        dtype="fp32",
        device=current_device(),
        limit=None,
        lengths=[np.array([40, 30])],
        longest=40,
    )


def rescored(
    backend: RolloutBackend, args: RlhfArguments, tokenizer: Any, models: PlainModels, settings
) -> bool:
    """Whether the likeliest tokens of a pass over greedy answers are the answers, of all ranks' prompts."""
    everyone = prompts(tokenizer, 0, 1, 1, whole=True)[0]
    with backend.session():
        rollout = backend.generate(everyone, Sampling.of(args.rollout, seed=0, greedy=True))
    found = []
    for row, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True):
        prompt, answer = split(row, mask, rollout.prompt_length)
        found.append(distributions(models.actor, prompt, answer, settings).argmax(-1).tolist() == answer)
    return all(found)


def run(folder: Path, stage: int, case: dict[str, Any]) -> dict[str, Any]:
    """One case."""
    args = arguments(folder, stage, case["flags"])
    engine, tokenizers = build_engine(args)
    tokenizer = tokenizers.actor
    choices = MeasuredChoices({CHOICE: case["mode"]} if "mode" in case else None, measures=False)
    backend = build_backend(args.rollout, engine.actor, tokenizer, longest=200, choices=choices)
    layout = layout_of(args)
    trainer = build_trainer(args, engine, tokenizers, backend, layout=layout)
    settings = Settings(
        num_tokens=len(tokenizer),
        temperature=args.rollout.temperature,
        kl_coef=args.ppo.kl_coef,
        gae_lambda=args.ppo.gae_lambda,
        reward_clip=args.ppo.reward_clip,
        missing_eos_penalty=args.ppo.missing_eos_penalty,
    )
    paths = {"actor": folder / "actor", "critic": folder / "reward"}
    steps: list[dict] = []
    seen: dict[str, Any] = {
        "layout": asdict(layout),
        "backend": [backend.name, getattr(backend, "mode", None)],
    }
    for ppo_step in range(2):
        fixed = {"reference": folder / "actor", "reward": folder / "reward"}
        models = PlainModels.load(**paths, **fixed)
        seen["greedy"] = rescored(backend, args, tokenizer, models, settings) and seen.get("greedy", True)
        metrics = trainer.step(prompts(tokenizer, ppo_step, 1, 2), ppo_step=ppo_step)
        experience = trainer.experience
        rollout = experience.rollout
        settings = replace(settings, kl_coef=experience.kl_coef)
        steps.append(
            {
                "metrics": metrics,
                "answers": rollout.answers.masked_fill(~rollout.answer_mask, -1).tolist(),
                "apart": differences(experience, models, settings) if is_main_process() else {},
            }
        )
        if ppo_step == 0:
            paths = {"actor": folder / "trained" / "actor", "critic": folder / "trained" / "critic"}
            for name, trained in engine.by_name.items():
                export_model(trained, tokenizer, paths[name])
            barrier(axis="world")
    return {**seen, "steps": steps}


def main(models: Path, output: Path, stage: int, cases: dict[str, dict]) -> None:
    """One case after the other; rank 0 writes after each what it has seen so far."""
    init_process_group()
    torch.set_num_threads(1)
    gc.freeze()  # as programs do: transformers collects garbage after each batch of continuous batching
    seen: dict[str, dict] = {}
    for name, case in cases.items():
        start = time.perf_counter()
        seen[name] = run(models, stage, case)
        seen[name]["seconds"] = time.perf_counter() - start
        if is_main_process():
            output.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
    destroy_process_group()
