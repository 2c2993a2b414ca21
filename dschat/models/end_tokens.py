"""The tokens that end an answer: a model may have several, of which its tokenizer names one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dschat.data.templates import ChatTemplate


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> tuple[int, ...]:
    """The end tokens of a language model or classifier, the tokenizer's own first.

    These are the tokenizer's, the one that the chat template writes at the end of a turn, and those of
    generation_config.json and config.json. A list there counts as it stands; a lone id that is an ordinary
    token of the vocabulary does not, because architectures have default ids that were made for other
    vocabularies. Ids beyond the tokenizer's are left out.
    """
    found = [tokenizer.eos_token_id]
    turn_end = ChatTemplate(tokenizer).turn_end
    if turn_end is not None:
        found.append(turn_end)
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for config in (getattr(model, "generation_config", None), model.config):
        ids = listed_ids(config)
        found += ids if len(ids) > 1 else special.intersection(ids)
    return tuple(dict.fromkeys(token for token in found if 0 <= token < len(tokenizer)))


def listed_ids(config: object) -> list[int]:
    """The end tokens that a configuration names: none, one or a list of them."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def written_ids(ids: Sequence[int]) -> int | list[int]:
    """The end tokens as configurations name them: a list where there are several."""
    return ids[0] if len(ids) == 1 else list(ids)


def is_end(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Where a token is one of the end tokens. int64 [...] -> bool [...]."""
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device))


def names(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The end tokens as text, for messages."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids)
