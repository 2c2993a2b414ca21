"""Answers from prompts, with Hugging Face `generate`."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import psutil
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dschat.console import messages
from dschat.data.collate import PromptBatch
from dschat.distributed.collectives import max_across_ranks, sum_across_ranks
from dschat.distributed.deepspeed_private import is_sharded, whole_size
from dschat.distributed.mesh import mesh
from dschat.distributed.zero3 import weights_gathered_for_generation
from dschat.engines.step import DeepSpeedEngine
from dschat.models.end_tokens import end_token_ids, names
from dschat.rlhf.rollout.backend import Ability, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.keyed_sampling import KeyedDraws

Gather = Literal["auto", "always", "never"]
"""Values of --rollout_gather."""


class HuggingFaceGenerate:
    """Hugging Face's `generate` on the training engine itself, a `RolloutBackend` with every ability.

    `gather` says whether ZeRO-3's shards of the weights are gathered once per session.
    """

    name = "generate()"
    cannot: frozenset[Ability] = frozenset()

    def __init__(
        self,
        actor: DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        gather: Gather = "auto",
    ) -> None:
        self.uses_cache = True
        self.engine = actor
        self.end_ids = end_token_ids(tokenizer, actor.module)
        self.num_tokens, self.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        self.shards_weights = any(is_sharded(p) for p in actor.module.parameters())
        if len(self.end_ids) > 1:
            messages.info(f"answers end at any of {names(tokenizer, self.end_ids)}")
        self._gathers = self.shards_weights and self._decide_to_gather(gather)
        self.keeps_in_step = self.shards_weights and not self._gathers
        # Settings a checkpoint ships for chatting (penalties, forbidden tokens) would sample from another
        # distribution than the one PPO scores, so only these apply.
        self._generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=list(self.end_ids),
            pad_token_id=self.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    def _decide_to_gather(self, gather: Gather) -> bool:
        """Whether every rank has room for all weights at once (ZeRO-3), or was told to gather or not to."""
        if gather != "auto":
            return gather == "always"
        parameters = list(self.engine.module.parameters())
        needed = sum(whole_size(p) * p.element_size() for p in parameters if is_sharded(p))
        device = self.engine.device
        free = (
            psutil.virtual_memory().available // mesh().machine.size
            if device.type == "cpu"
            else torch.cuda.mem_get_info(device)[0]
        )
        ranks_without_room = sum_across_ranks(
            torch.tensor(float(2 * needed > free), device=device), axis="world"
        )
        gathers = ranks_without_room.item() == 0
        if not gathers:
            messages.note("the actor does not fit on one device: rollouts gather it for every token.")
        return gathers

    def all_ranks_are_done(self, is_done: bool) -> bool:
        """Whether the answers of all ranks have ended, where forward passes gather weights; else of this one.

        Every rank must then make as many passes as the others.
        """
        if not self.keeps_in_step:
            return is_done
        left = torch.tensor(int(not is_done), device=self.engine.device)
        return not max_across_ranks(left, axis="world").item()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Eval mode, whole weights (gathered once where ZeRO-3 shards them), plain generation settings."""
        model, was_training = self.engine.module, self.engine.training
        own_settings = model.generation_config
        self.engine.eval()
        model.generation_config = self._generation_config
        gather = weights_gathered_for_generation(self.engine) if self._gathers else contextlib.nullcontext()
        try:
            with gather, torch.no_grad():
                yield
        finally:
            model.generation_config = own_settings
            self.engine.train(was_training)

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, streamer: BaseStreamer | None = None
    ) -> RolloutBatch:
        """One answer per row of prompts, sampled with noise keyed by (seed, PPO step, prompt, sample).

        `streamer` is told every token of the one row that there is then.
        """
        self._generation_config.max_new_tokens = sampling.max_answer_length
        self._generation_config.use_cache = self.uses_cache
        prompt_length = prompts.input_ids.shape[1]
        draws = KeyedDraws(
            sampling.token_draw(self.num_tokens), sampling.uniforms(prompts), prompt_length=prompt_length
        )
        sequences = self.engine.module.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            generation_config=self._generation_config,
            logits_processor=draws.processors,
            synced_gpus=self.keeps_in_step,
            streamer=streamer,
        )
        answers = sequences[:, prompt_length:]
        return RolloutBatch.of_answers(prompts, answers, self.end_ids, self.pad_token_id, draws.logprobs)
