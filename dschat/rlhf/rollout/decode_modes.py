"""A batch in the middle of being answered, and the modes in which a forward pass of one token is called."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dschat.data.collate import PromptBatch
from dschat.data.token_batch import TokenBatch
from dschat.models.forward import logits_of
from dschat.rlhf.rollout import decode_attention
from dschat.rlhf.rollout.agreement import usual_tolerance
from dschat.rlhf.rollout.decode_cache import ROUND, DecodeCache
from dschat.rlhf.rollout.graphed_pass import GraphedPass, has_kernels
from dschat.rlhf.rollout.traced_pass import TracedPass, can_be_traced

HIDDEN = torch.finfo(torch.float32).min
"""What is added to the score of a column that is not to be read."""


@dataclass(frozen=True)
class DecodeMode:
    """How a forward pass of one token per row is called."""

    attention: str | None = None
    """The attention function that takes the place of the model's own; None leaves that."""
    ready_mask: bool = False
    """Whether the mask is given as attention uses it. Else it has a number per column, and the model makes
    its own of it in each pass."""

    is_traced: bool = False
    """Whether the pass is recorded once and then repeated without Python."""
    in_fp32: bool = False
    """Whether a model in bf16 computes in fp32, with copies of its weights that are made for each batch."""
    is_graphed: bool = False
    """Whether the pass is captured as a CUDA graph."""

    @property
    def is_recorded(self) -> bool:
        """Whether Python runs once, and what it called is repeated from then on."""
        return self.is_traced or self.is_graphed

    def recorded_pass(self, model: Any) -> TracedPass | GraphedPass:
        """What makes the passes of a model in this mode where they are recorded."""
        return GraphedPass(model) if self.is_graphed else TracedPass(model, in_fp32=self.in_fp32)

    def mask(self, attention_mask: Tensor, capacity: int) -> Tensor:
        """The mask of the prompts [B, P] with room for answers."""
        wide = torch.nn.functional.pad(attention_mask, (0, capacity - attention_mask.shape[1]))
        if not self.ready_mask:
            return wide
        if self.attention is None:
            return wide[:, None, None].bool()
        return torch.zeros(wide.shape, device=wide.device).masked_fill(wide == 0, HIDDEN)[:, None, None]

    @property
    def shown(self) -> int:
        """What a mask has where a column is read."""
        return 0 if self.attention else 1


MODES = {
    "graphed": DecodeMode(decode_attention.KERNEL_NAME, ready_mask=True, is_graphed=True),
    "graphed sdpa": DecodeMode(ready_mask=True, is_graphed=True),
    "traced in fp32": DecodeMode(decode_attention.NAME, ready_mask=True, is_traced=True, in_fp32=True),
    "traced": DecodeMode(decode_attention.NAME, ready_mask=True, is_traced=True),
    "matmul": DecodeMode(decode_attention.NAME, ready_mask=True),
    "sdpa": DecodeMode(ready_mask=True),
    "model": DecodeMode(),
}
"""The most preferred first; the last is the way of `generate`."""


class Decoding:
    """A batch of prompts that answers grow from, one token of each row at a time."""

    def __init__(
        self,
        model: Any,
        prompts: PromptBatch,
        mode: DecodeMode,
        answer_length: int,
        recorded: TracedPass | GraphedPass,
    ) -> None:
        """Read the prompts, each distinct one once: `logits` [B, V] predict the first tokens of answers.

        `recorded` is the mode's `recorded_pass` of the model.
        """
        ids, mask = prompts.input_ids, prompts.attention_mask.long()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        num_layers = model.config.get_text_config().num_hidden_layers
        self._model, self._mode, self._recorded = model, mode, recorded
        recorded.begin()
        place = recorded.place if mode.is_graphed else None
        self._cache = DecodeCache(num_layers, ids.shape[1], answer_length, ids.device, place)
        first, prompt_of_row = distinct_rows(ids.masked_fill(mask == 0, -1))
        with recorded.weights_in_place():
            logits = self._pass(ids[first], mask[first], positions[first], logits_to_keep=1)
        self.logits = logits[prompt_of_row]
        self._cache.spread(prompt_of_row)
        self._place(mode.mask(mask, self._cache.capacity), positions[:, -1:] + 1)

    def read(self, tokens: Tensor) -> None:
        """Read the next token of each row, int64 [B]: `logits` predict the tokens that follow."""
        cache, mode = self._cache, self._mode
        self._mask.index_fill_(-1, cache.column, mode.shown)
        mask = self._mask[..., : cache.width]
        with attention_named(self._model.config, mode.attention):
            if mode.is_recorded:
                self.logits = self._recorded(tokens[:, None], mask, self._positions, cache)
            else:
                self.logits = self._pass(tokens[:, None], mask, self._positions)
        cache.advance()
        self._positions.add_(1)

    def keep(self, rows: Tensor) -> None:
        """Only these rows, in this order."""
        self._place(self._mask[rows], self._positions[rows])
        self._cache.keep(rows)

    def _place(self, mask: Tensor, positions: Tensor) -> None:
        self._mask = self._recorded.place("mask", mask)
        self._positions = self._recorded.place("positions", positions)

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: int) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1]


