"""Answers from prompts by transformers' continuous batching: keys and values stand in pages.

`ContinuousBatchingManager` schedules the rows, calls the training model and decides when answers end. The
tokens are drawn here, with the same keys as in the other back ends. transformers 5.23 is read for this:
`generation/continuous_batching/continuous_api.py`, `cb_logits_processors.py` and `input_outputs.py`.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dschat.data.collate import PromptBatch
from dschat.errors import UserError
from dschat.models.attention import MEASURED
from dschat.models.forward import token_logprobs_of
from dschat.rlhf.rollout.agreement import usual_tolerance
from dschat.rlhf.rollout.backend import Ability, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.decode_modes import attention_named
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.keyed_sampling import TokenDraw

FLAG = "--rollout_backend continuous"
REMEDY = "use --rollout_backend auto, static or hf"

PAGE, FLASH_PAGE = 32, 256
"""Tokens per page. FlashAttention's pages hold multiples of 256."""

MOST_TOKENS_PER_PASS = 1024
"""Prompts are read in passes of so many tokens. SDPA's mask has a row per token of a pass, and a column per
token that all pages hold."""

TRIAL_LENGTHS, TRIAL_ANSWER = (5, PAGE + 3), 4
"""Lengths in tokens of the prompts and answers of the trial: the second prompt takes two pages."""


class ContinuousBatching:
    """transformers' continuous batching on the training engine, a `RolloutBackend` with every ability.

    Each batch has a new manager, so that no page outlives a change of the weights. `plain` answers where
    there is to be no cache.
    """

    name = "continuous batching"
    cannot: frozenset[Ability] = frozenset()

    def __init__(self, plain: HuggingFaceGenerate) -> None:
        self.uses_cache = True
        self._plain = plain

    @property
    def has_flash_attention(self) -> bool:
        """Whether rows read their own pages alone; else all pages, under a mask."""
        return _attention(self._plain.engine.module).startswith("flash")

    def check(self, *, longest: int) -> None:
        """Raise `UserError` for models that it cannot answer with; rows will have up to `longest` tokens.

        Every rank must call it. It answers two prompts and compares their log-probabilities with a pass
        without a cache.
        """
        config = self._plain.engine.module.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if self._plain.keeps_in_step:
            raise UserError(
                f"{FLAG}: ranks would have to make equally many passes, as ZeRO-3 gathers the weights layer "
                f"by layer; give --rollout_gather always, or {REMEDY}."
            )
        if window is not None and window < longest:
            raise UserError(
                f"{FLAG}: the model attends to the last {window} tokens alone, and rows have up to "
                f"{longest}; {REMEDY}."
            )
        with self.session():
            if not self._agrees():
                raise UserError(
                    f"{FLAG}: with pages of keys and values the model of type {config.model_type!r} does not "
                    f"predict what it predicts without; {REMEDY}."
                )

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Eval mode, and whole weights (gathered once where ZeRO-3 shards them)."""
        with self._plain.session():
            yield

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> RolloutBatch:
        """One answer per row of prompts, sampled with noise keyed by (seed, PPO step, prompt, sample).

        Raises `UserError` where transformers ends with an error, such as too little memory for the pages.
        """
        plain = self._plain
        if not self.uses_cache:
            plain.uses_cache = False
            return plain.generate(prompts, sampling)
        draws = PagedDraws(
            sampling.token_draw(plain.num_tokens), sampling.uniforms(prompts), prompts.attention_mask
        )
        tokens, masks = prompts.input_ids.cpu(), prompts.attention_mask.cpu()
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(tokens, masks, strict=True)]
        found = self._answers(rows, draws, sampling.max_answer_length)
        device = prompts.input_ids.device
        answers = pad_sequence(
            [torch.tensor(tokens, device=device) for tokens in found],
            batch_first=True,
            padding_value=plain.pad_token_id,
        )
        logprobs = draws.logprobs[:, : answers.shape[1]] if sampling.with_logprobs else None
        return RolloutBatch.of_answers(prompts, answers, plain.end_ids, plain.pad_token_id, logprobs)

    def _answers(self, rows: list[list[int]], draws: "PagedDraws", length: int) -> list[list[int]]:
        """The tokens of each row's answer, its end token included.

        All rows are queued before the manager's thread starts, so which share a pass does not depend on time.
        """
        model: Any = self._plain.engine.module
        attention = _attention(model)
        longest = max(map(len, rows)) + length
        page = FLASH_PAGE if self.has_flash_attention else PAGE
        batching = ContinuousBatchingConfig(
            num_blocks=len(rows) * (longest // page + 2),
            max_batch_tokens=max(len(rows), min(MOST_TOKENS_PER_PASS, sum(map(len, rows)))),
            max_requests_per_batch=len(rows),
            use_cuda_graph=False,  # a manager would record its own in each batch
            use_async_batching=False,
            **_paging(page),
        )
        ends = list(self._plain.end_ids)
        settings = GenerationConfig(do_sample=False, eos_token_id=ends, max_new_tokens=length)
        with attention_named(model.config, _paged(attention)), _generators_untouched(model.device):
            try:
                return self._run(model, rows, draws, settings, batching)
            except (MemoryError, RuntimeError, ValueError) as error:
                raise UserError(f"{FLAG}: transformers ended with {str(error)!r}; {REMEDY}.") from error

    @staticmethod
    def _run(
        model: Any,
        rows: list[list[int]],
        draws: "PagedDraws",
        settings: GenerationConfig,
        batching: ContinuousBatchingConfig,
    ) -> list[list[int]]:
        """The answers by row. Raises RuntimeError where the manager's thread fails."""
        manager = model.init_continuous_batching(
            generation_config=settings, continuous_batching_config=batching
        )
        manager.logit_processor = draws.processors
        try:
            manager.warmup()  # makes the pages
            # The OPT of transformers 5.24 asks them for a number that it does not need.
            manager.batch_processor.cache.get_seq_length = lambda: 0
            for row, ids in enumerate(rows):
                manager.add_request(ids, request_id=str(row), row=row)
            manager.start()
            manager.stop(block=True)  # once nothing is queued any more
        finally:
            manager.destroy()
        found: dict[int, list[int]] = {}
        while (output := manager.get_result(timeout=0.1)) is not None:
            if output.error is not None:
                raise RuntimeError(output.error)
            found[int(output.request_id)] = output.generated_tokens
        if len(found) < len(rows):
            raise RuntimeError(f"{len(found)} answers to {len(rows)} prompts")
        return [found[row] for row in range(len(rows))]

    def _agrees(self) -> bool:
        """Whether the log-probabilities of a few likeliest tokens are those of a pass without a cache."""
        plain, model = self._plain, self._plain.engine.module
        length = max(TRIAL_LENGTHS)
        ids = (torch.arange(2 * length, device=plain.engine.device).view(2, -1) * 7 + 3) % plain.num_tokens
        mask = (torch.arange(length) >= length - torch.tensor(TRIAL_LENGTHS)[:, None]).long().to(ids.device)
        zeros = torch.zeros(2, dtype=torch.long, device=ids.device)
        prompts = PromptBatch(ids, mask, zeros, rows=zeros, samples=zeros)
        sampling = Sampling(max_answer_length=TRIAL_ANSWER, greedy=True, with_logprobs=True)
        try:
            with _without_tracebacks():
                found = self.generate(prompts, sampling)
        except UserError:  # of architectures that know nothing of pages
            return False
        expected = token_logprobs_of(model, found.tokens, num_tokens=plain.num_tokens)
        assert found.logprobs is not None
        apart = (found.logprobs - expected)[found.answer_mask].abs().mean().item()
        return apart <= usual_tolerance(model.dtype)


