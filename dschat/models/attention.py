"""Attention on a CPU, where which way is fastest depends on the processor, the precision and the rows' width.

transformers' own ways are one name for a whole model. `MEASURED` is another name in its tables, of an
attention that looks at the shapes of queries and keys and then does what `choose_attention` found to be
fastest. Equal shapes take the same way, with gradients and without: so activations that are recomputed, and
PPO's analysis and its first update, are equal to the last bit.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from dschat.arguments import ModelArguments
from dschat.console import messages
from dschat.distributed.device import DTYPES, current_device
from dschat.distributed.mesh import mesh
from dschat.distributed.process_wide import process_wide
from dschat.errors import UserError
from dschat.models.config import head_width, read_config
from dschat.models.sequence_attention import ULYSSES
from dschat.runs.measured_choices import MeasuredChoices

MEASURED = "dschat_measured"
"""The name in transformers' tables; a saved config.json has none."""

WIDTHS = (128, 256, 512, 1024)
"""Upper ends of the ranges of widths, in tokens, that are timed; what is wider goes by the last."""

EAGER_WIDTH = 512
"""Wider rows are not given to eager attention: it keeps probabilities of the square of a row's width."""

SHAPES = 32
"""Sequences of one row attend in multiples of so many tokens, as oneDNN keeps kernels for each shape."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-4, torch.float16: 2**-7}
"""How far two ways may differ in what comes of standard normal queries, keys and values."""

Heads = tuple[int, int, int, torch.dtype]
"""Heads of the queries, heads of the keys, numbers a head, precision."""


class MeasuredWays:
    """What was found fastest. There is one in a process, as transformers calls attention by a name alone."""

    def __init__(self) -> None:
        self.by_heads: dict[Heads, dict[int, str]] = {}
        """Upper end of a range of widths -> way."""

    def of(self, heads: Heads, width: int) -> str:
        """The way for rows of so many tokens; "sdpa" where nothing was measured."""
        ways = self.by_heads.get(heads)
        return ways[next((end for end in ways if width <= end), max(ways))] if ways else "sdpa"


def choose_attention(
    models: Iterable[tuple[str, ModelArguments]], *, dtype: str, longest: int, choices: MeasuredChoices
) -> None:
    """Check what the flags ask for, and time the ways of each model whose flag is auto, on a CPU.

    `models` are paths with the flags of the model, `dtype` is their --dtype, `longest` is the length of the
    longest row in tokens.
    Every rank must call it. Raises `UserError` for what the model or the machine does not support.
    """
    for path, flags in models:
        config = read_config(path, dropout=None)
        if flags.attn_implementation != "auto":
            _check(config, path, f"--{flags.prefix}attn_implementation", flags.attn_implementation, dtype)
        elif _takes_measured(config) and mesh().sequence.size == 1:
            _measure(_heads(config, DTYPES[dtype]), longest, choices)


def set_attention(config: PretrainedConfig, implementation: str | None) -> None:
    """Have a model that is built from `config` attend as --attn_implementation says.

    Where ranks share the tokens of rows, that is `ULYSSES`, except with None.
    With "auto" families that bring attention code of their own, and models on a GPU, keep what transformers
    gives them; so do all with None.
    """
    if implementation is not None and mesh().sequence.size > 1:
        implementation = ULYSSES
    if implementation == "auto":
        implementation = MEASURED if _takes_measured(config) else None
    if implementation is not None:
        config._attn_implementation = implementation


def way_of(config: PretrainedConfig, implementation: str, dtype: torch.dtype, width: int) -> str:
    """Which of WAYS the model takes for rows of so many tokens, as far as a timing has told by now."""
    if implementation == "auto" and _takes_measured(config):
        return process_wide(MeasuredWays).of(_heads(config, dtype), width)
    return "eager" if implementation == "eager" else "sdpa"


def _takes_measured(config: PretrainedConfig) -> bool:
    """Whether the model's attention goes by transformers' tables and is that of SDPA, on a CPU."""
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    by_tables = all(
        getattr(model_class, f"_supports_{kind}", False) for kind in ("sdpa", "attention_backend")
    )
    return by_tables and current_device().type == "cpu"


def _check(config: PretrainedConfig, path: str, flag: str, way: str, dtype: str) -> None:
    installed = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if way in installed:
        if current_device().type == "cpu" or not installed[way]():
            raise UserError(
                f"{flag} {way} needs a GPU and the package of that name, which this machine does not have "
                "both; leave the flag out or give sdpa."
            )
        if dtype == "fp32":
            raise UserError(f"{flag} {way} does not compute in fp32; use --dtype bf16, or give sdpa.")
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    support = {"sdpa": "_supports_sdpa", **dict.fromkeys(installed, "_supports_flash_attn")}.get(way)
    if model_class is not None and support and not getattr(model_class, support, False):
        raise UserError(
            f"{flag} {way}: transformers has no such attention for {config.model_type!r}, the model in "
            f"{path!r}; leave the flag out or give eager."
        )


def _heads(config: PretrainedConfig, dtype: torch.dtype) -> Heads:
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_width(config), dtype


def _measure(heads: Heads, longest: int, choices: MeasuredChoices) -> None:
    """Time forward and backward pass of each range of widths that rows of `longest` tokens reach."""
    found = process_wide(MeasuredWays).by_heads.setdefault(heads, {})
    num_heads, num_key_heads, size, dtype = heads
    kind = f"{num_heads}/{num_key_heads} heads of {size}, {str(dtype).split('.')[-1]}"
    agreeing, start = _agreeing(heads), 0
    for end in WIDTHS:
        if longest > start or not start:
            ways = [way for way in agreeing if way != "eager" or end <= EAGER_WIDTH]
            trial = Trial(heads, rows=max(1, 1024 // end), width=(start + end) // 2)
            runs = {way: partial(trial.gradients, way) for way in ways}
            found[end] = choices.choose(f"attention up to {end} tokens, {kind}", runs, on_one_thread=True)
        start = end


def _agreeing(heads: Heads) -> list[str]:
    """The ways with the output and the gradients of SDPA, up to rounding, on rows of 24 tokens."""
    trial = Trial(heads, rows=2, width=24)
    expected, agreeing = trial.gradients("sdpa"), []
    for way in WAYS:
        pairs = zip(trial.gradients(way), expected, strict=True)
        difference = max((actual - other).abs().max().item() for actual, other in pairs)
        if way == "sdpa_fp32" and heads[-1] == torch.float32:
            continue
        if difference <= TOLERANCE[heads[-1]]:
            agreeing.append(way)
        else:
            messages.warning(f"attention {way} differs from sdpa by {difference:.2g}: it is not used.")
    return agreeing


class GroupedHeads(nn.Module):
    """What attention functions ask of the module that calls them."""

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


class Trial:
    """Rows of random queries, keys and values, the first one padded on the right."""

    def __init__(self, heads: Heads, *, rows: int, width: int) -> None:
        self._heads, self._rows, self._width = heads, rows, width

    @cached_property
    def _arguments(self) -> tuple[nn.Module, list[Tensor], Tensor]:
        num_heads, num_key_heads, size, dtype = self._heads
        generator = torch.Generator().manual_seed(0)
        # As projections leave them: [rows, width, heads, size] in memory.
        inputs = [
            torch.randn(self._rows, self._width, n, size, generator=generator).to(dtype).transpose(1, 2)
            for n in (num_heads, num_key_heads, num_key_heads)
        ]
        mask = torch.ones(self._width, self._width, dtype=torch.bool).tril()
        mask = mask.expand(self._rows, 1, -1, -1).clone()
        mask[0, :, :, self._width - self._width // 8 :] = False
        module = GroupedHeads(num_heads // num_key_heads)
        return module, [tensor.requires_grad_() for tensor in inputs], mask

    def gradients(self, way: str) -> list[Tensor]:
        """The output of a way, and the gradients of its sum with respect to queries, keys and values."""
        module, inputs, mask = self._arguments
        output, _ = WAYS[way](module, *inputs, mask, scaling=inputs[0].shape[-1] ** -0.5)
        return [output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def measured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: queries [B, H, Q, D], keys and values [B, G, K, D],
    mask [B, 1, Q, K] or None, or [1, 1, 1, S] int64, the lengths of the sequences of one row, each of which
    attends to itself alone. -> [B, Q, H, D] and None.

    Rows that attend to themselves go the measured way; decoding steps, and options that only SDPA knows of,
    go to SDPA.
    """
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return _by_length(module, (query, key, value), attention_mask, **options), None
    heads = (query.shape[1], key.shape[1], query.shape[3], query.dtype)
    way = process_wide(MeasuredWays).of(heads, query.shape[2])
    others = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    if others or query.shape[2] != key.shape[2] or (way == "eager" and options.get("dropout")):
        way = "sdpa"
    return WAYS[way](module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # or each batch's lengths would be compiled anew
def _by_length(module: nn.Module, states: Iterable[Tensor], lengths: Tensor, **options: Any) -> Tensor:
    """The attention of sequences of such lengths that stand one behind the other. -> [1, Q, H, D].

    Those of about one length attend together, padded on the right, where no token looks.
    """
    places, found = Places.of(tuple(lengths.flatten().tolist())), []
    sizes = [number * length for number, length in places.groups]
    there, back = places.in_groups, places.in_one_row
    moved = [_Moved.apply(x.transpose(1, 2), there, back, None).split(sizes, dim=1) for x in states]
    for group, *parts in zip(places.groups, *moved, strict=True):
        query, key, value = (part.view(*group, *part.shape[2:]).transpose(1, 2) for part in parts)
        output, _ = measured_attention(module, query, key, value, None, **options)
        found.append(output.flatten(0, 1))
    return _Moved.apply(torch.cat(found)[None], back, there, places.real)


@dataclass(frozen=True)
class Places:
    """Where the tokens of sequences stand in one row, Q, and in groups of equal padded lengths, S in all."""

    groups: list[tuple[int, int]]
    """Sequences of each group, and their padded length."""
    in_groups: Tensor
    """[S], places in the row; of padding 0."""
    in_one_row: Tensor
    """[Q], places in the groups."""
    real: Tensor
    """[S, 1, 1], whether a place in the groups is no padding."""

    @staticmethod
    @lru_cache(maxsize=4)
    def of(lengths: tuple[int, ...]) -> "Places":
        """The places of sequences in the order of the row, found once for all layers."""
        parts = torch.arange(sum(lengths)).split(list(lengths))
        parts = sorted((F.pad(part, (0, -len(part) % SHAPES), value=-1) for part in parts), key=len)
        numbers = [(len(list(same)), length) for length, same in groupby(map(len, parts))]
        # In powers of two, as the number of sequences is a part of a product's shape too.
        groups = [
            (1 << bit, length) for n, length in numbers for bit in range(n.bit_length()) if n >> bit & 1
        ]
        in_groups = torch.cat(parts)
        in_one_row = in_groups.argsort()[-sum(lengths) :]  # the first are those of padding
        return Places(groups, in_groups.clamp(min=0), in_one_row, (in_groups >= 0)[:, None, None])


class _Moved(torch.autograd.Function):
    """Tokens at other places: [1, N, H, D] -> [1, M, H, D].

    `index_select` alone would add up gradients token by token; here each place has that of one token or none.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.back, ctx.real = back, real
        return tokens.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        moved = gradient.index_select(1, ctx.back)
        return moved if ctx.real is None else moved.mul_(ctx.real), None, None, None


def _sdpa_in_fp32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA on fp32 copies: its backward pass in bf16 is slow on CPUs, several times so without AMX.

    The backward pass makes the copies again: only what they are copies of is kept for it.
    """
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    wide = (query.float(), key.float(), value.float())
    with _kept_narrow(wide, (query, key, value)):
        output, _ = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return output.to(query.dtype), None


def _kept_narrow(wide: Iterable[Tensor], narrow: Iterable[Tensor]) -> AbstractContextManager[object]:
    """Where autograd keeps a tensor of `wide`, let it keep that of `narrow` which it is an fp32 copy of.

    Where hooks keep tensors already, as those of checkpointing that keep none, theirs stay.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    sources = {_place(copy): tensor.detach() for copy, tensor in zip(wide, narrow, strict=True)}
    return torch.autograd.graph.saved_tensors_hooks(
        lambda kept: (True, sources[_place(kept)]) if _place(kept) in sources else (False, kept),
        lambda packed: packed[1].float() if packed[0] else packed[1],
    )


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Products and a softmax. torch's softmax of bf16 computes in fp32 and rounds what comes out.

    A row that may attend to nothing attends to everything: such rows are padding.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if attention_mask is not None:
        scores += _additive(attention_mask, scores.dtype)
    elif is_causal if is_causal is not None else getattr(module, "is_causal", True):
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores += _additive(causal, scores.dtype)
    return torch.matmul(F.softmax(scores, dim=-1), value).transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask is True and else the smallest number; masks of numbers as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


WAYS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "sdpa": sdpa_attention_forward,
    "sdpa_fp32": _sdpa_in_fp32,
    "eager": _eager,
}
"""The ways by name; the first is the default."""

AttentionInterface.register(MEASURED, measured_attention)
AttentionMaskInterface.register(MEASURED, sdpa_mask)
