"""The forward pass: every call of a model outside of sampling, from training to golden outputs, is made here.

`model` is a DeepSpeed engine or a module, and stays in its mode. Under ZeRO-3 every rank must call with a
batch of its own. The masks of a batch are not applied: what stands at masked labels is arbitrary.

Ranks that share the tokens of rows (`models/sequence_attention.py`) call with the same batch, compute a part
of it each, and all get the numbers of the whole.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dschat.data.collate import PairBatch
from dschat.data.packing import PADDED, Placement
from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import sum_with_gradient
from dschat.distributed.mesh import mesh
from dschat.models.attention import MEASURED
from dschat.models.reward_model import RewardModel, at_last_token, scores_of_all
from dschat.models.sequence_attention import shares_rows
from dschat.models.softmax import logprobs_and_entropy, token_logprobs


def token_logprobs_of(
    model: Any,
    batch: TokenBatch,
    *,
    num_tokens: int | None = None,
    temperature: float = 1.0,
    every_position: bool = False,
) -> Tensor:
    """Log-probability of each label in nats, at that temperature. -> fp32 [B, N].

    The distribution is over the first `num_tokens` of the vocabulary, by default all of it: see `logits_of`.
    """
    batch = own_part(model, batch)
    logits, labels = _logits_and_labels(model, batch, num_tokens=num_tokens, every_position=every_position)
    return per_label(batch, token_logprobs(logits, labels, temperature=temperature))


def predictions_of(
    model: Any,
    batch: TokenBatch,
    *,
    num_tokens: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs_of`, and the entropy in nats of what predicts each label. -> fp32 [B, N] both.

    Both come of the same logits. The entropy is None without `with_entropy`.
    """
    batch = own_part(model, batch)
    logits, labels = _logits_and_labels(model, batch, num_tokens=num_tokens)
    if not with_entropy:
        return per_label(batch, token_logprobs(logits, labels, temperature=temperature)), None
    logprobs, entropy = logprobs_and_entropy(logits, labels, temperature=temperature)
    return per_label(batch, logprobs), per_label(batch, entropy)


def logits_of(
    model: Any, batch: TokenBatch, *, num_tokens: int | None = None, every_position: bool = False
) -> Tensor:
    """The logits that predict the labels. -> [B, N, V]; of a batch that has a placement [K, V], as there.

    `num_tokens` is the size of the tokenizer: rows that pad a model's vocabulary beyond it are left out, as
    they are in sampling. Without it they take part, as in transformers' own loss.
    Logits are computed at `batch.outputs` only; with `every_position` at all columns of the rows, as a plain
    forward pass does, whose matrix products have other shapes and thus another rounding.
    """
    if every_position and not _is_part(batch):
        batch = replace(batch, placement=None)
    inputs = model_inputs(model, batch)
    if batch.placement is not None:
        with _head_reads(model, batch.placement.outputs) as is_selected:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        if not is_selected:
            logits = logits[batch.placement.outputs]
        return logits[: len(batch.placement.label_places), :num_tokens]
    if every_position:
        return model(**inputs, use_cache=False).logits[:, batch.outputs, :num_tokens]
    columns = torch.arange(batch.outputs.start, batch.outputs.stop, device=batch.input_ids.device)
    return model(**inputs, logits_to_keep=columns, use_cache=False).logits[..., :num_tokens]


def values_of(model: Any, batch: TokenBatch) -> Tensor:
    """A critic's value where each label is predicted: of the row before that token. -> fp32 [B, N]."""
    batch = own_part(model, batch)
    values = _values_at_tokens(model, batch)
    if batch.placement is None:
        return values[:, batch.outputs]
    return per_label(batch, values.flatten()[batch.placement.outputs])


def scores_of(model: Any, batch: TokenBatch) -> Tensor:
    """A reward model's output at each row's last token. -> fp32 [B]."""
    batch = own_part(model, batch)
    values = _values_at_tokens(model, batch)
    if batch.placement is None:
        return at_last_token(values, batch.attention_mask)
    return scores_of_all(values.flatten()[batch.placement.last_tokens], batch.placement.ends_here)


