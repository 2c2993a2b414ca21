"""Answers from prompts by a decoding loop of our own: little is done per token beside the forward pass.

Each distinct prompt is read once. Keys and values stand in buffers of the final length, masks and positions
are made once, and rows whose answers have ended leave the batch. The model and its passes are transformers'.
"""

import contextlib
from collections.abc import Iterator

import torch

from dschat.console import messages
from dschat.data.collate import PromptBatch
from dschat.distributed.mesh import mesh
from dschat.rlhf.rollout.backend import Ability, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.decode_modes import MODES, Decoding, agreeing_modes
from dschat.rlhf.rollout.graphed_pass import GraphedPass
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.traced_pass import TracedPass

CHECK_INTERVAL_ON_GPU = 16
"""Tokens between two looks at which rows have ended: a look waits for the GPU."""


class StaticDecoding:
    """A decoding loop of our own on the training engine, a `RolloutBackend` with every ability.

    `plain` answers where there is to be no cache, and for models that no mode of decoding agrees with.
    """

    name = "static decoding"
    cannot: frozenset[Ability] = frozenset()

    def __init__(self, plain: HuggingFaceGenerate, *, longest: int) -> None:
        """Rows will have no more than `longest` columns."""
        self.uses_cache = True
        self.mode: str | None = None
        """The name in MODES of how passes are called; None where `plain` answers."""
        self._plain, self._longest = plain, longest
        self._recorded: dict[str, TracedPass | GraphedPass] = {}
        self._agreeing: list[str] | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Eval mode, and whole weights (gathered once where ZeRO-3 shards them)."""
        with self._plain.session():
            if self._agreeing is None:
                self.mode = next(iter(self.modes()), None)
            yield
            for recorded in self._recorded.values():
                recorded.end()

    def configure(self, mode: str | None) -> None:
        """Generate in that mode, with None by `plain`, and forget what others have recorded."""
        self.mode = mode
        self._recorded = {name: one for name, one in self._recorded.items() if name == mode}

    def modes(self) -> list[str]:
        """The modes that agree with passes without a cache, the preferred first; for use in a session."""
        if self._agreeing is None:
            self._agreeing = agreeing_modes(
                self._plain.engine.module,
                num_tokens=self._plain.num_tokens,
                longest=self._longest,
                with_python_hooks=self._plain.keeps_in_step or mesh().tensor.size > 1,
            )
            if not self._agreeing:
                messages.note(
                    f"{self.name} does not agree with this architecture's own passes: generate() answers."
                )
        return self._agreeing

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> RolloutBatch:
        """One answer per row of prompts, sampled with noise keyed by (seed, PPO step, prompt, sample)."""
        if self.mode is None or not self.uses_cache:
            self._plain.uses_cache = self.uses_cache
            return self._plain.generate(prompts, sampling)
        plain, device, pad = self._plain, prompts.input_ids.device, self._plain.pad_token_id
        draw, uniforms = sampling.token_draw(plain.num_tokens), sampling.uniforms(prompts)
        ends = torch.tensor(plain.end_ids, device=device)
        answers = torch.full(uniforms.shape, pad, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device) if sampling.with_logprobs else None
        rows = torch.arange(len(answers), device=device)  # which answers those in the batch are
        ended = torch.zeros_like(rows, dtype=torch.bool)
        mode, model = MODES[self.mode], plain.engine.module
        if self.mode not in self._recorded:
            self._recorded[self.mode] = mode.recorded_pass(model)
        recorded = self._recorded[self.mode]
        decoding = Decoding(model, prompts, mode, sampling.max_answer_length, recorded)
        for length in range(1, sampling.max_answer_length + 1):
            tokens, drawn = recorded.draw(draw, decoding.logits, uniforms[:, length - 1])
            answers[rows, length - 1] = tokens
            if logprobs is not None and drawn is not None:
                logprobs[rows, length - 1] = drawn
            ended = ended | (tokens[:, None] == ends).any(dim=1)
            if length == sampling.max_answer_length:
                break
            if device.type == "cpu" or length % CHECK_INTERVAL_ON_GPU == 0:
                num_left = len(ended) - int(ended.sum())
                if plain.all_ranks_are_done(num_left == 0):
                    break
                size = batch_size_of(num_left)
                if size < len(rows):
                    kept = ended.byte().argsort(stable=True)[:size]
                    rows, ended, uniforms, tokens = rows[kept], ended[kept], uniforms[kept], tokens[kept]
                    decoding.keep(kept)
            decoding.read(tokens)
        kept_logprobs = None if logprobs is None else logprobs[:, :length]
        return RolloutBatch.of_answers(prompts, answers[:, :length], plain.end_ids, pad, kept_logprobs)


def batch_size_of(num_rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds so many rows.

    To leave rows out copies the others' keys and values, and new shapes cost a GPU and oneDNN time, so it is
    not done for each.
    """
    size = 1
    while size < num_rows:
        size *= 2
    return size * 3 // 4 if size >= 4 and size * 3 // 4 >= num_rows else max(size, 1)
