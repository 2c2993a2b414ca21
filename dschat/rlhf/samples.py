"""Some answers of a PPO step for people, and how the numbers of all of them are distributed."""

import io
import shutil
import sys
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dschat.console.text import printable
from dschat.rlhf.experience import Experience

NUM_SAMPLES = 3
"""Of a PPO step."""
SHOWN_CHARACTERS = 600
"""Of a prompt's end and of an answer, in a table; samples.jsonl has all."""
LEAST_WIDTH = 80


def samples_of(experience: Experience, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The first prompts with their answers, each with raw score, KL in nats and length in tokens."""
    analysis, rollout = experience.analysis, experience.rollout
    kl = analysis.log_ratio(rollout.answer_mask).sum(dim=1)
    rows = []
    for row in range(min(NUM_SAMPLES, len(kl))):
        one = rollout.rows(torch.tensor([row], device=kl.device))
        prompt, answer = one.input_ids[0].split([one.prompt_length, one.answer_mask.shape[1]])
        masks = one.attention_mask[0].bool().split([one.prompt_length, one.answer_mask.shape[1]])
        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip((prompt, answer), masks, strict=True)]
        numbers = {"score": analysis.scores[row].item(), "kl": kl[row].item()}
        length = int(rollout.answer_lengths[row])
        rows.append({"prompt": texts[0], "answer": texts[1], **numbers, "length": length})
    return rows


def samples_table(step: int, rows: list[dict[str, Any]]) -> str:
    """The samples as a table as wide as the terminal, their text made safe for it."""
    lines = box.SQUARE if (sys.stdout.encoding or "").lower().startswith("utf") else box.ASCII
    table = Table(title=f"answers of PPO step {step}", show_lines=True, box=lines)
    for name in ("prompt", "answer"):
        table.add_column(name, overflow="fold")
    for name in ("score", "kl", "length"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        prompt, answer = row["prompt"].strip(), row["answer"].strip()
        before, after = (("..." if len(text) > SHOWN_CHARACTERS else "") for text in (prompt, answer))
        table.add_row(
            printable(before + prompt[-SHOWN_CHARACTERS:]),
            printable(answer[:SHOWN_CHARACTERS] + after),
            f"{row['score']:.3f}",
            f"{row['kl']:.3g}",
            str(row["length"]),
        )
    width = max(shutil.get_terminal_size((110, 24)).columns, LEAST_WIDTH)
    shown = io.StringIO()
    Console(file=shown, width=width, markup=False, emoji=False, highlight=False).print(table)
    return shown.getvalue().rstrip("\n")


def distributions(experience: Experience) -> dict[str, np.ndarray]:
    """Arrays for histograms by tag: scores and lengths of answers, log-ratios of tokens to the reference."""
    mask = experience.rollout.answer_mask
    arrays = {
        "rollout/scores": experience.analysis.scores,
        "rollout/answer_lengths": experience.rollout.answer_lengths,
        "actor/log_ratios": experience.analysis.log_ratio(mask)[mask],
    }
    return {tag: values.float().cpu().numpy() for tag, values in arrays.items()}
