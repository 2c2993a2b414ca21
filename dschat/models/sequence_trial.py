"""Whether ranks can share the tokens of a model's rows: by its configuration, and tried on a layer of it.

Both before a model is loaded. The trial's layers have random weights, so what a configuration does not say,
such as positions that a model counts itself or adds to the scores of attention, is seen in their outputs.
"""

import copy

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PretrainedConfig

from dschat.data.packing import PADDED
from dschat.distributed.collectives import max_across_ranks
from dschat.errors import UserError
from dschat.models.config import read_config
from dschat.models.forward import model_inputs, own_part, per_label
from dschat.models.packing_trial import PackingTrial, batch_of
from dschat.models.sequence_attention import ULYSSES

TRIED_LENGTHS = (11, 6)
TRIED_WINDOW = 4
"""That of models with a sliding window, so that the rows tried are longer."""
WINDOWS = ("sliding_window", "attention_chunk_size")
LARGEST_DIFFERENCE = 1e-3
"""Between the outputs of whole and of shared rows, as a share of their standard deviation. In fp32 rounding
made 1e-6 of it."""


def check_sequence_parallel(path: str, size: int) -> None:
    """Raise `UserError` where the heads of the model in `path` cannot be shared by so many ranks."""
    if size == 1:
        return
    config = read_config(path, dropout=None).get_text_config()
    flag = f"--sequence_parallel_size {size}"
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    model_class = MODEL_MAPPING.get(type(config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UserError(
            f"{flag}: the attention of {config.model_type!r}, the model in {path!r}, cannot be replaced in "
            "transformers, so ranks cannot share its rows; leave the flag out, and save memory with "
            "--gradient_checkpointing, --max_tokens_per_batch or --zero_stage 3."
        )
    if heads % size:
        raise UserError(
            f"{flag} does not divide the {heads} attention heads of the model in {path!r}, which its ranks "
            f"share out; give one of {', '.join(_divisors(heads))}."
        )
    if key_heads % size and size % key_heads:
        raise UserError(
            f"{flag} and the {key_heads} key-value heads of the model in {path!r} do not divide each other; "
            f"give one of {', '.join(_divisors(key_heads))}."
        )


def try_sequence_parallel(path: str, device: torch.device) -> None:
    """Raise `UserError` where rows that the ranks share give other outputs than whole ones.

    Every rank must call it.
    """
    config = read_config(path, dropout=0.0)
    try:
        whole, shared = (_outputs(config, name, device) for name in ("sdpa", ULYSSES))
        worst = (whole - shared).abs().max() / whole.std()
        problem = f"their outputs differ by {worst.item():.2g} standard deviations from those of whole rows"
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        worst, problem = torch.tensor(torch.inf), f"a trial failed: {error}"
    if not max_across_ranks(worst.to(device), axis="sequence") <= LARGEST_DIFFERENCE:
        raise UserError(
            f"--sequence_parallel_size: ranks cannot share the rows of {config.model_type!r}, the model in "
            f"{path!r}: {problem}; leave the flag out."
        )


@torch.no_grad()
def _outputs(config: PretrainedConfig, attention: str, device: torch.device) -> Tensor:
    """A number for each label of a batch, made of the hidden states that predict it. -> fp32 [B, N]."""
    small = copy.deepcopy(config)
    for name in WINDOWS:
        if getattr(small, name, None):
            setattr(small, name, TRIED_WINDOW)
    small._attn_implementation = attention
    model = PackingTrial.of(small, torch.float32, device).model
    batch = own_part(model, batch_of(np.array(TRIED_LENGTHS)).to(device).placed(PADDED))
    place = batch.placement
    assert place is not None, "it has just been placed"
    hidden = model(**model_inputs(model, batch), use_cache=False).last_hidden_state.flatten(0, 1)
    direction = torch.linspace(-1, 1, hidden.shape[1], device=device)
    return per_label(batch, hidden[place.outputs] @ direction)


def _divisors(number: int) -> list[str]:
    return [str(size) for size in range(1, number + 1) if number % size == 0]