@contextlib.contextmanager
def attention_named(config: Any, name: str | None) -> Iterator[None]:
    """That attention function inside the block, where one is named."""
    if name is None:
        yield
        return
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The number of a row for each distinct one, and for each row the place of its like among those.

    [B, N] -> int64 [D], int64 [B]. Rows that are all distinct keep their order.
    """
    numbers = torch.arange(len(rows), device=rows.device)
    distinct, place = rows.unique(dim=0, return_inverse=True)
    if len(distinct) == len(rows):
        return numbers, numbers
    first = torch.full((len(distinct),), len(rows), device=rows.device).scatter_reduce(
        0, place, numbers, "amin"
    )
    order = first.argsort()
    return first[order], order.argsort()[place]


def agreeing_modes(
    model: Any, *, num_tokens: int, longest: int, with_python_hooks: bool = False
) -> list[str]:
    """The names in MODES in which passes predict what passes without a cache do.

    Rows will have no more than `longest` columns. A few tokens are tried, on the device of the model; where
    CUDA graphs agree, which spare a GPU hundreds of launches a token, they are all there is. Passes
    in which Python has to gather weights (by the layer) or add up what tensor ranks compute are not recorded.
    """
    config = model.config.get_text_config()
    kinds = {kind for name in ("layer_types", "attention_layers") for kind in getattr(config, name, ()) or ()}
    if not kinds <= {"full_attention", "sliding_attention", "global"}:  # GPT-Neo's "local" has a window
        return []  # that it counts from the last column, written or not
    window = getattr(config, "sliding_window", None)
    is_recordable = can_be_traced(config) and not with_python_hooks
    on_cpu = model.device.type == "cpu"
    is_bf16_on_cpu = on_cpu and any(p.dtype == torch.bfloat16 for p in model.parameters())
    candidates = [
        name
        for name, mode in MODES.items()
        if (is_recordable or not mode.is_recorded)
        and (is_bf16_on_cpu or not mode.in_fp32)
        and not (mode.is_graphed and (on_cpu or (mode.attention and not has_kernels())))
    ]
    if window is not None and window < longest:
        candidates = ["model"]  # it knows which layers have the window
    agreeing = [name for name in candidates if _agrees(model, MODES[name], num_tokens)]
    return [name for name in agreeing if MODES[name].is_graphed] or agreeing


def _agrees(model: Any, mode: DecodeMode, num_tokens: int) -> bool:
    """Of two rows, then of one, whose second token is the first that is read in more columns."""
    length = ROUND - 1
    ids = (torch.arange(2 * length + 8, device=model.device).view(2, -1) * 7 + 3) % num_tokens
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    zeros = torch.zeros(2, dtype=torch.long, device=model.device)
    prompts = PromptBatch(ids[:, :length], mask[:, :length], zeros, zeros, zeros)
    second = torch.tensor([1], device=model.device)
    read = mask[:, : length + 3]
    whole = TokenBatch.of(
        ids,
        torch.ones_like(ids[:, length:], dtype=torch.bool),
        attention_mask=read,
        position_ids=(read.cumsum(dim=1) - 1).clamp(min=0),
        reads_last=False,
    )
    try:
        expected = logits_of(model, whole, num_tokens=num_tokens, every_position=True)
        decoding = Decoding(model, prompts, mode, 3, mode.recorded_pass(model))
        found = [decoding.logits]
        for column in (length, length + 1):
            decoding.read(ids[:, column])
            found.append(decoding.logits.clone())
        decoding.keep(second)
        decoding.read(ids[second, length + 2])
    except Exception:  # what architectures, CUDA and Triton raise that know nothing of a mode or such rows
        return False
    found.append(decoding.logits)  # of the second row alone
    *of_both, of_second = expected.unbind(1)
    apart = [
        one[:, :num_tokens].float().log_softmax(1) - two.float().log_softmax(1)
        for one, two in zip(found, [*of_both, of_second[second]], strict=True)
    ]
    return torch.cat(apart).abs().mean().item() <= usual_tolerance(expected.dtype)
