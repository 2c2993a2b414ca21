"""Answers of a model alone, outside of a run: sampled, and scored, as PPO does both."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments
from dschat.data.collate import collate_prompts
from dschat.data.comparisons import Prompt
from dschat.data.encoder import Encoder
from dschat.data.rows import Rows
from dschat.data.tokenization import content_key
from dschat.errors import UserError
from dschat.models.adapter_folder import is_adapter, merged_model
from dschat.models.forward import scores_of, token_logprobs_of
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.model_folder import check_model_path
from dschat.models.reward_model import RewardModel
from dschat.models.tokenizer import load_tokenizer, reads_otherwise
from dschat.models.vocabulary import configure_tokens
from dschat.rlhf.monitoring.evaluation import EVALUATION
from dschat.rlhf.rewards.retokenize import Retokenizer, answer_texts
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.choice import build_backend
from dschat.runs.measured_choices import MeasuredChoices


@dataclass(frozen=True)
class AskedModel:
    """A causal LM or a reward model, in the place of an engine, and its tokenizer."""

    module: PreTrainedModel | RewardModel
    tokenizer: PreTrainedTokenizerBase
    training: bool = False

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    def eval(self) -> None:
        """It is never trained."""

    def train(self, mode: bool = True) -> None:
        """Nor put back into training."""

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@dataclass(frozen=True)
class Answers:
    """What a model said to the prompts."""

    texts: list[str]
    """In the prompts' order."""
    batches: list[RolloutBatch]
    """Prompts of similar length together."""

    @property
    def metrics(self) -> dict[str, float]:
        """The mean length in tokens, end token included, and the share of answers that have one."""
        lengths = torch.cat([batch.answer_lengths for batch in self.batches])
        ended = torch.cat([batch.ended for batch in self.batches])
        return {"answer_length": lengths.double().mean().item(), "eos_share": ended.double().mean().item()}

    def in_order(self, values: Tensor) -> Tensor:
        """Values [N] in the batches' order, in the prompts' order."""
        return values[torch.cat([batch.prompt_rows for batch in self.batches]).argsort().to(values.device)]

    @property
    def token_ids(self) -> list[list[int]]:
        """Prompts and answers without padding, in the batches' order."""
        return [
            ids[mask].tolist()
            for batch in self.batches
            for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
        ]


def load(path: str, flag: str) -> AskedModel:
    """A causal LM in fp32 (bf16 on a GPU) and its tokenizer; an adapter's folder is merged into its base."""
    gpu = torch.cuda.is_available()
    if is_adapter(path):
        model, tokenizer = merged_model(Path(path), task="CAUSAL_LM")
        model.to(torch.bfloat16 if gpu else torch.float32)  # type: ignore[arg-type]  # as below
        configure_tokens(model, tokenizer)
    else:
        check_model_path(path, flag)
        tokenizer = load_tokenizer(path)
        config = {"bf16": {"enabled": gpu}, "zero_optimization": {"stage": 0}}
        model = create_hf_model(AutoModelForCausalLM, path, tokenizer, config)
    model.to("cuda" if gpu else "cpu")  # type: ignore[arg-type]  # transformers' decorator loses its self
    return AskedModel(model.eval(), tokenizer)


def load_reward_model(path: str, flag: str) -> AskedModel:
    """A reward model and its tokenizer, likewise."""
    check_model_path(path, flag)
    tokenizer = load_tokenizer(path)
    gpu = torch.cuda.is_available()
    config = {"bf16": {"enabled": gpu}, "zero_optimization": {"stage": 0}}
    model = create_critic_model(path, tokenizer, config, rlhf_training=True)
    return AskedModel(model.to("cuda" if gpu else "cpu").eval(), tokenizer)


def answer(
    model: AskedModel, prompts: list[Prompt], settings: RolloutArguments, *, seed: int, greedy: bool = False
) -> Answers:
    """Answer every prompt as an evaluation of step 3 with these settings and this seed does.

    `greedy` takes the likeliest token in place of a sample.
    """
    ids = Encoder(model.tokenizer).prompts(prompts)
    keys = [content_key(row) for row in ids]
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "key": pa.array(keys, pa.int64())})
    numbers: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
    samples = np.array([next(numbers[key]) for key in keys])  # or equal prompts would get equal answers
    longest = max(map(len, ids), default=0) + settings.max_answer_seq_len
    unmeasured = MeasuredChoices(measures=False)  # answers are the same whichever machine gives them
    backend = build_backend(settings, model, model.tokenizer, longest=longest, choices=unmeasured)
    sampling = replace(Sampling.of(settings, seed=seed, greedy=greedy), ppo_step=EVALUATION)
    order = np.argsort([len(row) for row in ids], kind="stable")
    size, batches = settings.per_device_generation_batch_size, []
    with backend.session():
        for rows in np.split(order, range(size, len(order), size)):
            asked = collate_prompts(
                table.take(rows),
                len(rows),
                pad_id=model.tokenizer.pad_token_id,
                numbers=rows,
                samples=samples[rows],
            )
            batches.append(backend.generate(asked.to(model.device), sampling))
    texts = [text for batch in batches for text in answer_texts(batch, model.tokenizer)]
    return Answers([texts[place] for place in np.argsort(order)], batches)


def reward_scores(reward: AskedModel, asked: AskedModel, prompts: list[Prompt], answers: Answers) -> Tensor:
    """A reward model's score of each answer as step 3 has it, in the prompts' order. fp32 [N].

    A reward model that reads other tokens, or in another template, than the model that answered reads text.
    """
    retokenizer = None
    if reads_otherwise(asked.tokenizer, reward.tokenizer):
        reread = Rows.from_dict({"reader_ids": Encoder(reward.tokenizer).prompts(prompts)})
        limit = getattr(reward.module.config, "max_position_embeddings", None)
        retokenizer = Retokenizer(reread, asked.tokenizer, reward.tokenizer, max_tokens=limit)
    scores = torch.empty(len(prompts))
    with torch.no_grad():
        for batch in answers.batches:
            read = retokenizer.read(batch) if retokenizer else batch
            scores[batch.prompt_rows.cpu()] = scores_of(reward, read.tokens).float().cpu()
    return scores


def log_likelihoods(model: AskedModel, answers: Answers, temperature: float) -> Tensor:
    """The log-likelihood of each answer given its prompt as PPO has it, in nats. [N], in batches' order."""
    sums = []
    with torch.no_grad():
        for batch in answers.batches:
            logprobs = token_logprobs_of(
                model, batch.tokens, num_tokens=len(model.tokenizer), temperature=temperature
            )
            sums.append(torch.where(batch.answer_mask, logprobs, 0).sum(dim=1))
    return torch.cat(sums)


def check_vocabularies(models: dict[str, AskedModel], reference: str) -> None:
    """KL is between distributions over the same tokens. Raises `UserError`."""
    for name, model in models.items():
        if model.tokenizer.get_vocab() != models[reference].tokenizer.get_vocab():
            raise UserError(
                f"--reference {reference}: the tokens of {name} are not those of {reference}, so there is no "
                "KL divergence between them; leave out --reference, or that model."
            )
