"""Prompts with sampled answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dschat.data.collate import PromptBatch
from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import gather_rows, largest_across_ranks
from dschat.distributed.mesh import mesh
from dschat.models.end_tokens import is_end


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts and answers. Columns: P of the prompt, padded on the left, then T of the answer, on the right.

    `answer_mask` is 1 up to and including the first end token; what follows in `input_ids` is padding.
    """

    input_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64
    answer_mask: Tensor  # [B, T] bool
    ended: Tensor  # [B] bool: the answer has its end token; False where it was cut at the length limit
    prompt_rows: Tensor  # [B] int64: the prompt's row in its data set
    prompt_length: int  # P
    logprobs: Tensor | None = None  # [B, T] fp32: of the sampled tokens when they were sampled; 0 beyond

    @staticmethod
    def of_answers(
        prompts: PromptBatch,
        answers: Tensor,
        end_ids: tuple[int, ...],
        pad_token_id: int,
        logprobs: Tensor | None = None,
    ) -> "RolloutBatch":
        """Prompts with sampled tokens [B, T], and maybe their log-probabilities [B, T].

        What follows an answer's first end token may be anything.
        """
        answer_mask = mask_up_to_first_end(answers, end_ids)
        answers = answers.masked_fill(~answer_mask, pad_token_id)
        return RolloutBatch(
            input_ids=torch.cat([prompts.input_ids, answers], dim=1),
            attention_mask=torch.cat([prompts.attention_mask.long(), answer_mask.long()], dim=1),
            answer_mask=answer_mask,
            ended=(is_end(answers, end_ids) & answer_mask).any(dim=1),
            prompt_rows=prompts.rows,
            prompt_length=prompts.input_ids.shape[1],
            logprobs=None if logprobs is None else logprobs.masked_fill(~answer_mask, 0),
        )

    @property
    def tokens(self) -> TokenBatch:
        """The rows for a forward pass; the answers are their labels."""
        return TokenBatch.of(
            self.input_ids,
            self.answer_mask,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
        )

    @property
    def answers(self) -> Tensor:
        """Answer tokens, padding included. [B, T]"""
        return self.input_ids[:, self.prompt_length :]

    @property
    def position_ids(self) -> Tensor:
        """Positions counted over real tokens, so that padding on the left shifts nothing. [B, P + T]"""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def answer_lengths(self) -> Tensor:
        """Tokens of each answer, its end token included. [B]"""
        return self.answer_mask.sum(dim=1)

    def rows(self, indices: Tensor) -> "RolloutBatch":
        """These rows, without columns that are padding in all of them."""
        prompt_mask = self.attention_mask[indices, : self.prompt_length]
        answer_mask = self.answer_mask[indices]
        first = self.prompt_length - int(prompt_mask.sum(dim=1).max())
        length = int(answer_mask.sum(dim=1).max())
        kept = slice(first, self.prompt_length + length)
        return RolloutBatch(
            input_ids=self.input_ids[indices, kept],
            attention_mask=self.attention_mask[indices, kept],
            answer_mask=answer_mask[:, :length],
            ended=self.ended[indices],
            prompt_rows=self.prompt_rows[indices],
            prompt_length=self.prompt_length - first,
            logprobs=None if self.logprobs is None else self.logprobs[indices, :length],
        )

    def padded(self, prompt_length: int, answer_length: int, pad_token_id: int) -> "RolloutBatch":
        """The same rows in wider columns."""
        left = prompt_length - self.prompt_length
        right = answer_length - self.answer_mask.shape[1]
        return RolloutBatch(
            input_ids=torch.nn.functional.pad(self.input_ids, (left, right), value=pad_token_id),
            attention_mask=torch.nn.functional.pad(self.attention_mask, (left, right)),
            answer_mask=torch.nn.functional.pad(self.answer_mask, (0, right)),
            ended=self.ended,
            prompt_rows=self.prompt_rows,
            prompt_length=prompt_length,
            logprobs=None if self.logprobs is None else torch.nn.functional.pad(self.logprobs, (0, right)),
        )


def mask_up_to_first_end(answers: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """True up to and including a row's first end token; all True without one. [B, T] -> bool [B, T]."""
    ends = is_end(answers, end_ids)
    return (ends.cumsum(dim=1) - ends.long()) == 0


def gather_rollouts(batches: list[RolloutBatch], pad_token_id: int) -> RolloutBatch:
    """The rollouts of all batches and ranks as one, in the order in which the loader dealt their prompts.

    It deals them to the ranks in turn, so the rows of a batch are every rank's first, every rank's second,
    ... and do not depend on the number of ranks.
    """
    device = batches[0].input_ids.device
    prompt_length = largest_across_ranks(max(b.prompt_length for b in batches), device, axis="data")
    answer_length = largest_across_ranks(max(b.answer_mask.shape[1] for b in batches), device, axis="data")
    wide = [batch.padded(prompt_length, answer_length, pad_token_id) for batch in batches]

    def gather(column: str) -> Tensor:
        by_rank = [
            gather_rows(getattr(b, column), axis="data").unflatten(0, (mesh().data.size, -1)) for b in wide
        ]
        return torch.cat([rows.transpose(0, 1).flatten(0, 1) for rows in by_rank])

    columns = ["input_ids", "attention_mask", "answer_mask", "ended", "prompt_rows"]
    if wide[0].logprobs is not None:
        columns.append("logprobs")
    return RolloutBatch(**{name: gather(name) for name in columns}, prompt_length=prompt_length)
