"""Which back end a run generates with: the one that --rollout_backend names, or the fastest here."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments
from dschat.data.collate import PromptBatch
from dschat.distributed.deepspeed_private import whole_size
from dschat.distributed.device import give_back_memory
from dschat.distributed.mesh import mesh
from dschat.engines.step import DeepSpeedEngine
from dschat.errors import UserError
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.continuous import ContinuousBatching
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.hybrid import HybridGenerate, plain_generate
from dschat.rlhf.rollout.static_decoding import StaticDecoding
from dschat.runs.measured_choices import MeasuredChoices

TRIAL_PROMPT, TRIAL_ANSWER = 64, 16
"""Lengths in tokens of what is generated to compare: enough that passes of one token decide."""

CHOICE = "--rollout_backend"
"""The name of the choice, in the log and in checkpoints."""


def build_backend(
    args: RolloutArguments,
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    choices: MeasuredChoices,
) -> RolloutBackend:
    """The back end for an actor whose prompts with answers have no more than `longest` tokens.

    Every rank must call it. `auto` and `static` time a few tokens in each way that there is. Raises
    `UserError` where continuous batching is named and does not suit the model.
    """
    plain = plain_generate(args, engine, tokenizer)
    if not isinstance(plain, HybridGenerate):
        return _chosen(args, plain, longest=longest, choices=choices)
    backend = _chosen(args, plain, longest=longest, choices=choices) if plain.injection.obstacle else plain
    plain.announce(backend)
    return backend


def _chosen(
    args: RolloutArguments, plain: HuggingFaceGenerate, *, longest: int, choices: MeasuredChoices
) -> RolloutBackend:
    """The back end over `plain` that is named or the fastest."""
    if args.rollout_backend == "hf":
        return plain
    continuous = ContinuousBatching(plain)
    if args.rollout_backend == "continuous":
        continuous.check(longest=longest)
        return continuous
    static = StaticDecoding(plain, longest=longest)
    answer_length = min(TRIAL_ANSWER, longest - 1)
    prompts = _trial_prompts(plain, args, most=longest - answer_length)

    def trial(backend: RolloutBackend, mode: str | None = None) -> Callable[[], object]:
        sampling = Sampling(max_answer_length=answer_length)

        def run() -> None:
            with backend.session():
                if mode is not None:
                    static.mode = mode
                backend.generate(prompts, sampling)

        return run

    with static.session():
        modes = static.modes()
    ways = {f"static, {mode}": trial(static, mode) for mode in modes}
    if args.rollout_backend == "auto" or not ways:
        ways["hf"] = trial(plain)
    if args.rollout_backend == "auto" and _may_be_fastest(continuous, longest):
        ways["continuous"] = trial(continuous)
    way = choices.choose(CHOICE, ways, key=_work(plain.engine, len(prompts.keys)), rounds=2)
    others: dict[str, RolloutBackend] = {"hf": plain, "continuous": continuous}
    static.configure(None if way in others else way.removeprefix("static, "))
    give_back_memory()  # of ways that were slower
    return others.get(way, static)


def _may_be_fastest(continuous: ContinuousBatching, longest: int) -> bool:
    """Whether continuous batching is worth a timing, and suits the model.

    It is made for FlashAttention, which reads each row's own pages. With SDPA every token of a pass meets the
    keys of all rows, under a mask; on a CPU static decoding was faster (docs/performance.md).
    """
    if not continuous.has_flash_attention or mesh().tensor.size > 1:  # pages are for all heads
        return False
    try:
        continuous.check(longest=longest)
    except UserError:
        return False
    return True


def _trial_prompts(plain: HuggingFaceGenerate, args: RolloutArguments, *, most: int) -> PromptBatch:
    """As many prompts as a batch of answers has, all of other tokens, and of `most` tokens at most."""
    size, device = args.per_device_generation_batch_size, plain.engine.device
    length = min(TRIAL_PROMPT, args.max_prompt_seq_len, most)
    ids = torch.arange(size * length, device=device).view(size, length) * 7 % plain.num_tokens
    rows = torch.arange(size, device=device)
    return PromptBatch(ids, torch.ones_like(ids), keys=rows, rows=rows, samples=torch.zeros_like(rows))


def _work(engine: DeepSpeedEngine, batch_size: int) -> dict[str, Any]:
    """What the times depend on."""
    parameters = [*engine.module.parameters()]
    config = engine.module.config.get_text_config()
    return {
        "model": config.model_type,
        "layers": config.num_hidden_layers,
        "parameters": sum(whole_size(p) for p in parameters),
        "dtypes": sorted({str(p.dtype) for p in parameters}),
        "batch": batch_size,
    }
