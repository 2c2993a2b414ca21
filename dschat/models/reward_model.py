"""A transformer with one number per position: a score where an answer ends, a value elsewhere."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from dschat.distributed.collectives import sum_with_gradient
from dschat.distributed.mesh import is_main_process
from dschat.distributed.zero3 import gathered
from dschat.losses import pairwise_ranking_loss
from dschat.models.model_folder import check_model_path
from dschat.models.tokenizer import load_tokenizer
from dschat.models.vocabulary import configure_tokens, grow_vocabulary
from dschat.models.weights import HEAD, check_weights, has_head, quiet_transformers, reward_model_loader


class ScoreHead(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are in: bf16 keeps three digits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """Backbone `rwtransformer` and bias-free head `v_head` (hidden size -> 1), named as in DeepSpeed-Chat.

    `create_critic_model` builds it for pairs and `from_pretrained` for scores of any rows; `export_model`
    writes it for `AutoModelForSequenceClassification`. An `attention_mask` of None means that there is no
    padding; padding may stand on either side.
    """

    @staticmethod
    def from_pretrained(
        model_name_or_path: str | Path, *, dtype: torch.dtype = torch.float32
    ) -> "ScoringModel":
        """The model of a folder or hub id whose call returns scores, for training loops of one's own.

        A reward model keeps its head, any other model gets a fresh one, drawn from torch's seed. Dropout is
        off. Every process reads the whole model; `deepspeed.initialize` shards it and sets its precision.
        Raises `UserError` where weights or tokenizer cannot be read or do not fit.
        """
        path = str(model_name_or_path)
        check_model_path(path, "RewardModel.from_pretrained")
        tokenizer = load_tokenizer(path)
        load = reward_model_loader(path, dropout=0.0)
        fresh_head = not has_head(load, path)
        check_weights(load, path, fresh_head=fresh_head)
        with quiet_transformers(progress=is_main_process()):
            classifier = load(dtype=dtype, ignore_mismatched_sizes=fresh_head)
        grow_vocabulary(classifier, tokenizer)
        if fresh_head:
            draw_head(classifier.score)
        configure_tokens(classifier, tokenizer)
        model = ScoringModel(classifier.base_model, classifier.score, classifier.config)
        model.tokenizer = tokenizer
        return model

    def as_classifier(self, state: Mapping[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Transformers' classifier of the same architecture, without weights, and `state` by its names."""
        backbone = self.rwtransformer
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(self.config, dtype=backbone.dtype)
        prefix = f"{backbone.base_model_prefix}."
        renamed = {
            HEAD if name == "v_head.weight" else prefix + name.removeprefix("rwtransformer."): tensor
            for name, tensor in state.items()
        }
        return classifier, renamed

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
        ends_here: Tensor | None = None,
        use_cache: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """Ranking loss and scores of B pairs: rows [2B, L], all chosen answers before all rejected ones.

        Returns `loss` (scalar) and `chosen_mean_scores`, `rejected_mean_scores` [B] in fp32: each answer's
        score at its last real token. `weights` [B] are the pairs' in the loss, 0 for those that only fill a
        batch; it is the weighted sum over pairs divided by `denominator`, by default the weights' sum.
        `margins` [B] are subtracted from the difference of the scores.
        Where the answers share rows, `last_tokens` [2B] are the places of their last tokens, counted through
        the rows. Where ranks share the tokens of rows, `ends_here` [2B] marks those whose last tokens this
        rank has.
        With `return_values` any rows [N, L] go in and their values come out, as in `forward_value`: so a
        DeepSpeed engine can be called for values. `use_cache` is accepted for old scripts.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        if return_values:
            return self.v_head(hidden).squeeze(-1)
        if last_tokens is None:
            last_hidden = at_last_token(hidden, attention_mask)
        else:
            last_hidden = hidden.flatten(0, 1)[last_tokens]
        scores = scores_of_all(self.v_head(last_hidden).squeeze(-1), ends_here)
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

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """What the head reads, [N, L, D]."""
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        options = {"position_ids": position_ids} if self._takes_positions else {}
        output = self.rwtransformer(input_ids, attention_mask=attention_mask, use_cache=False, **options)
        return output.last_hidden_state


class ScoringModel(RewardModel):
    """A `RewardModel` whose call takes one list of rows and returns their scores.

    So `engine(batch["chosen_input_ids"])` gives the scores of chosen answers, and the loss of a pair is the
    caller's: `-logsigmoid(chosen - rejected)`. `RewardModel.from_pretrained` makes it.
    """

    tokenizer: Any

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The scores of rows [N, L], each at its row's last real token. -> fp32 [N].

        Without an `attention_mask` the pad ids of the model at a row's end are padding. A row of nothing else
        is scored at its first token.
        """
        if attention_mask is None:
            is_token = input_ids != self.config.pad_token_id
            attention_mask = is_token.flip(-1).cumsum(dim=-1).flip(-1).clamp(max=1)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        return self.v_head(at_last_token(hidden, attention_mask)).squeeze(-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a reward model, which step 3 and transformers load.

        Every rank calls it, as ZeRO-3's shards are gathered; rank 0 writes.
        """
        with gathered(self.parameters()):
            if is_main_process():
                classifier, state = self.as_classifier(self.state_dict())
                classifier.config.use_cache = True  # off in training
                classifier.save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)


def draw_head(head: nn.Linear) -> None:
    """Normal(0, 1 / sqrt(d + 1)) as in Stiennon et al. 2020, https://arxiv.org/abs/2009.01325."""
    with gathered([head.weight], modifier_rank=0), torch.no_grad():
        generator = torch.Generator().manual_seed(torch.initial_seed())
        std = 1 / math.sqrt(head.in_features + 1)
        head.weight.copy_(torch.normal(0.0, std, (1, head.in_features), generator=generator))


def at_last_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The entry at each row's last real token: [N, L, ...] -> [N, ...]."""
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = torch.where(attention_mask.bool(), positions, 0).amax(dim=1)
    return x[torch.arange(len(x), device=x.device), last]


def scores_of_all(scores: Tensor, ends_here: Tensor | None) -> Tensor:
    """Scores [N] of rows, those of other ranks too where each has the ones that `ends_here` marks."""
    if ends_here is None:
        return scores
    return sum_with_gradient(torch.where(ends_here, scores, 0), axis="sequence")


def enable_gradient_checkpointing(model: PreTrainedModel, **options: Any) -> None:
    """`model.gradient_checkpointing_enable(**options)` under the name this version of transformers wants."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(**options)


def disable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """The reverse of `enable_gradient_checkpointing`."""
    name = "activation_checkpointing_disable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()
