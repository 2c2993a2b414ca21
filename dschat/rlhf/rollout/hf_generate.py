"""Answers from prompts, with Hugging Face `generate`."""

import contextlib
from collections.abc import Iterator

import psutil
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments
from dschat.console import messages
from dschat.data.collate import PromptBatch
from dschat.distributed.collectives import sum_across_ranks
from dschat.distributed.deepspeed_private import whole_size
from dschat.distributed.mesh import mesh
from dschat.distributed.zero3 import is_zero3_parameter, weights_gathered_for_generation
from dschat.engines.step import DeepSpeedEngine
from dschat.models.end_tokens import end_token_ids, is_end, names
from dschat.rlhf.rollout.batch import RolloutBatch, mask_up_to_first_end
from dschat.rlhf.rollout.keyed_sampling import LogprobRecorder, row_keys, sampling_processors


class Rollout:
    """Samples answers from the actor. All sampling of a PPO step happens inside one `phase()`.

    With `records_logprobs` the batches carry the log-probabilities that their tokens were sampled with. With
    `greedy` the likeliest token is taken in place of a sample.
    """

    def __init__(
        self,
        actor: DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        args: RolloutArguments,
        *,
        seed: int,
        records_logprobs: bool = False,
        greedy: bool = False,
    ) -> None:
        self._actor = actor
        self._args = args
        self._seed = seed
        self._records_logprobs = records_logprobs
        self._greedy = greedy
        self._end_ids = end_token_ids(tokenizer, actor.module)
        self._pad_token_id = tokenizer.pad_token_id
        self._num_tokens = len(tokenizer)
        self._shards_weights = any(is_zero3_parameter(p) for p in actor.module.parameters())
        if len(self._end_ids) > 1:
            messages.info(f"answers end at any of {names(tokenizer, self._end_ids)}")
        self._gathers = self._shards_weights and self._decide_to_gather()
        # Settings a checkpoint ships for chatting (penalties, forbidden tokens) would sample from another
        # distribution than the one PPO scores, so only these apply.
        self._generation_config = GenerationConfig(
            use_cache=True,
            max_new_tokens=args.max_answer_seq_len,
            do_sample=False,
            eos_token_id=list(self._end_ids),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    def _decide_to_gather(self) -> bool:
        """Whether every rank has room for all weights at once (ZeRO-3), or was told to gather or not to."""
        if self._args.rollout_gather != "auto":
            return self._args.rollout_gather == "always"
        parameters = list(self._actor.module.parameters())
        needed = sum(whole_size(p) * p.element_size() for p in parameters if is_zero3_parameter(p))
        device = self._actor.device
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

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """Eval mode, whole weights (gathered once where ZeRO-3 shards them), plain generation settings."""
        model, was_training = self._actor.module, self._actor.training
        own_settings = model.generation_config
        self._actor.eval()
        model.generation_config = self._generation_config
        gather = weights_gathered_for_generation(self._actor) if self._gathers else contextlib.nullcontext()
        try:
            with gather, torch.no_grad():
                yield
        finally:
            model.generation_config = own_settings
            self._actor.train(was_training)

    @property
    def uses_cache(self) -> bool:
        """Whether a forward pass reads the keys and values of earlier tokens.

        Without, each passes over the whole row, as training does: slow.
        """
        return self._generation_config.use_cache

    @uses_cache.setter
    def uses_cache(self, value: bool) -> None:
        self._generation_config.use_cache = value

    def generate(self, prompts: PromptBatch, *, ppo_step: int) -> RolloutBatch:
        """One answer a row of prompts, sampled with noise keyed by (seed, PPO step, prompt, sample)."""
        prompt_length = prompts.input_ids.shape[1]
        recorder = LogprobRecorder() if self._records_logprobs else None
        keys = row_keys(prompts.keys, prompts.samples, seed=self._seed, ppo_step=ppo_step)
        sequences = self._actor.module.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            generation_config=self._generation_config,
            logits_processor=sampling_processors(
                None if self._greedy else keys,
                prompt_length=prompt_length,
                num_tokens=self._num_tokens,
                temperature=self._args.temperature,
                top_k=self._args.top_k,
                top_p=self._args.top_p,
                recorder=recorder,
            ),
            synced_gpus=self._shards_weights and not self._gathers,
        )
        answers = sequences[:, prompt_length:]
        answer_mask = mask_up_to_first_end(answers, self._end_ids)
        ended = is_end(answers, self._end_ids).any(dim=1)
        logprobs = None if recorder is None else recorder.of(answers).masked_fill(~answer_mask, 0)
        answers = answers.masked_fill(~answer_mask, self._pad_token_id)
        return RolloutBatch(
            input_ids=torch.cat([prompts.input_ids, answers], dim=1),
            attention_mask=torch.cat([prompts.attention_mask.long(), answer_mask.long()], dim=1),
            answer_mask=answer_mask,
            ended=ended,
            prompt_rows=prompts.rows,
            prompt_length=prompt_length,
            logprobs=logprobs,
        )
