"""The floating-point operations that a model needs for rows of tokens, from its weights and configuration.

The count is that of PaLM (arXiv 2204.02311, appendix B): 2 operations per weight and token forward, 2 for the
gradient of the activations and 2 for that of the weights, 6N in all; and the products of attention. It is
what the model needs and not what a run does: recomputed activations, padding, and positions that a causal
mask hides add nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import sum_across_ranks
from dschat.distributed.device import current_device
from dschat.models.config import head_width
from dschat.models.quantization import num_weights

EXPERT_SETTINGS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of the number of experts of a layer, by model family."""


@dataclass(frozen=True)
class Rows:
    """What a pass reads, summed over its rows."""

    tokens: float
    """Tokens without padding."""
    squares: float
    """The squares of the rows' numbers of tokens."""
    labels: float
    """Tokens that are predicted: as many outputs of the vocabulary are needed."""

    @staticmethod
    def counted(batch: TokenBatch) -> dict[str, Tensor]:
        """The numbers of a batch without its fillers as scalars on its device, fp32, by their names."""
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        lengths = (mask.sum(dim=1) * batch.label_mask.any(dim=1)).float()
        return {
            "tokens": lengths.sum(),
            "squares": lengths.square().sum(),
            "labels": batch.label_mask.sum().float(),
        }


@dataclass(frozen=True)
class ModelWork:
    """The sizes that decide how much a model computes per token."""

    body: float
    """Weights that a token meets: all but embeddings and the output layer; of experts those chosen."""
    trained_body: float
    """Those of them that are trained."""
    head: float
    """Weights of the output layer, which meets the labels alone. A reward model's one row is in its body."""
    trained_head: float
    attention: float
    """Layers x heads x width of a head."""

    @staticmethod
    def of(model: Any) -> "ModelWork":
        """The sizes of a model, which may be sharded, packed in 4 bits, or have adapters.

        Every rank of a pipeline must call it: the stages' sizes are added.
        """
        config = model.config.get_text_config()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head_weight = None if head is None else head.weight
        embeddings = {
            id(p)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters(recurse=False)
        }
        counts = {True: 0.0, False: 0.0}
        for name, parameter in model.named_parameters():
            if id(parameter) not in embeddings and parameter is not head_weight:
                share = _share_of_experts(config) if ".experts." in name else 1.0
                counts[parameter.requires_grad] += share * num_weights(parameter)
        head_size = 0.0 if head_weight is None else float(num_weights(head_weight))
        trained_head = head_size if head_weight is not None and head_weight.requires_grad else 0.0
        of_stage = torch.tensor(
            [counts[True], counts[False], head_size, trained_head], device=current_device()
        )
        trained, frozen, head_size, trained_head = sum_across_ranks(of_stage, axis="pipeline").tolist()
        return ModelWork(
            body=trained + frozen,
            trained_body=trained,
            head=head_size,
            trained_head=trained_head,
            attention=float(config.num_hidden_layers * config.num_attention_heads * head_width(config)),
        )

    def forward(self, rows: Rows) -> float:
        """Operations of a forward pass: two products of attention, each over half of the square."""
        attention = 2 * self.attention * rows.squares
        return 2 * self.body * rows.tokens + 2 * self.head * rows.labels + attention

    def training(self, rows: Rows) -> float:
        """Operations of forward and backward: 6 per weight and token, 4 where the weight is frozen.

        The gradient of the activations is counted through all layers, as adapters need it, which are in all.
        """
        of_weights = 2 * self.trained_body * rows.tokens + 2 * self.trained_head * rows.labels
        return 2 * self.forward(rows) + 2 * self.attention * rows.squares + of_weights


def _share_of_experts(config: Any) -> float:
    """Experts that a token goes through, of those that a layer has."""
    numbers = (getattr(config, name, None) for name in EXPERT_SETTINGS)
    num_experts = next((number for number in numbers if number), 0)
    return getattr(config, "num_experts_per_tok", num_experts) / num_experts if num_experts else 1.0
