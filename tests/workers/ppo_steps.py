"""Two PPO steps for each of several settings, on as many ranks as it is started with; the metrics as JSON.

python ppo_steps.py MODELS_FOLDER OUTPUT_FILE '[{"actor_zero_stage": 0, ...}, ...]'
MODELS_FOLDER holds an actor and a reward model; every setting is a dictionary of step 3's flags, and
"copied_reference" makes a copy of an actor that could be its own reference. "skewed_cache" is a fault: a
factor on the logits of the actor's forward passes with a KV cache. A run that a UserError ended is its text.
"""

import json
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments, parse_arguments
from dschat.data.collate import PromptBatch
from dschat.data.loaders import TextLoader
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.distributed.random_state import seed_everything
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.lora import trains_adapters_only
from dschat.rlhf import rlhf_engine
from dschat.rlhf.ppo_trainer import PPOTrainer, build_trainer
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.roles import engine_specs
from dschat.rlhf.rollout.choice import build_backend
from dschat.rlhf.text_loader import build_text_loader
from dschat.rlhf.tokenizers import RlhfTokenizers, load_rlhf_tokenizers
from dschat.runs.measured_choices import MeasuredChoices

GLOBAL_ROWS = 8


def prompts(
    tokenizer, ppo_step: int, num_batches: int, times: int, *, whole: bool = False
) -> list[PromptBatch]:
    """This rank's share or the whole of eight answers' prompts of several lengths, each `times` times."""
    numbers = torch.arange(GLOBAL_ROWS) // times
    texts = [f"\n\nHuman: Count to {n}{' please' * (n % 3)}.\n\nAssistant:" for n in numbers.tolist()]
    tokens = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    parts = torch.arange(GLOBAL_ROWS).chunk(num_batches)
    own = slice(None) if whole else slice(mesh().world.rank, None, mesh().world.size)
    return [
        PromptBatch(
            input_ids=tokens["input_ids"][mine],
            attention_mask=tokens["attention_mask"][mine],
            keys=numbers[mine] * 7919 + ppo_step,
            rows=numbers[mine],
            samples=mine % times,
        )
        for mine in (part[own] for part in parts)
    ]


def skew_cache(model: torch.nn.Module, factor: float) -> None:
    """Multiply the logits of forward passes with a KV cache, which only generation has."""

    def skew(module, args, kwargs, output):
        if kwargs.get("use_cache"):
            output.logits = output.logits * factor
        return output

    model.register_forward_hook(skew, with_kwargs=True)


def count_passes(engine: DeepSpeedRLHFEngine) -> dict[str, int]:
    """How often actor and critic pass over rows from now on, generation left out."""
    counts = dict.fromkeys(engine.by_name, 0)
    for name, trained in engine.by_name.items():

        def count(module, args, kwargs, output, name=name):
            counts[name] += not kwargs.get("use_cache")

        trained.module.register_forward_hook(count, with_kwargs=True)
    return counts


def text_loader(args: RlhfArguments, tokenizer: PreTrainedTokenizerBase) -> TextLoader | None:
    """The text beside PPO that the flags ask for."""
    return build_text_loader(
        args.text,
        args.rollout,
        tokenizer,
        model_path=args.actor.model_name_or_path,
        batch_size=args.ppo.per_device_training_batch_size,
        accumulation_steps=args.optimizer.gradient_accumulation_steps,
        seed=args.run.seed,
        data_output_path=args.data.data_output_path,
    )


def build_engine(args: RlhfArguments) -> tuple[DeepSpeedRLHFEngine, RlhfTokenizers]:
    """The models of step 3, whose schedules are as long as 100 optimiser steps."""
    tokenizers, specs = load_rlhf_tokenizers(engine_specs(args), args.tokenizer)
    seed_everything(args.run.seed)
    groups = {"optimizer": args.optimizer, "ppo": args.ppo, "run": args.run}
    steps = {"actor": 100 - args.ppo.critic_warmup_steps * args.updates_per_ppo_step, "critic": 100}
    return DeepSpeedRLHFEngine(specs, tokenizers, **groups, num_training_steps=steps), tokenizers


