"""Sampling whose noise is a pure function of what is sampled.

The same prompt gets the same answer on any number of ranks, in any batch, at any place in it.

Adding Gumbel noise to logits and taking the largest draws from their softmax. The noise here is a hash of
(row key, position in the answer, vocabulary entry), so no generator has a state to keep in step.
"""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dschat.losses import token_logprobs

MASK32 = 0xFFFFFFFF


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


def gumbel_noise(keys: Tensor, position: int, vocabulary_size: int) -> Tensor:
    """Standard Gumbel noise for one decoding step. int32 [B, 2] -> fp32 [B, V].

    The uniforms have 31 bits and lie strictly inside (0, 1): one that rounds to 1 would be infinite noise.
    The finer end of fp32 is the one that becomes large noise, so rare tokens keep their probability.
    """
    first, second = (_fold(half, position) for half in keys.split(1, dim=1))
    entries = _mix32(torch.arange(vocabulary_size, dtype=torch.int32, device=keys.device))
    bits = (_mix32((entries ^ first) + second) >> 1) & 0x7FFFFFFF
    uniform = ((bits.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


class KnownTokensOnly(LogitsProcessor):
    """Forbids rows of a padded vocabulary that the tokenizer has no token for."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._num_tokens :] = -torch.inf
        return scores


class KeyedGumbelNoise(LogitsProcessor):
    """Makes greedy decoding sample: adds the noise of each row's key to the (scaled, filtered) logits."""

    def __init__(self, keys: Tensor, prompt_length: int) -> None:
        self._keys = keys
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self._prompt_length
        return scores + gumbel_noise(self._keys, position, scores.shape[1])


class LogprobRecorder(LogitsProcessor):
    """Keeps the log-probability of each sampled token as the generating forward pass saw it.

    A token is known one step after its scores, which are held until then: [B, V] of one step, never of all.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._score(input_ids[:, -1])
        self._scores = scores
        return scores

    def _score(self, tokens: Tensor) -> None:
        if self._scores is not None:
            self._logprobs.append(token_logprobs(self._scores, tokens))

    def of(self, answers: Tensor) -> Tensor:
        """Those of the sampled tokens; beyond an answer's end anything. int64 [B, T] -> fp32 [B, T]."""
        self._score(answers[:, -1])
        self._scores = None
        return torch.stack(self._logprobs, dim=1)


def sampling_processors(
    keys: Tensor | None,
    *,
    prompt_length: int,
    num_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    recorder: LogprobRecorder | None = None,
) -> LogitsProcessorList:
    """What turns `generate(do_sample=False)` into keyed sampling with temperature, top-k and top-p.

    Without keys there is no noise, and the likeliest token is taken. A `recorder` sees the whole softmax at
    that temperature, before top-k and top-p.
    """
    processors = LogitsProcessorList([KnownTokensOnly(num_tokens)])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if recorder is not None:
        processors.append(recorder)
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if keys is not None:
        processors.append(KeyedGumbelNoise(keys, prompt_length))
    return processors
