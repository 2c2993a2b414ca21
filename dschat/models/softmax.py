"""Log-probabilities and entropies from logits, in fp32 and in little memory: torch only, as in losses.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FP32_ELEMENTS = 1 << 24
"""On a GPU logits are cast to fp32 this many at a time (64 MiB), never a whole batch at once."""

FP32_ELEMENTS_PER_THREAD = 1 << 17
"""The same on a CPU, for each thread: 512 KiB stay in its core's cache from pass to pass."""


def _rows_at_once(logits: Tensor) -> int:
    on_cpu = logits.device.type == "cpu"
    elements = FP32_ELEMENTS_PER_THREAD * torch.get_num_threads() if on_cpu else FP32_ELEMENTS
    return max(1, elements // logits.shape[-1])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """An fp32 copy of logits over temperature, to be worked on in place."""
    copy = logits.to(torch.float32, copy=True)
    return copy if temperature == 1 else copy.div_(temperature)


class _SoftmaxStatistics(torch.autograd.Function):
    """Of rows of logits: log-probability of a token, and entropy or None. [R, V], [R] -> fp32 [R] both.

    For the backward pass it keeps the logits themselves and two numbers per row. The softmax is computed
    again there, a few rows at a time, and written into the gradient in the logits' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        size, statistics = _rows_at_once(logits), []
        for part, ids in zip(logits.split(size), tokens.split(size), strict=True):
            scores = _scaled(part, temperature)
            highest = scores.amax(-1, keepdim=True)
            scores -= highest
            chosen = scores.gather(1, ids.unsqueeze(1))
            weights = scores.exp() if with_entropy else scores.exp_()
            total = weights.sum(-1, keepdim=True)
            log_total = total.log()
            numbers = [chosen - log_total, highest + log_total]
            if with_entropy:  # both terms are at least 0, so nothing cancels
                numbers.append(log_total - weights.mul_(scores).sum(-1, keepdim=True) / total)
            statistics.append(torch.cat(numbers, dim=1))
        logprobs, log_sums, *entropies = torch.cat(statistics).unbind(1)
        entropy = entropies[0] if with_entropy else None
        ctx.save_for_backward(logits, tokens, log_sums, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        """With z = logits / temperature: d log p_k / dz_j = [j = k] - p_j, dH / dz_j = -p_j (log p_j + H)."""
        logits, tokens, log_sums, entropy = ctx.saved_tensors
        of_logprobs = torch.zeros_like(log_sums) if of_logprobs is None else of_logprobs / ctx.temperature
        gradient, size = torch.empty_like(logits), _rows_at_once(logits)
        for start in range(0, len(tokens), size):
            rows = slice(start, start + size)
            share = of_logprobs[rows].unsqueeze(1)
            scores = _scaled(logits[rows], ctx.temperature).sub_(log_sums[rows].unsqueeze(1))
            if of_entropy is None:
                part = scores.exp_().mul_(-share)
            else:
                part = scores.exp()
                scores += entropy[rows].unsqueeze(1)
                scores *= of_entropy[rows].unsqueeze(1) / ctx.temperature
                part.mul_(scores.add_(share).neg_())
            gradient[rows] = part.scatter_add_(1, tokens[rows].unsqueeze(1), share)
        return gradient, None, None, None


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, in fp32: [B, T, V] and [B, T] -> [B, T].

    The fp32 copy of the logits exists for a few rows at a time, in the backward pass too, where it is
    computed again. The numbers are the same to the last bit with gradients and without.
    """
    logprobs, _ = _SoftmaxStatistics.apply(logits.flatten(0, -2), tokens.flatten(), temperature, False)
    return logprobs.view(tokens.shape)


def logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, to the last bit, and the entropy in nats of each distribution, from one softmax.

    [B, T, V] and [B, T] -> fp32 [B, T] both.
    """
    statistics = _SoftmaxStatistics.apply(logits.flatten(0, -2), tokens.flatten(), temperature, True)
    logprobs, entropy = (values.view(tokens.shape) for values in statistics)
    return logprobs, entropy
