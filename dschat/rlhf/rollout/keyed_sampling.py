"""Sampling whose noise is a pure function of what is sampled.

The same prompt gets the same answer on any number of ranks, in any batch, at any place in it.

A token is drawn by the inverse of the cumulative distribution: the first token, in the vocabulary's order, up
to which the probabilities sum to more than a uniform number. That number is a hash of (row key, position in
the answer), so no generator has a state to keep in step, and one number per row is all the noise there is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

MASK32 = 0xFFFFFFFF

BLOCK = 128
"""Tokens that `draw` sums up at once. Other sizes round otherwise, by the last bits of a float64."""


def _signed32(value: int) -> int:
    """The int32 with the same bits."""
    value &= MASK32
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix32(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser (Austin Appleby, public domain) on int32 tensors, where products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed32(0x85EBCA6B)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _signed32(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _fold(state: Tensor, word: Tensor | int) -> Tensor:
    """Mix one more 32-bit word into int32 states."""
    return _mix32((state ^ _mix32(word + torch.zeros_like(state))) * 5 + _signed32(0xE6546B64))


def _to_words(values: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high half of int64 values, as int32."""
    low = ((values & MASK32) ^ (1 << 31)) - (1 << 31)
    return low.to(torch.int32), (values >> 32).to(torch.int32)


def row_keys(prompt_keys: Tensor, samples: Tensor, *, seed: int, ppo_step: int) -> Tensor:
    """Two 32-bit states a row from (seed, PPO step, prompt, sample). int64 [B], int64 [B] -> int32 [B, 2]."""
    low, high = _to_words(prompt_keys)
    words: list[Tensor | int] = [
        *(low, high),
        *_to_words(samples),
        _signed32(seed),
        _signed32(seed >> 32),
        _signed32(ppo_step),
    ]
    states = []
    for start in (0x9747B28C, 0x3C6EF372):
        state = torch.full_like(low, _signed32(start))
        for word in words:
            state = _fold(state, word)
        states.append(state)
    return torch.stack(states, dim=1)


def keyed_uniforms(keys: Tensor, num_positions: int) -> Tensor:
    """One number for each row and each position of its answer. int32 [B, 2] -> float64 [B, T].

    The numbers have 52 bits and lie strictly inside (0, 1).
    """
    positions = torch.arange(num_positions, dtype=torch.int32, device=keys.device)
    high, low = (
        _fold(half.expand(-1, num_positions), positions).long() & MASK32 for half in keys.split(1, dim=1)
    )
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with probabilities in proportion to weights; the sums of the weights.

    `weights` are fp32 [B, V], not negative, and `uniforms` float64 [B] in (0, 1) -> int64 [B], float64 [B].
    Sums are float64 and over the same blocks of tokens wherever the vocabulary ends, so weights of 0 behind
    it change nothing. A token of weight 0 is never drawn.
    """
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    totals = sums[:, -1]
    block, rest = _first_beyond(sums, uniforms * totals)
    chosen = blocks[torch.arange(len(blocks), device=blocks.device), block]
    place, _ = _first_beyond(chosen.cumsum(dim=1, dtype=torch.float64), rest)
    return block * BLOCK + place, totals


def _first_beyond(sums: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose running sum is above the target, and what the target has beyond the one before.

    Rounding may put a target at the last sum or above it: it is then taken to be just below, so that there is
    such a column, and it is one that adds to the sum. float64 [B, N], [B] -> int64 [B], float64 [B].
    """
    targets = torch.minimum(targets, torch.nextafter(sums[:, -1], torch.zeros_like(targets)))
    column = (sums <= targets[:, None]).sum(dim=1)
    before = sums.gather(1, (column[:, None] - 1).clamp(min=0)).squeeze(1)
    return column, torch.where(column > 0, targets - before, targets)


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """How a token is drawn from logits: what `Sampling` says of it, and the size of the tokenizer."""

    num_tokens: int
    """Rows that pad a model's vocabulary beyond it are never drawn."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    with_logprobs: bool = False

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next token of each row, and its log-probability where the draw records it.

        The log-probability is of the whole softmax at the temperature, before top-k and top-p.
        [B, V], float64 [B] -> int64 [B], fp32 [B].
        """
        scores = logits[:, : self.num_tokens].float()
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.greedy:
            tokens = scores.argmax(dim=1)
            return tokens, self._logprobs(scores, tokens) if self.with_logprobs else None
        largest = scores.amax(dim=1, keepdim=True)
        if self.top_k > 0 or self.top_p < 1:
            tokens, _ = draw((self._filtered(scores) - largest).exp(), uniforms)
            return tokens, self._logprobs(scores, tokens) if self.with_logprobs else None
        tokens, totals = draw((scores - largest).exp(), uniforms)
        if not self.with_logprobs:
            return tokens, None
        above = (scores.gather(1, tokens[:, None]) - largest).squeeze(1)
        return tokens, (above - totals.log()).float()

    def _filtered(self, scores: Tensor) -> Tensor:
        """-inf for what top-k and then top-p leave out."""
        nothing = torch.empty(0)  # the tokens before, which neither reads
        if self.top_k > 0:
            scores = TopKLogitsWarper(self.top_k)(nothing, scores)
        return TopPLogitsWarper(self.top_p)(nothing, scores) if self.top_p < 1 else scores

    @staticmethod
    def _logprobs(scores: Tensor, tokens: Tensor) -> Tensor:
        return scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(dim=1)


class KeyedDraws(LogitsProcessor):
    """Makes `generate(do_sample=False)` sample: leaves the token that is drawn the only possible one."""

    def __init__(self, draw_token: TokenDraw, uniforms: Tensor, *, prompt_length: int) -> None:
        """`uniforms` are float64 [B, T], of each position of the answers."""
        self._draw, self._uniforms, self._prompt_length = draw_token, uniforms, prompt_length
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self._prompt_length
        tokens, logprobs = self._draw(scores, self._uniforms[:, position])
        if logprobs is not None:
            self._logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    @property
    def processors(self) -> LogitsProcessorList:
        """The only one."""
        return LogitsProcessorList([self])

    @property
    def logprobs(self) -> Tensor | None:
        """Those of the tokens, as drawn; beyond an answer's end anything. fp32 [B, T]"""
        return torch.stack(self._logprobs, dim=1) if self._logprobs else None
