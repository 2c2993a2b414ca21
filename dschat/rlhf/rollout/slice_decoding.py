"""The decoding loop on a model without an engine, for `planning/slices.py`."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dschat.data.collate import PromptBatch
from dschat.planning.meta_pass import Rows
from dschat.rlhf.rollout.decode_modes import MODES, DecodeMode, Decoding
from dschat.rlhf.rollout.graphed_pass import GraphedPass, has_kernels
from dschat.rlhf.rollout.keyed_sampling import TokenDraw
from dschat.rlhf.rollout.traced_pass import TracedPass, can_be_traced


@torch.no_grad()
def decode(model: Any, rows: Rows, end_of: Callable[[str], None]) -> None:
    """Answer prompts of `rows` with `rows.outputs` tokens, as `StaticDecoding` does; see `slices.Decode`."""
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(rows.rows * rows.length, device=model.device).view(rows.rows, -1) % vocabulary
    zeros = torch.zeros(rows.rows, dtype=torch.long, device=model.device)
    prompts = PromptBatch(ids, torch.ones_like(ids), zeros, zeros, zeros)
    on_cpu = "traced in fp32" if model.dtype == torch.bfloat16 else "traced"
    on_gpu = "graphed" if has_kernels() else "graphed sdpa"
    name = on_cpu if model.device.type == "cpu" else on_gpu
    mode = MODES[name if can_be_traced(model.config.get_text_config()) else "matmul"]
    draw = TokenDraw(num_tokens=vocabulary, with_logprobs=True)
    uniforms = torch.full((rows.rows,), 0.5, dtype=torch.float64, device=model.device)
    recorded = _recorded(model, mode)
    decoding = Decoding(model, prompts, mode, 2 * rows.outputs, recorded)
    end_of("reading")
    for _ in range(rows.outputs):
        decoding.read(recorded.draw(draw, decoding.logits, uniforms)[0])
    end_of("writing")


@lru_cache(maxsize=1)
def _recorded(model: Any, mode: DecodeMode) -> TracedPass | GraphedPass:
    """One record for all batches, as in a run."""
    return mode.recorded_pass(model)
