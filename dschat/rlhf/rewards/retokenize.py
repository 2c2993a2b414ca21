"""Answers in the tokens and the template of a reward model with a tokenizer of its own."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.data.encoder import Encoder
from dschat.data.rows import Rows
from dschat.data.templates import ChatTemplate
from dschat.rlhf.rollout.batch import RolloutBatch


def answer_texts(batch: RolloutBatch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Answers as text, for sources that score text, without end tokens and the template's marks around them.

    Any other special token stands in the text. PPO learns those too, so an actor could hide in them what no
    one scores.
    """
    template = ChatTemplate(tokenizer)
    lengths = (batch.answer_lengths - batch.ended.long()).tolist()  # an end token is the last of its answer
    return [
        template.content(exact_text(tokenizer, ids[:length]))
        for ids, length in zip(batch.answers, lengths, strict=True)
    ]


def exact_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    """The text of token ids as it is, special tokens among it."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False)
    assert isinstance(text, str)
    return text


def prompt_texts(batch: RolloutBatch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts as the model reads them, template and special tokens and all, without padding."""
    length = batch.prompt_length
    pairs = zip(batch.input_ids[:, :length], batch.attention_mask[:, :length].bool(), strict=True)
    return [exact_text(tokenizer, ids[mask]) for ids, mask in pairs]


class Retokenizer:
    """Turns rollouts in the actor's tokens into the same prompts and answers in the reward model's.

    `prompts` are those of the rollouts, with the column reader_ids (`dschat.data.tokenization`). What is over
    `max_tokens` loses the prompt's beginning, then the answer's end.
    """

    def __init__(
        self,
        prompts: Rows,
        actor: PreTrainedTokenizerBase,
        reward_tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self._max_tokens = max_tokens
        self._prompts = Rows(prompts.table.select(["reader_ids"]))
        self._actor = actor
        self._encoder, self._pad_id = Encoder(reward_tokenizer), reward_tokenizer.pad_token_id

    def read(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch in the reward model's tokens. An answer that was cut off has no end token there either.

        Where the actor wrote the text of a control token of the reward model's, such as one that begins a
        turn, the reward model gets that text in ordinary tokens.
        """
        answers = self._encoder.answers_alone(answer_texts(batch, self._actor), batch.ended.tolist())
        prompts = self._prompts[batch.prompt_rows.cpu().numpy()]["reader_ids"].to_pylist()
        if self._max_tokens is not None:
            answers = [ids[: self._max_tokens - 1] for ids in answers]
            room = [self._max_tokens - len(ids) for ids in answers]
            prompts = [ids[-number:] for ids, number in zip(prompts, room, strict=True)]
        device = batch.input_ids.device
        left, left_mask = _padded(prompts, self._pad_id, device, left=True)
        right, right_mask = _padded(answers, self._pad_id, device)
        return RolloutBatch(
            input_ids=torch.cat([left, right], dim=1),
            attention_mask=torch.cat([left_mask, right_mask], dim=1).long(),
            answer_mask=right_mask,
            ended=batch.ended,
            prompt_rows=batch.prompt_rows,
            prompt_length=left.shape[1],
        )


def _padded(
    rows: list[list[int]], pad_id: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of token ids as [B, L], and a mask bool [B, L] of what is no padding."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side=side)
    positions = torch.arange(ids.shape[1])
    width = ids.shape[1]
    mask = positions >= (width - lengths)[:, None] if left else positions < lengths[:, None]
    return ids.to(device), mask.to(device)