def hidden_states_of(model: Any, batch: TokenBatch) -> Tensor:
    """What the model's last layer passes on at every column of the rows that it reads. -> [R, W, D]."""
    module, inputs = getattr(model, "module", model), model_inputs(model, batch)
    if isinstance(module, RewardModel):
        return module.hidden_states(**inputs)
    return module.base_model(**inputs, use_cache=False).last_hidden_state


def ranking_of(
    model: Any, pairs: PairBatch, *, loss_fn: Literal["log_sig", "log_exp"], denominator: float
) -> dict[str, Tensor]:
    """A reward model's ranking loss of pairs and their scores.

    Returns `loss`, the sum over pairs by their weights and divided by `denominator`, and the answers' scores
    `chosen_mean_scores` and `rejected_mean_scores`, fp32 [B].
    """
    batch = own_part(model, pairs.tokens)
    place = batch.placement
    return model(
        **model_inputs(model, batch),
        last_tokens=None if place is None else place.last_tokens,
        ends_here=None if place is None else place.ends_here,
        loss_fn=loss_fn,
        weights=pairs.weights,
        margins=pairs.margins,
        denominator=denominator,
    )


def _logits_and_labels(model: Any, batch: TokenBatch, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits [..., V] and the labels [...] that they predict; with a placement those that count."""
    logits = logits_of(model, batch, **options)
    if batch.placement is None or (options.get("every_position") and not _is_part(batch)):
        return logits, batch.labels
    return logits, batch.labels.flatten()[batch.placement.label_places]


def per_label(batch: TokenBatch, values: Tensor) -> Tensor:
    """Numbers of the labels in the labels' shape [B, N]."""
    if values.shape == batch.labels.shape or batch.placement is None:
        return values
    whole = batch.placement.per_label(values, batch.labels)
    return sum_with_gradient(whole, axis="sequence") if _is_part(batch) else whole


def own_part(model: Any, batch: TokenBatch) -> TokenBatch:
    """The batch as this rank reads it: whole, or a part of each row where the model's ranks share rows."""
    if not shares_rows(model):
        return batch
    place, axis = (batch.placement or batch.placed(PADDED).placement), mesh().sequence
    assert place is not None, "it has just been placed"
    return replace(batch, placement=place.part(axis.rank, axis.size))


def _is_part(batch: TokenBatch) -> bool:
    return batch.placement is not None and batch.placement.ends_here is not None


def _values_at_tokens(model: Any, batch: TokenBatch) -> Tensor:
    """The head's output at every column of the rows that the model reads. -> fp32 [B, L] or [R, W]."""
    return model(**model_inputs(model, batch), return_values=True)


def model_inputs(model: Any, batch: TokenBatch) -> dict[str, Tensor]:
    """The tokens as the model reads them, and what it is to be told of padding and positions.

    `input_ids`, `position_ids` and masks of two dimensions are [B, L], or where there is a placement [R, W].
    """
    place = batch.placement
    if place is None:
        ids, mask, position_ids = batch.input_ids, batch.attention_mask, batch.position_ids
    else:
        ids, position_ids = batch.input_ids.flatten()[place.source], place.position_ids
        mask = None if place.segments is None else _mask_of(model, place)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    return {name: value for name, value in inputs.items() if value is not None}


def _mask_of(model: Any, place: Placement) -> Tensor:
    """What separates sequences that share rows: the lengths where our own attention reads one, or a mask."""
    attention = getattr(model, "module", model).config._attn_implementation
    by_lengths = attention == MEASURED and len(place.source) == 1
    return place.lengths() if by_lengths else place.mask(next(model.parameters()).dtype)


@contextlib.contextmanager
def _head_reads(model: Any, places: Tensor) -> Iterator[bool]:
    """Let the output head read the hidden states at these places, counted through the rows, and no others.

    So logits, the largest tensor of a pass, exist for labels alone; transformers' `logits_to_keep` chooses
    the same columns of all rows. Yields whether it does: False for a model that names no head.
    """

    def select(head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0].flatten(0, 1)[places].unsqueeze(0)

    name_head = getattr(getattr(model, "module", model), "get_output_embeddings", None)
    head = name_head and name_head()
    if head is None:
        yield False
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()
