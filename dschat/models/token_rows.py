"""Rows of new tokens, trained where the vocabulary is frozen: PEFT's `trainable_token_indices`.

PEFT's own layer computes with a changed copy of the whole matrix, which ZeRO-3 shards. Here what training
adds to a row is a parameter of its own, [tokens, d] and 0 at first, that the layer's forward hook applies.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dschat.distributed.deepspeed_private import whole_shape

ROWS = ".new_rows.delta"
"""How the parameter is named after the layer that it belongs to."""

PEFT_ROWS = ".token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows themselves (not what was added to them) in an adapter's file."""


class NewRows(nn.Module):
    """What training adds to the rows of some tokens in an embedding, or in the layer that makes logits."""

    row_of: Tensor
    """The place of each row of the layer in `delta`, int64 [rows]; N for rows that are not trained."""
    ids: Tensor
    """The tokens whose rows are trained, int64 [N]."""

    def __init__(self, layer: Any, ids: list[int], delta: nn.Parameter | None = None) -> None:
        super().__init__()
        num_rows, width = whole_shape(layer.weight)
        zeros = torch.zeros(len(ids), width, dtype=layer.weight.dtype, device=layer.weight.device)
        self.delta = nn.Parameter(zeros) if delta is None else delta
        self.scale = 1.0
        row_of = torch.full((num_rows,), len(ids), device=layer.weight.device)
        row_of[ids] = torch.arange(len(ids), device=row_of.device)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("ids", torch.tensor(ids, device=row_of.device), persistent=False)
        self._is_embedding = isinstance(layer, nn.Embedding)

    def forward(self, inputs: Tensor, output: Tensor, factor: Tensor | float) -> Tensor:
        """The layer's output, as if its rows were the changed ones."""
        if self._is_embedding:
            added = F.embedding(self.row_of[inputs], F.pad(self.delta, (0, 0, 0, 1)))
            return output + added.to(output.dtype) * factor * self.scale
        logits = F.linear(inputs, self.delta).to(output.dtype) * self.scale
        return output.index_add_(-1, self.ids, logits)  # in place: the largest tensor there is


def train_new_rows(model: PreTrainedModel, ids: Iterable[int]) -> dict[str, list[int]]:
    """Train what is added to these tokens' rows of the vocabulary, in place; outputs stay what they were.

    Both the embedding's and the output layer's rows, which are the same where the two are tied. Returns the
    ids by the layer's name, as PEFT's configurations have them.
    """
    ids, names = sorted(ids), {module: name for name, module in model.named_modules()}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _attach(embedding, ids)
    trained = {names[embedding]: ids}
    if output is not None:
        is_tied = output.weight is embedding.weight
        _attach(output, ids, rows.delta if is_tied else None)
        if not is_tied:
            trained[names[output]] = ids
    return trained


def _attach(layer: Any, ids: list[int], delta: nn.Parameter | None = None) -> NewRows:
    layer.new_rows = rows = NewRows(layer, ids, delta)
    layer.register_forward_hook(_add_rows)
    return rows


def _add_rows(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # Some embeddings multiply what they look up, Gemma's by the root of the width.
    return layer.new_rows(inputs[0], output, getattr(layer, "embed_scale", 1.0))


def new_rows_of(model: nn.Module) -> list[NewRows]:
    """The trained rows of a model."""
    return [module for module in model.modules() if isinstance(module, NewRows)]


def merged_rows(state: dict[str, Tensor], ids: dict[str, list[int]]) -> dict[str, Tensor]:
    """The changed rows by their layer's name. Added in fp32 and rounded once, to the weights' precision."""
    rows = {}
    for layer in (name.removesuffix(ROWS) for name in state if name.endswith(ROWS)):
        weight = state[f"{layer}.weight"]
        old = weight[_ids_of(layer, ids)].float()
        rows[layer] = (old + state[layer + ROWS].float()).to(weight.dtype)
    return rows


def merge_rows(state: dict[str, Tensor], ids: dict[str, list[int]]) -> dict[str, Tensor]:
    """The same weights with the changed rows in their places; `state` stays."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith(ROWS)}
    for layer, rows in merged_rows(state, ids).items():
        weight = merged[f"{layer}.weight"].clone()
        weight[_ids_of(layer, ids)] = rows
        merged[f"{layer}.weight"] = weight
    return merged


def _ids_of(layer: str, ids: dict[str, list[int]]) -> list[int]:
    """Those of a layer whose name may have gained a prefix since, such as "model."."""
    return next(numbers for name, numbers in ids.items() if layer == name or layer.endswith(f".{name}"))
