"""Seconds of a generation batch by ZeRO stage, each rank's processor time; rank 0 writes them as JSON.

[torchrun --nproc_per_node N] generation_times.py MODEL_FOLDER OUTPUT_FILE. Both engines are there at once and
take turns; each generates in the way that was the fastest in a run's own trial, in processor time.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments, OptimizerArguments, RolloutArguments, RunArguments
from dschat.data.collate import PromptBatch
from dschat.distributed.collectives import all_gather_object
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.distributed.random_state import seed_everything
from dschat.engines.build import build_trained_engine, train_config
from dschat.models.loading import create_hf_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.choice import build_backend
from dschat.runs.measured_choices import MeasuredChoices

ROWS, PROMPT, ANSWER, ROUNDS = 16, 64, 128, 4
"""As many rows as a step has by default, and half of the tokens."""


def backend(folder: str, stage: int, cache: Path) -> RolloutBackend:
    """What generates for an actor at this stage."""
    seed_everything(7)
    args, run = ModelArguments(model_name_or_path=folder, zero_stage=stage), RunArguments(dtype="fp32")
    config = train_config(args, OptimizerArguments(), run, per_device_batch_size=1)
    tokenizer = load_tokenizer(folder)
    model = create_hf_model(AutoModelForCausalLM, folder, tokenizer, config)
    engine = build_trained_engine(model, args, OptimizerArguments(), run, config=config, num_training_steps=9)
    rollout = RolloutArguments(per_device_generation_batch_size=ROWS)
    choices = MeasuredChoices(folder=cache / str(stage))
    return build_backend(rollout, engine, tokenizer, longest=PROMPT + ANSWER, choices=choices)


def main(folder: str, output: Path) -> None:
    """The least seconds of each rank at each stage, and whether the answers are the same."""
    init_process_group()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # what choices between ways are timed with
    backends = {stage: backend(folder, stage, output.parent) for stage in (0, 3)}
    rows = ROWS * mesh().world.rank + torch.arange(ROWS)
    tokens = torch.randint(9, 250, (ROWS, PROMPT), generator=torch.Generator().manual_seed(mesh().world.rank))
    prompts = PromptBatch(tokens, torch.ones_like(tokens), rows, rows, torch.zeros_like(rows))
    seconds: dict[int, list[float]] = {stage: [] for stage in backends}
    gathering: dict[int, list[float]] = {stage: [] for stage in backends}
    answers = {}
    for _ in range(ROUNDS):
        for stage, way in backends.items():
            start = time.process_time()
            with way.session():
                begun = time.process_time()
                rollout = way.generate(prompts, Sampling(max_answer_length=ANSWER, seed=1))
                ended = time.process_time()
            seconds[stage].append(time.process_time() - start)
            gathering[stage].append(seconds[stage][-1] - (ended - begun))
            answers[stage] = rollout.answers.masked_fill(~rollout.answer_mask, -1).tolist()
    assert answers[0] == answers[3]
    least, of_them_gathering = (
        {stage: all_gather_object(min(values[1:]), axis="world") for stage, values in measured.items()}
        for measured in (seconds, gathering)
    )
    if is_main_process():
        names = {stage: f"{way.name}, {getattr(way, 'mode', '')}" for stage, way in backends.items()}
        output.write_text(json.dumps({"seconds": least, "gathering": of_them_gathering, "ways": names}))
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
