"""A model's vocabulary and special tokens, adapted to its tokenizer's."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dschat.distributed.zero3 import gathered
from dschat.models.end_tokens import end_token_ids, written_ids

NUM_KNOWN = "num_known_tokens"
"""The attribute of a tokenizer with the number of tokens it had before this run added some."""


def grow_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add rows for tokens that the tokenizer has and the model does not, each the mean of the others.

    No random draw, so that actor and reference agree when both grow. The model gets an attribute
    `new_tokens`, the tokens that it has not learned by id: those that got rows, and those that this run added
    to the tokenizer and that found a row in a vocabulary longer than the tokenizer's.
    """
    embeddings: Any = model.get_input_embeddings()
    old: int = embeddings.num_embeddings
    first_new = min(old, getattr(tokenizer, NUM_KNOWN, len(tokenizer)))
    new_ids = list(range(first_new, len(tokenizer)))
    model.new_tokens = dict(zip(new_ids, tokenizer.convert_ids_to_tokens(new_ids), strict=True))
    if len(tokenizer) <= old:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        rows = [layer.weight] if getattr(layer, "bias", None) is None else [layer.weight, layer.bias]
        with gathered(rows, modifier_rank=0), torch.no_grad():
            for row in rows:
                row[old:] = row[:old].float().mean(dim=0).to(row.dtype)


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
