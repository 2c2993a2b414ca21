"""Whether sequences can share rows in a model, and whether that saves time: tried on one of its layers.

The layer has random weights and the sizes, the precision and the attention of the model. So nothing has to be
loaded for it, and ZeRO shards nothing of it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dschat.arguments import WidthArguments
from dschat.console import messages
from dschat.data.packing import RowLayout
from dschat.data.token_batch import TokenBatch
from dschat.distributed.device import DTYPES
from dschat.distributed.mesh import mesh
from dschat.models.attention import MEASURED
from dschat.models.forward import model_inputs
from dschat.models.products import use_chosen_products
from dschat.runs.measured_choices import MeasuredChoices

NUM_TOKENS = 128
"""The vocabulary of a trial."""

TRIED_LENGTHS = (5, 11, 3, 8)
"""Tokens of the sequences that are to share a row."""

LARGEST_DIFFERENCE = {"mask": 0.1, "positions": 0.002}
"""How far hidden states of packed sequences may be from those of separate ones, as a share of the distance of
sequences that are not told apart. The latter have wrong positions too where positions are to tell them apart.
In bf16 rounding made up to 0.002 and 0.0009 of it, and what leaked 1 and at least 0.005."""


@dataclass(frozen=True)
class PackingTrial:
    """Layers of a model, one of each kind, for short trials."""

    model: PreTrainedModel
    device: torch.device

    @staticmethod
    def of(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> "PackingTrial":
        """Layers of the configuration's sizes with a small vocabulary. Raises what transformers does."""
        small = copy.deepcopy(config)
        kinds = list(dict.fromkeys(getattr(small, "layer_types", None) or ["all"]))
        if getattr(small, "layer_types", None):
            small.layer_types = kinds
        small.num_hidden_layers, small.vocab_size = len(kinds), NUM_TOKENS
        small.pad_token_id = small.bos_token_id = small.eos_token_id = None
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = AutoModel.from_config(small, dtype=dtype)
        use_chosen_products(model)
        return PackingTrial(model.eval(), device)

    def separates(self, layout: RowLayout) -> bool:
        """Whether sequences that share rows in this layout do not see each other."""
        batch = batch_of(np.array(TRIED_LENGTHS))
        try:
            with torch.no_grad():
                alone = self._hidden_states(batch.placed(RowLayout()))
                packed = self._hidden_states(batch.placed(layout))
                mixed = self._hidden_states(_undivided(batch.placed(layout)))
        except (ValueError, RuntimeError, TypeError, NotImplementedError):
            return False  # a model that takes no mask of this kind
        difference, largest = ((other - alone).abs().mean() for other in (packed, mixed))
        return bool(difference <= LARGEST_DIFFERENCE[layout.separated_by or "mask"] * largest)

    def train(self, batches: Sequence[TokenBatch], layout: RowLayout) -> None:
        """A forward and a backward pass of each batch."""
        for batch in batches:
            self._hidden_states(batch.placed(layout)).sum().backward()
            self.model.zero_grad()

    def _hidden_states(self, batch: TokenBatch) -> Tensor:
        """Those that predict the labels, [K, H] in fp32."""
        batch = batch.to(self.device)
        assert batch.placement is not None, "a trial places its batches"
        output = self.model(**model_inputs(self.model, batch), use_cache=False).last_hidden_state
        return output.flatten(0, 1)[batch.placement.outputs[: len(batch.placement.label_places)]].float()


def choose_row_layout(
    args: WidthArguments,
    configs: Mapping[str, PretrainedConfig],
    choices: MeasuredChoices,
    *,
    dtype: str,
    device: torch.device,
    limit: int | None,
    lengths: Sequence[np.ndarray],
    longest: int,
) -> RowLayout:
    """The layout of rows that the flags ask for, or with --packing auto the faster one.

    `configs` are those of the models that read the rows, by their names in messages; the first one's layers
    are timed, with micro-batches of `lengths`; `longest` is the longest sequence of the run. `limit` is the
    number of positions that all have learned. Where a model cannot tell sequences apart that share a row,
    none do. Every rank must call it.
    """
    padded = RowLayout(args.multiple_of(device.type, mesh().sequence.size), limit=limit)
    if mesh().sequence.size > 1:
        if args.packing != "off":
            messages.info("packing: padding (ranks that share the tokens of a row share one sequence)")
        return padded
    if args.packing == "off" or (args.packing == "auto" and max(map(len, lengths), default=0) < 2):
        return padded
    packed = packed_layout(padded, configs, longest=longest)
    trials = {name: _trial(config, DTYPES[dtype], device) for name, config in configs.items()}
    unable = next((name for name, trial in trials.items() if not (trial and trial.separates(packed))), None)
    if unable is not None:
        kind = configs[unable].model_type
        messages.info(f"packing: padding (a {kind} model, the {unable}, mixes sequences that share a row)")
        return padded
    if args.packing == "on":
        return packed
    trial = next(iter(trials.values()))
    assert trial is not None, "a model without a trial is unable"
    batches = [batch_of(part) for part in lengths]
    layouts = {"padding": padded, "packing": packed}
    ways = {name: partial(trial.train, batches, layout) for name, layout in layouts.items()}
    key = {"dtype": dtype, **_key(trial.model.config, lengths), "layout": repr(packed)}
    return layouts[choices.choose("packing", ways, key=key, rounds=1, on_one_thread=True)]


def packed_layout(padded: RowLayout, configs: Mapping[str, PretrainedConfig], *, longest: int) -> RowLayout:
    """The layout in which sequences share rows: told apart by positions where flash attention takes one row,
    else by a mask, which a model takes instead of its own. Our own attention takes one row as well."""
    ways = {str(config._attn_implementation) for config in configs.values()}
    flash = all(way.startswith("flash") for way in ways)
    names = ("sliding_window", "attention_chunk_size")
    windows = [getattr(config, name, None) or longest for name in names for config in configs.values()]
    if flash or min(windows) < longest:
        return replace(padded, separated_by="positions", in_one_row=flash)
    return replace(padded, separated_by="mask", in_one_row=ways == {MEASURED})


def batch_of(lengths: np.ndarray) -> TokenBatch:
    """Sequences of such lengths, all of whose tokens count."""
    columns = np.arange(int(lengths.max()))
    ids = (np.arange(len(lengths))[:, None] * 37 + columns * 11 + 5) % NUM_TOKENS
    is_token = torch.from_numpy(columns < lengths[:, None])
    return TokenBatch.of(torch.from_numpy(ids), is_token, attention_mask=is_token.long())


def _trial(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PackingTrial | None:
    try:
        return PackingTrial.of(config, dtype, device)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None  # a model of its own code, or of sizes that need all its layers


def _undivided(batch: TokenBatch) -> TokenBatch:
    """The batch without what tells apart the sequences of a row."""
    place = batch.placement
    assert place is not None, "a trial places its batches"
    if place.segments is None:
        return replace(batch, placement=replace(place, position_ids=None))
    return replace(batch, placement=replace(place, segments=torch.zeros_like(place.segments)))


def _key(config: PretrainedConfig, lengths: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the times depend on; lengths roughly, so that other runs on the same data find the choice."""
    sizes = ("model_type", "hidden_size", "num_attention_heads", "_attn_implementation")
    mean_length = float(np.mean([part.mean() for part in lengths]))
    return {
        **{name: getattr(config, name, None) for name in sizes},
        "rows": len(lengths[0]),
        "mean_length": 32 * round(mean_length / 32),
    }
