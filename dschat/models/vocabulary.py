"""A model's vocabulary and special tokens, adapted to its tokenizer's."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dschat.distributed.zero3 import gathered
from dschat.models.end_tokens import end_token_ids, written_ids
from dschat.models.stage import ReceivedStates

NUM_KNOWN = "num_known_tokens"
"""The attribute of a tokenizer with the number of tokens it had before this run added some."""


def new_token_ids(num_rows: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a model with so many rows of embeddings has not learned."""
    return list(range(min(num_rows, getattr(tokenizer, NUM_KNOWN, len(tokenizer))), len(tokenizer)))


def grow_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add rows for tokens that the tokenizer has and the model does not, each the mean of the others.

    No random draw, so that actor and reference agree when both grow. The model gets an attribute
    `new_tokens`, the tokens that it has not learned by id: those that got rows, and those that this run added
    to the tokenizer and that found a row in a vocabulary longer than the tokenizer's.
    """
    embeddings: Any = model.get_input_embeddings()
    old: int = embeddings.num_embeddings
    new_ids = new_token_ids(old, tokenizer)
    model.new_tokens = dict(zip(new_ids, tokenizer.convert_ids_to_tokens(new_ids), strict=True))
    if len(tokenizer) <= old:
        return
    if isinstance(embeddings, ReceivedStates):
        _lengthen_head(model, len(tokenizer))
    else:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not hasattr(layer, "weight"):
            continue
        rows = [layer.weight] if getattr(layer, "bias", None) is None else [layer.weight, layer.bias]
        with gathered(rows, modifier_rank=0), torch.no_grad():
            for row in rows:
                row[old:] = row[:old].float().mean(dim=0).to(row.dtype)


def _lengthen_head(model: Any, num_tokens: int) -> None:
    """What `resize_token_embeddings` does with the output layer, for a stage that has no embeddings."""
    model.config.vocab_size = num_tokens
    head = model.get_output_embeddings()
    if head is None:
        return
    longer = nn.Linear(head.in_features, num_tokens, bias=head.bias is not None, dtype=head.weight.dtype)
    longer.load_state_dict(
        {
            name: torch.cat([w, w.new_zeros(num_tokens - len(w), *w.shape[1:])])
            for name, w in head.state_dict().items()
        }
    )
    model.set_output_embeddings(longer)


def configure_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write special tokens and all end tokens into the configurations, and caches on for generation alone."""
    # Masks tell padding; with an index here the end token would not learn where it is the padding token too.
    model.get_input_embeddings().padding_idx = None
    generation = getattr(model, "generation_config", None)
    ends = end_token_ids(tokenizer, model)
    for config in filter(None, (model.config, generation)):
        config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        config.eos_token_id = written_ids(ends)
    model.config.use_cache = False
    if generation is not None:
        generation.use_cache = True
        try:
            generation.validate(strict=True)
        except ValueError:
            # Some models carry a temperature without the switch, and transformers refuses to save that.
            generation.do_sample = True