def _attention(model: Any) -> str:
    """The name of the attention that transformers pages: the model's own, or SDPA for one by our tables."""
    own = str(model.config._attn_implementation)
    return "sdpa" if own == MEASURED else own


def _paging(page: int) -> dict[str, Any]:
    """The settings of pages by the names of this transformers: in 5.17 they are blocks."""
    known = ContinuousBatchingConfig.__dataclass_fields__
    keeps = {"auto_switch_to_flash": False} if "auto_switch_to_flash" in known else {}
    return {"page_size" if "page_size" in known else "block_size": page, **keeps}


def _paged(attention: str) -> str:
    """What transformers calls that attention with pages: before 5.20 it has a name of its own."""
    return f"paged|{attention}" if f"paged|{attention}" in ALL_ATTENTION_FUNCTIONS else attention


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """The manager's thread logs why it ends; in a trial the reason is known."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _generators_untouched(device: torch.device) -> Iterator[None]:
    """A manager seeds torch's generators, which training's dropout draws from: they are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class PagedDraws(ContinuousBatchingLogitsProcessor):
    """Leaves the token that is drawn the only possible one, for rows in any order and at any position.

    Its argument per drawn token is row * T + position; B * T stands for none.
    """

    def __init__(self, draw_token: TokenDraw, uniforms: Tensor, attention_mask: Tensor) -> None:
        """`uniforms` are float64 [B, T], of each position of the answers; the mask is that of the prompts."""
        self.supported_kwargs, self.ignored_kwargs = {"row": int}, ()
        self._draw, self._shape = draw_token, uniforms.shape
        self._uniforms = torch.cat([uniforms.flatten(), uniforms.new_full((1,), 0.5)])
        self._logprobs = torch.zeros(len(self._uniforms), device=uniforms.device)
        self._prompt_lengths = attention_mask.sum(dim=1).tolist()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """The argument of columns that pad a pass."""
        int32_tensor.fill_(self._shape.numel())

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """The arguments of a pass, those of rows that get a token first. -> int32 [B]

        A pass draws for as many rows as it has, also for those whose prompts it has not read to the end. The
        arguments of these would be of passes before, so they are set too.
        """
        places = [self._place(request.state) for request in requests_with_new_token]
        unused = [self._shape.numel()] * (self._shape[0] - len(places))
        return torch.tensor(places + unused, dtype=torch.int32)

    def _place(self, state: Any) -> int:
        """`position_offset` counts the tokens that are read at the end of this pass."""
        row = state.logit_processor_kwargs["row"]
        return row * self._shape[1] + state.position_offset - self._prompt_lengths[row]

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """[N, V], int32 [at least N] -> [N, V], 0 for the drawn token and -inf for others."""
        places = tensor_arg[: len(scores)].long()
        tokens, logprobs = self._draw(scores, self._uniforms[places])
        if logprobs is not None:
            self._logprobs[places] = logprobs
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    @property
    def processors(self) -> ContinuousBatchingLogitsProcessorList:
        """The only one."""
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self]))
        processors.tensors_required = 1
        return processors

    @property
    def logprobs(self) -> Tensor:
        """Those of the tokens, as drawn; 0 where none was. fp32 [B, T]"""
        return self._logprobs[:-1].view(self._shape)
