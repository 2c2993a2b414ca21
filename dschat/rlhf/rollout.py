"""Answers from prompts, with Hugging Face `generate`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments
from dschat.data.collate import PromptBatch
from dschat.distributed import (
    gather_rows,
    is_zero3_parameter,
    largest_across_ranks,
    local_world_size,
    print_once,
    sum_across_ranks,
    weights_gathered_for_generation,
    world_size,
)
from dschat.engines import DeepSpeedEngine
from dschat.models.end_tokens import end_token_ids, is_end, names
from dschat.rlhf.keyed_sampling import LogprobRecorder, row_keys, sampling_processors


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts and answers. Columns: P of the prompt, padded on the left, then T of the answer, on the right.

    `answer_mask` is 1 up to and including the first end token; what follows in `input_ids` is padding.
    """

    input_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64
    answer_mask: Tensor  # [B, T] bool
    ended: Tensor  # [B] bool: the answer has its end token; False where it was cut at the length limit
    prompt_rows: Tensor  # [B] int64: the prompt's row in its data set
    prompt_length: int  # P
    logprobs: Tensor | None = None  # [B, T] fp32: of the sampled tokens when they were sampled; 0 beyond

    @property
    def answers(self) -> Tensor:
        """Answer tokens, padding included. [B, T]"""
        return self.input_ids[:, self.prompt_length :]

    @property
    def position_ids(self) -> Tensor:
        """Positions counted over real tokens, so that padding on the left shifts nothing. [B, P + T]"""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def answer_lengths(self) -> Tensor:
        """Tokens of each answer, its end token included. [B]"""
        return self.answer_mask.sum(dim=1)

    def rows(self, indices: Tensor) -> "RolloutBatch":
        """These rows, without columns that are padding in all of them."""
        prompt_mask = self.attention_mask[indices, : self.prompt_length]
        answer_mask = self.answer_mask[indices]
        first = self.prompt_length - int(prompt_mask.sum(dim=1).max())
        length = int(answer_mask.sum(dim=1).max())
        kept = slice(first, self.prompt_length + length)
        return RolloutBatch(
            input_ids=self.input_ids[indices, kept],
            attention_mask=self.attention_mask[indices, kept],
            answer_mask=answer_mask[:, :length],
            ended=self.ended[indices],
            prompt_rows=self.prompt_rows[indices],
            prompt_length=self.prompt_length - first,
            logprobs=None if self.logprobs is None else self.logprobs[indices, :length],
        )

    def padded(self, prompt_length: int, answer_length: int, pad_token_id: int) -> "RolloutBatch":
        """The same rows in wider columns."""
        left = prompt_length - self.prompt_length
        right = answer_length - self.answer_mask.shape[1]
        return RolloutBatch(
            input_ids=torch.nn.functional.pad(self.input_ids, (left, right), value=pad_token_id),
            attention_mask=torch.nn.functional.pad(self.attention_mask, (left, right)),
            answer_mask=torch.nn.functional.pad(self.answer_mask, (0, right)),
            ended=self.ended,
            prompt_rows=self.prompt_rows,
            prompt_length=prompt_length,
            logprobs=None if self.logprobs is None else torch.nn.functional.pad(self.logprobs, (0, right)),
        )


def mask_up_to_first_end(answers: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """True up to and including a row's first end token; all True without one. [B, T] -> bool [B, T]."""
    ends = is_end(answers, end_ids)
    return (ends.cumsum(dim=1) - ends.long()) == 0


def gather_rollouts(batches: list[RolloutBatch], pad_token_id: int) -> RolloutBatch:
    """The rollouts of all batches and ranks as one, in the order in which the loader dealt their prompts.

    It deals them to the ranks in turn, so the rows of a batch are every rank's first, every rank's second,
    ... and do not depend on the number of ranks.
    """
    device = batches[0].input_ids.device
    prompt_length = largest_across_ranks(max(b.prompt_length for b in batches), device)
    answer_length = largest_across_ranks(max(b.answer_mask.shape[1] for b in batches), device)
    wide = [batch.padded(prompt_length, answer_length, pad_token_id) for batch in batches]

    def gather(column: str) -> Tensor:
        by_rank = [gather_rows(getattr(b, column)).unflatten(0, (world_size(), -1)) for b in wide]
        return torch.cat([rows.transpose(0, 1).flatten(0, 1) for rows in by_rank])

    columns = ["input_ids", "attention_mask", "answer_mask", "ended", "prompt_rows"]
    if wide[0].logprobs is not None:
        columns.append("logprobs")
    return RolloutBatch(**{name: gather(name) for name in columns}, prompt_length=prompt_length)


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
            print_once(f"answers end at any of {names(tokenizer, self._end_ids)}")
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
        needed = sum(p.ds_numel * p.element_size() for p in parameters if is_zero3_parameter(p))
        device = self._actor.device
        free = (
            psutil.virtual_memory().available // local_world_size()
            if device.type == "cpu"
            else torch.cuda.mem_get_info(device)[0]
        )
        ranks_without_room = sum_across_ranks(torch.tensor(float(2 * needed > free), device=device))
        gathers = ranks_without_room.item() == 0
        if not gathers:
            print_once("note: the actor does not fit on one device: rollouts gather it for every token.")
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
