"""The forward pass: every call of a model outside of sampling, from training to golden outputs, is made here.

`model` is a DeepSpeed engine or a module, and stays in its mode. Under ZeRO-3 every rank must call with a
batch of its own. The masks of a batch are not applied: what stands at masked labels is arbitrary.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from dschat.data.collate import PairBatch
from dschat.data.token_batch import TokenBatch
from dschat.models.reward_model import at_last_token
from dschat.softmax import logprobs_and_entropy, token_logprobs


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
    logits = logits_of(model, batch, num_tokens=num_tokens, every_position=every_position)
    return token_logprobs(logits, batch.labels, temperature=temperature)


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
    logits = logits_of(model, batch, num_tokens=num_tokens)
    if with_entropy:
        return logprobs_and_entropy(logits, batch.labels, temperature=temperature)
    return token_logprobs(logits, batch.labels, temperature=temperature), None


def logits_of(
    model: Any, batch: TokenBatch, *, num_tokens: int | None = None, every_position: bool = False
) -> Tensor:
    """The logits that predict the labels. -> [B, N, V].

    `num_tokens` is the size of the tokenizer: rows that pad a model's vocabulary beyond it are left out, as
    they are in sampling. Without it they take part, as in transformers' own loss.
    Logits are computed at `batch.outputs` only; with `every_position` at all columns of the rows, as a plain
    forward pass does, whose matrix products have other shapes and thus another rounding.
    """
    masks = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    options: dict[str, Any] = {name: value for name, value in masks.items() if value is not None}
    if every_position:
        logits = model(input_ids=batch.input_ids, **options, use_cache=False).logits
        return logits[:, batch.outputs, :num_tokens]
    columns = torch.arange(batch.outputs.start, batch.outputs.stop, device=batch.input_ids.device)
    logits = model(input_ids=batch.input_ids, **options, logits_to_keep=columns, use_cache=False).logits
    return logits[..., :num_tokens]


def values_of(model: Any, batch: TokenBatch) -> Tensor:
    """A critic's value where each label is predicted: of the row before that token. -> fp32 [B, N]."""
    return _values_at_tokens(model, batch)[:, batch.outputs]


def scores_of(model: Any, batch: TokenBatch) -> Tensor:
    """A reward model's output at each row's last token. -> fp32 [B]."""
    return at_last_token(_values_at_tokens(model, batch), batch.attention_mask)


def ranking_of(
    model: Any, pairs: PairBatch, *, loss_fn: Literal["log_sig", "log_exp"], denominator: float
) -> dict[str, Tensor]:
    """A reward model's ranking loss of pairs and their scores.

    Returns `loss`, the sum over pairs by their weights and divided by `denominator`, and the answers' scores
    `chosen_mean_scores` and `rejected_mean_scores`, fp32 [B].
    """
    return model(
        pairs.tokens.input_ids,
        pairs.tokens.attention_mask,
        loss_fn=loss_fn,
        weights=pairs.weights,
        margins=pairs.margins,
        denominator=denominator,
    )


def _values_at_tokens(model: Any, batch: TokenBatch) -> Tensor:
    """The head's output at every column. -> fp32 [B, L]."""
    return model(batch.input_ids, batch.attention_mask, batch.position_ids, return_values=True)
