"""Golden outputs: what a model computes on a few rows, which proves that it is the one that was exported."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dschat.data.token_batch import TokenBatch
from dschat.distributed.device import PRECISIONS
from dschat.engines.pipeline import PipelinedEngine, of_last_stage, results_of
from dschat.export.manifest import Head, Manifest
from dschat.losses import masked_mean
from dschat.models.forward import scores_of, token_logprobs_of
from dschat.models.reward_model import RewardModel

NATS = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.1}
"""The largest difference between a golden log-probability per token and the promised one, in nats.

Another device, kernel, batch shape or ZeRO stage rounds differently. Measured on Llamas of 8 and 24 layers
with random weights against fp32: up to 0.004 in fp16 and 0.025 in bf16; in fp32, between batch shapes, 1e-6.
A random output layer is nats away.
"""

STANDARD_DEVIATIONS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}
"""The largest difference between a golden score and the promised one, in standard deviations of scores.

Measured as the log-probabilities were: up to 1e-6 in fp32, 0.05 in fp16 and 0.34 in bf16.

Scores of two random heads are about the root of 2 of them apart. Half of one is wide, but the farthest of 8
rows decides, and all 8 are that near by chance once in some 30,000 heads.
"""


def head_of(model: Any) -> Head:
    """The head of an engine or a module by its class; a critic has that of a reward model, "score"."""
    return "score" if isinstance(getattr(model, "module", model), RewardModel) else "language_model"


@torch.no_grad()
def golden_outputs(
    model: Any, rows: Sequence[Sequence[int]], *, num_tokens: int, device: torch.device | str
) -> Tensor:
    """The output of `model` for each row of token ids, [N] fp64 on the CPU.

    For a language model it is the mean log-probability per token after the first, normalised over
    `num_tokens` tokens; for a reward model or critic it is the value at the last token. `model` is an
    engine or a module, which is left in its mode. Under ZeRO-3 every rank must call it.
    """
    if not rows:  # data of which every row has one token
        return torch.zeros(0, dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
    ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
    ids[mask] = torch.tensor([token for row in rows for token in row], device=device)
    batch = TokenBatch.of(ids, mask, attention_mask=mask.long())
    module = getattr(model, "module", model)  # an engine does not know its own mode
    was_training = module.training
    module.eval()

    def outputs_of(batch: TokenBatch) -> list[float]:
        if head_of(model) == "score":
            return scores_of(model, batch).tolist()
        logprobs = token_logprobs_of(model, batch, num_tokens=num_tokens, every_position=True)
        pairs = zip(logprobs, batch.label_mask, strict=True)
        return [masked_mean(row, row_mask).item() for row, row_mask in pairs]

    try:
        results = list(results_of(model, [batch], outputs_of))
        outputs = (of_last_stage(results) if isinstance(model, PipelinedEngine) else results)[0]
    finally:
        module.train(was_training)
    return torch.tensor(outputs, dtype=torch.float64)


def tolerance(manifest: Manifest, dtype: torch.dtype) -> float:
    """The largest difference from a promised output that rounding explains in a model of precision `dtype`.

    In nats for a language model, in the unit of the scores for other models.
    """
    precisions = (manifest.dtype, PRECISIONS[dtype])
    if manifest.head == "language_model":
        return max(NATS[precision] for precision in precisions)
    expected = torch.tensor(manifest.golden_outputs, dtype=torch.float64)
    std = manifest.score_std or expected.std(correction=0).item()
    # Scores far from 0 are rounded in proportion to their size, which may be many standard deviations.
    epsilon = max(torch.finfo(kind).eps for kind, name in PRECISIONS.items() if name in precisions)
    share = max(STANDARD_DEVIATIONS[precision] for precision in precisions)
    return share * std + 4 * epsilon * expected.abs().max().item()
