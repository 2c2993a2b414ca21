"""A transformer with one number per position: a score where an answer ends, a value elsewhere."""

import inspect
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dschat.losses import pairwise_ranking_loss


class ScoreHead(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are in: bf16 keeps three digits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """Backbone `rwtransformer` and bias-free head `v_head` (hidden size -> 1), named as in DeepSpeed-Chat.

    `create_critic_model` builds it, `export_model` writes it for `AutoModelForSequenceClassification`. An
    `attention_mask` of None means that there is no padding; padding may stand on either side.
    """

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rwtransformer = backbone
        self.v_head = ScoreHead(head.in_features, 1, bias=False, device="meta")
        self.v_head.weight = head.weight
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass; `options` go to the backbone."""
        enable_gradient_checkpointing(self.rwtransformer, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable_gradient_checkpointing(self.rwtransformer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        loss_fn: Literal["log_sig", "log_exp"] = "log_sig",
        weights: Tensor | None = None,
        margins: Tensor | None = None,
        denominator: float | None = None,
        return_values: bool = False,
        last_tokens: Tensor | None = None,
        use_cache: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """Ranking loss and scores of B pairs: rows [2B, L], all chosen answers before all rejected ones.

        Returns `loss` (scalar) and `chosen_mean_scores`, `rejected_mean_scores` [B] in fp32: each answer's
        score at its last real token. `weights` [B] are the pairs' in the loss, 0 for those that only fill a
        batch; it is the weighted sum over pairs divided by `denominator`, by default the weights' sum.
        `margins` [B] are subtracted from the difference of the scores.
        Where the answers share rows, `last_tokens` [2B] are the places of their last tokens, counted through
        the rows.
        With `return_values` any rows [N, L] go in and their values come out, as in `forward_value`: so a
        DeepSpeed engine can be called for values. `use_cache` is accepted for old scripts.
        """
        hidden = self._hidden_states(input_ids, attention_mask, position_ids)
        if return_values:
            return self.v_head(hidden).squeeze(-1)
        if last_tokens is None:
            last_hidden = at_last_token(hidden, attention_mask)
        else:
            last_hidden = hidden.flatten(0, 1)[last_tokens]
        scores = self.v_head(last_hidden).squeeze(-1)
        chosen, rejected = scores.chunk(2)
        losses = pairwise_ranking_loss(chosen, rejected, kind=loss_fn, margin=margins)
        weights = torch.ones_like(losses) if weights is None else weights
        total = weights.sum().clamp(min=1e-8) if denominator is None else denominator
        loss = (losses * weights).sum() / total
        return {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """Values [N, L] in fp32, one per token; the value at a row's last real token is its score.

        Returns a dictionary of `values` [N, L] and `chosen_end_scores` [N], or with `return_value_only` the
        values. `prompt_length` and `use_cache` are accepted for old scripts.
        """
        # Through __call__, so that ZeRO-3's hooks see the forward pass of the whole model.
        values = self(input_ids, attention_mask, position_ids, return_values=True)
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": at_last_token(values, attention_mask)}

    def _hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        options = {"position_ids": position_ids} if self._takes_positions else {}
        output = self.rwtransformer(input_ids, attention_mask=attention_mask, use_cache=False, **options)
        return output.last_hidden_state


def at_last_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The entry at each row's last real token: [N, L, ...] -> [N, ...]."""
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = torch.where(attention_mask.bool(), positions, 0).amax(dim=1)
    return x[torch.arange(len(x), device=x.device), last]


def enable_gradient_checkpointing(model: PreTrainedModel, **options: Any) -> None:
    """`model.gradient_checkpointing_enable(**options)` under the name this version of transformers wants."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(**options)


def disable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """The reverse of `enable_gradient_checkpointing`."""
    name = "activation_checkpointing_disable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()
