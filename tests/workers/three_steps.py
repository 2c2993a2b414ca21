"""All three steps for each of several families in one process; what came out as JSON.

[torchrun --nproc_per_node N] three_steps.py FOLDER ZERO_STAGE FAMILY...
Writes FOLDER/FAMILY/{base,sft,reward,ppo} and FOLDER/seen.json. The base models' tokenizer has no padding
token, so every vocabulary grows by one.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from alike_runs import EPSILON
from processes import ROOT
from tiny import save_tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from dschat.arguments import parse_arguments
from dschat.distributed import collectives, process_group
from dschat.distributed.mesh import mesh
from dschat.engines.step import DeepSpeedEngine
from dschat.models.loading import create_critic_model
from dschat.models.reward_model import RewardModel
from dschat.program import prepare
from dschat.supervised import exports

PROGRAMS = {"sft": "step1_sft", "reward": "step2_reward", "rlhf": "step3_ppo"}
WORDS = ("one", "two", "three", "four", "five", "six")


def program(step: str) -> ModuleType:
    """A step's main.py as a module."""
    spec = importlib.util.spec_from_file_location(step, ROOT / PROGRAMS[step] / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pairs(path: Path) -> None:
    """Twenty-six prompts of different lengths, so that the rows of each batch are padded."""
    rows = [
        {
            "prompt": f"\n\nHuman: Count on from {WORDS[i % 5]}{', please' * (i // 5)}.\n\nAssistant:",
            "chosen": f" {WORDS[i % 5 + 1]}{' and so on' * (i % 3)}",
            "rejected": f" no{', no' * (i % 4)}",
        }
        for i in range(26)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(folder: Path, family: str, stage: int) -> dict[str, list[str]]:
    """The flags of every step: a few rows, two optimiser steps or one PPO step."""
    rows = 4 // mesh().world.size
    common = [
        f"--data_path={folder / 'pairs.jsonl'}",
        f"--data_output_path={folder / 'cache'}",
        *("--data_split=1,1,1", "--dtype=fp32", "--no_enable_tensorboard"),
        *("--preprocessing_num_workers=1", "--eval_fraction=0.1"),
    ]
    supervised = [
        f"--model_name_or_path={folder / family / 'base'}",
        *(f"--per_device_train_batch_size={rows}", "--learning_rate=1e-3", f"--zero_stage={stage}"),
        f"--adam_epsilon={EPSILON}",
    ]
    models = {"actor": "sft", "critic": "reward"}
    ppo = [
        *(f"--{name}_model_name_or_path={folder / family / step}" for name, step in models.items()),
        *(f"--{name}_zero_stage={stage}" for name in models),
        *(f"--per_device_generation_batch_size={rows}", f"--per_device_training_batch_size={rows // 2}"),
        *("--max_answer_seq_len=6", "--enable_test_mode", "--test_stop_step=1", "--num_warmup_steps=0"),
        "--eval_interval=0",
    ]
    outputs = {"sft": "sft", "reward": "reward", "rlhf": "ppo"}
    own = {"sft": supervised, "reward": supervised, "rlhf": ppo}
    return {
        step: [*common, *own[step], f"--output_dir={folder / family / name}"]
        for step, name in outputs.items()
    }


def answers(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Dialogues of different lengths, padded on the right."""
    texts = [f"\n\nHuman: {word}, please.\n\nAssistant:{' and on' * n}" for n, word in enumerate(WORDS)]
    tokens = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, padding_side="right")
    batch = {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}
    assert not batch["attention_mask"].all()
    return batch


def keep_scores(live: list[Tensor]) -> None:
    """Let step 2 append to `live` what its trained engine says of `answers` before it is exported."""
    export = exports.export_model

    def judge_and_export(
        engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any
    ) -> None:
        if isinstance(engine.module, RewardModel):
            engine.eval()
            batch = {name: column.to(engine.device) for name, column in answers(tokenizer).items()}
            with torch.no_grad():
                live.append(engine.module.forward_value(**batch)["chosen_end_scores"].cpu())
        export(engine, tokenizer, folder, **options)

    exports.export_model = judge_and_export


@torch.no_grad()
def judged(folder: Path, live: Tensor) -> dict[str, float]:
    """How far transformers' scores are from the live engine's and from ours, and how far they spread."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = answers(tokenizer)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = classifier(**batch).logits.squeeze(-1)
    again = create_critic_model(str(folder), tokenizer, None, rlhf_training=True)
    reloaded = again.forward_value(**batch)["chosen_end_scores"]
    return {
        "live_difference": (scores - live).abs().max().item(),
        "reloaded_difference": (scores - reloaded).abs().max().item(),
        "spread": scores.std().item(),
    }


def generated(folder: Path) -> int:
    """How many tokens the language model in `folder` says when it is not allowed to end."""
    tokens = AutoTokenizer.from_pretrained(folder)("\n\nHuman: Count.\n\nAssistant:", return_tensors="pt")
    ids = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return answer.shape[1] - ids["input_ids"].shape[1]


def inspect(folder: Path, live: Tensor) -> dict:
    """What the three steps left in a family's folder."""
    return {
        "sft": json.loads((folder / "sft" / "summary.json").read_text()),
        "generated": {name: generated(folder / name) for name in ("sft", "ppo/actor")},
        "scores": judged(folder / "reward", live),
        "ppo": [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()],
        "vocabulary": [
            AutoModelForCausalLM.from_pretrained(folder / name).get_input_embeddings().num_embeddings
            for name in ("base", "sft", "ppo/actor")
        ],
    }


def main(folder: Path, stage: int, families: list[str]) -> None:
    """Train and inspect one family after the other; rank 0 writes after each what it has seen so far."""
    process_group.init_process_group()
    programs, live, seen = {step: program(step) for step in PROGRAMS}, [], {}
    keep_scores(live)
    if mesh().is_main_process:
        write_pairs(folder / "pairs.jsonl")
    for family in families:
        start = time.perf_counter()
        if mesh().is_main_process:
            save_tiny_model(folder / family / "base", family, tokenizer=tiny_tokenizer(pad_token=None))
        collectives.barrier(axis="world")
        for step, argv in flags(folder, family, stage).items():
            args = parse_arguments(step, argv)
            programs[step].main(args, prepare(args))
        if mesh().is_main_process:
            seen[family] = inspect(folder / family, live[-1]) | {"seconds": time.perf_counter() - start}
            (folder / "seen.json").write_text(json.dumps(seen))
        collectives.barrier(axis="world")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    process_group.destroy_process_group()
