"""How good an actor is on prompts that no step has seen: checked success, KL to the SFT model, score."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dschat.rlhf.answering import Answers, AskedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import compare

MAX_ANSWER_TOKENS = 20
BATCH_SIZE = 200


def measure(actor: Path, sft: Path, reward: Path, data: Path) -> dict[str, float]:
    """Of one sampled answer to each prompt of `data`, by the code of scripts/compare.py and at temperature 1.

    `success` is a share, `kl` the mean over answers of log pi - log pi_sft in nats, `score` the mean of the
    reward model as transformers loads it, `answer_length` in tokens, `eos_share` a share.
    """
    from demo_task import check_answer

    from dschat.rlhf.answering import load, log_likelihoods

    args = compare.parse(
        ["--model", f"actor={actor}", "--data-path", str(data), "--batch-size", str(BATCH_SIZE),
         "--max-answer-seq-len", str(MAX_ANSWER_TOKENS)]
    )  # fmt: skip
    prompts = compare.read_prompts(args).prompts
    model = load(str(actor), "actor")
    said = compare.ask(model, prompts, args)
    pairs = list(zip(prompts, said.texts, strict=True))
    own, reference = (log_likelihoods(one, said, args.temperature) for one in (model, _language_model(sft)))
    return {
        "success": sum(not check_answer(compare.as_text(p), text) for p, text in pairs) / len(pairs),
        "kl": (own - reference).mean().item(),
        "score": _mean_score(reward, said, model.tokenizer.pad_token_id),
        **said.metrics,
    }


@cache
def _language_model(folder: Path) -> AskedModel:
    from dschat.rlhf.answering import load

    return load(str(folder), "reference")


@cache
def _reward_model(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()


def _mean_score(reward: Path, said: Answers, pad_id: int) -> float:
    import torch

    model, total = _reward_model(reward), 0.0
    rows = said.token_ids
    for start in range(0, len(rows), BATCH_SIZE):
        batch = [torch.tensor(row) for row in rows[start : start + BATCH_SIZE]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad_id)
        with torch.no_grad():
            total += model(input_ids=ids, attention_mask=(ids != pad_id).long()).logits[:, 0].sum().item()
    return total / len(rows)