def run(models: Path, flags: dict) -> dict:
    """Metrics of two PPO steps, and a checksum of the actor, critic and moving average that came out."""
    is_copied, cache_factor = flags.pop("copied_reference", False), flags.pop("skewed_cache", 1)
    argv = [
        f"--actor_model_name_or_path={models / 'actor'}",
        f"--critic_model_name_or_path={models / 'reward'}",
        "--num_warmup_steps=0",
        "--actor_learning_rate=1e-3",
        "--critic_learning_rate=1e-3",
        "--max_answer_seq_len=12",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    args = parse_arguments("rlhf", argv)
    with unittest.mock.patch.object(rlhf_engine, "trains_adapters_only") as decides:
        decides.side_effect = (lambda model: False) if is_copied else trains_adapters_only
        engine, tokenizers = build_engine(args)
    tokenizer = tokenizers.actor
    if cache_factor != 1:
        skew_cache(engine.actor.module, cache_factor)
    num_passes = count_passes(engine)
    unmeasured = MeasuredChoices(measures=False)
    backend = build_backend(args.rollout, engine.actor, tokenizer, longest=200, choices=unmeasured)
    texts = text_loader(args, tokenizer)
    trainer = build_trainer(args, engine, tokenizers, backend, texts=texts)
    try:
        steps = two_steps(trainer, args, tokenizer)
    except UserError as error:
        return {"error": str(error)}
    held = {"held_bytes": held_bytes(engine), "has_copy": engine.ref is not None, "passes": num_passes}
    held["decoding"] = getattr(backend, "mode", None)
    return {"steps": steps, "weights": exported(engine, tokenizer, models), **held}


def two_steps(trainer: PPOTrainer, args: RlhfArguments, tokenizer) -> list[dict]:
    """Metrics and answers of each step."""
    steps = []
    for ppo_step in range(2):
        batches = args.rollout.generation_batches
        asked = prompts(tokenizer, ppo_step, batches, args.rollout.num_samples_per_prompt)
        metrics = trainer.step(asked, ppo_step=ppo_step)
        rollout = trainer.experience.rollout
        answers = rollout.answers.masked_fill(~rollout.answer_mask, -1)
        steps.append({**metrics, "answers": answers.tolist()})
    return steps


def held_bytes(engine: DeepSpeedRLHFEngine) -> int:
    """Bytes of weights in this rank's memory, of all models."""
    models = [m.module for m in (engine.actor, engine.ref, engine.critic, engine.reward) if m is not None]
    weights = [getattr(p, "ds_tensor", p) for model in models for p in model.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def exported(engine: DeepSpeedRLHFEngine, tokenizer, models: Path) -> dict:
    """The absolute sum of every exported weight file, and of the adapters beside the weights."""
    folder = models / "exported"
    export_model(engine.actor, tokenizer, folder / "actor")
    names = ["actor"]
    if engine.critic:
        export_model(engine.critic, tokenizer, folder / "critic")
        names.append("critic")
    if engine.ema:
        export_model(engine.actor, tokenizer, folder / "ema", parameters=engine.ema.weights())
        names.append("ema")
    if not is_main_process():
        return {}
    paths = {name: folder / name / "model.safetensors" for name in names}
    adapters = {f"{name} adapter": folder / name / "adapter" / "adapter_model.safetensors" for name in names}
    paths |= {name: path for name, path in adapters.items() if path.exists()}
    files = {name: load_file(path) for name, path in paths.items()}
    return {
        name: sum(t.double().abs().sum().item() for t in tensors.values()) for name, tensors in files.items()
    }


def run_all(run: Callable[[Path, dict], Any]) -> None:
    """`run(models, flags)` for each of the settings on the command line; rank 0 writes what they return."""
    init_process_group()
    torch.set_num_threads(1)
    results = [run(Path(sys.argv[1]), flags) for flags in json.loads(sys.argv[3])]
    if is_main_process():
        Path(sys.argv[2]).write_text(json.dumps(results))
    destroy_process_group()


if __name__ == "__main__":
    run_all(run)
