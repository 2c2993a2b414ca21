"""What tests of rollouts share: a model in the place of an engine, prompts, and answers as lists."""

import torch

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout.batch import RolloutBatch

TEXTS = ["Count", "\n\nHuman: Count to nine, please.\n\nAssistant:", "\n\nHuman: Is it?\n\nAssistant:"]


class PlainEngine:
    """A model where a DeepSpeed engine is expected."""

    def __init__(self, model) -> None:
        self.module = model
        self.device = torch.device("cpu")
        self.training = True

    def eval(self) -> None:
        self.train(False)

    def train(self, mode: bool = True) -> None:
        self.training = mode
        self.module.train(mode)

    def __call__(self, **inputs):
        return self.module(**inputs)


def prompt_batch(tokenizer, texts: list[str]) -> PromptBatch:
    """Prompts padded on the left; equal ones get answers of their own."""
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    keys = torch.tensor([hash(tuple(tokenizer(text)["input_ids"])) for text in texts])
    samples = torch.tensor([texts[:n].count(text) for n, text in enumerate(texts)])
    rows = torch.zeros(len(texts), dtype=torch.long)
    return PromptBatch(batch["input_ids"], batch["attention_mask"], keys, rows=rows, samples=samples)


def answers(rollout: RolloutBatch) -> list[list[int]]:
    """Their tokens, without padding."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.answers, rollout.answer_mask, strict=True)]
