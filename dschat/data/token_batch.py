"""Rows of tokens for one forward pass, with their labels.

The shift by one between a token and the output that predicts it stands in `TokenBatch.of`, nowhere else.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dschat.data.moving import moved
from dschat.data.packing import Placement, RowLayout


@dataclass(frozen=True)
class TokenBatch:
    """B rows of L tokens that go through a model together, and N columns of labels: the tokens to predict.

    The output at column `first_output + n` of the rows predicts column n of the labels. The prompt 5 6 with
    the answer 7 8, for example, has `input_ids` [[5, 6, 7, 8]], `labels` [[7, 8]] and `first_output` 1: the
    output at the 6 predicts the 7.
    """

    input_ids: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, N] int64."""
    label_mask: Tensor
    """[B, N] bool: True on the labels that count; the others are of prompts or padding."""
    first_output: int
    """The column of the rows whose output predicts the first column of the labels."""
    attention_mask: Tensor | None = None
    """[B, L] int64: 1 on tokens, 0 on padding, which may stand on either side; None without padding."""
    position_ids: Tensor | None = None
    """[B, L] int64: the tokens' positions; None where the model counts them itself."""
    placement: Placement | None = None
    """Where the tokens stand in the rows that a model reads; None: as they stand here."""

    @staticmethod
    def of(
        tokens: Tensor,
        label_mask: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reads_last: bool = True,
    ) -> "TokenBatch":
        """The rows `tokens` [B, L], whose last N columns are labels.

        `label_mask` [B, N] marks those that count. A mask of all L columns is allowed: its first column is
        left out, because nothing predicts a row's first token. Without `reads_last` the last token is a label
        only, and the rows are one column shorter.
        """
        num_labels = min(label_mask.shape[1], tokens.shape[1] - 1)
        first_label = tokens.shape[1] - num_labels
        return TokenBatch(
            input_ids=tokens if reads_last else tokens[:, :-1],
            labels=tokens[:, first_label:],
            label_mask=label_mask[:, label_mask.shape[1] - num_labels :],
            first_output=first_label - 1,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )

    @property
    def outputs(self) -> slice:
        """The columns of the rows whose outputs predict the labels."""
        return slice(self.first_output, self.first_output + self.labels.shape[1])

    def in_rows(self, per_label: Tensor) -> Tensor:
        """Each number in the column of its token, 0 in every other and where `label_mask` is False.

        [B, N] -> [B, L], for batches that read their last token. A sum over it has the rounding of a sum over
        whole rows, whatever the longest prompt of the batch is.
        """
        num_others = self.input_ids.shape[1] - self.labels.shape[1]
        assert num_others > 0, "the last token is not among the rows' columns"
        return F.pad(torch.where(self.label_mask, per_label, 0), (num_others, 0))

    def placed(self, layout: RowLayout) -> "TokenBatch":
        """The batch with its placement: tokens and labels stay where they are here."""
        is_token = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        placement = Placement.of(
            is_token.bool().cpu().numpy(),
            self.label_mask.cpu().numpy(),
            first_output=self.first_output,
            layout=layout,
        )
        return replace(self, placement=placement.to(self.input_ids.device))

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The batch on that device."""
        return moved(self, device)
