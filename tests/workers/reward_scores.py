"""Score one rollout batch of four answers after the other, on as many ranks as it is started with.

python reward_scores.py TOKENIZER_FOLDER OUTPUT_FOLDER '[[["--reward_function=..."], [["a", ...], ...]], ...]'
A run is its flags and batches of answers. On several ranks another argument is one more run, in which all of
them read the same rows. Each rank writes what it had, and how that ended, to OUTPUT_FOLDER.
"""

import json
import sys
from pathlib import Path

import torch

from dschat.arguments import parse_arguments
from dschat.data.rows import Rows
from dschat.distributed.collectives import make_axis_groups
from dschat.distributed.mesh import mesh, set_parallel_sizes
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.errors import UserError
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rollout.batch import RolloutBatch

PROMPTS = ["Say a.", "Say it again, b.", "c?", "And d"]
ROWS = [{"prompt": text, "number": place} for place, text in enumerate(PROMPTS)]
ROWS[3]["answers"] = ["one", "two"]
ORDER = [2, 0, 3, 1]
"""The row of each answer."""
MODEL_SCORES = [5.0, 7.0, 9.0, 11.0]


def rollout(tokenizer, answers: list[str]) -> RolloutBatch:
    """The answers to `PROMPTS` in `ORDER`, each with its end token."""
    left = tokenizer([PROMPTS[i] for i in ORDER], padding=True, padding_side="left", return_tensors="pt")
    ended = [answer + tokenizer.eos_token for answer in answers]
    right = tokenizer(ended, padding=True, padding_side="right", return_tensors="pt")
    return RolloutBatch(
        input_ids=torch.cat([left["input_ids"], right["input_ids"]], dim=1),
        attention_mask=torch.cat([left["attention_mask"], right["attention_mask"]], dim=1),
        answer_mask=right["attention_mask"].bool(),
        ended=torch.ones(len(answers), dtype=torch.bool),
        prompt_rows=torch.tensor(ORDER),
        prompt_length=left["input_ids"].shape[1],
    )


def run(tokenizer_folder: Path, flags: list[str], batches: list[list[str]]) -> dict:
    """Score the batches until one ends the run."""
    args = parse_arguments("rlhf", ["--actor_model_name_or_path=a", *flags])
    tokenizer = load_tokenizer(tokenizer_folder)
    scale = (8.0, 2.0) if args.ppo.score_scale == "step2" else (0.0, 1.0)
    rewards = Rewards(
        args.rewards,
        args.reward_weights,
        tokenizer,
        ("answers", "number", "prompt"),
        model_scale=scale,
    )
    prompts = Rows.from_dict({"row": [json.dumps(row) for row in ROWS]})
    mine = torch.arange(4)[mesh().data.rank :: mesh().data.size].flip(0).split(1)  # in no order
    results, error = [], None
    try:
        for answers in batches:
            model_scores = torch.tensor(MODEL_SCORES) if args.reward_path else None
            parts = rewards.score(rollout(tokenizer, answers), list(mine), prompts, model_scores)
            by_source = {name: scores.tolist() for name, scores in parts.by_source.items()}
            results.append([parts.scores.tolist(), by_source, parts.num_errors])
    except UserError as problem:
        error = str(problem)
    return {"results": results, "error": error}


if __name__ == "__main__":
    init_process_group()
    every = [run(Path(sys.argv[1]), flags, batches) for flags, batches in json.loads(sys.argv[3])]
    if mesh().world.size > 1:
        set_parallel_sizes(tensor=mesh().world.size)
        make_axis_groups()
        every.append(run(Path(sys.argv[1]), *json.loads(sys.argv[4])))
    (Path(sys.argv[2]) / f"{mesh().world.rank}.json").write_text(json.dumps(every))
    destroy_process_group()
