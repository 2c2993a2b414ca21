from dataclasses import replace

import pytest
import torch
from rollout_helpers import TEXTS, PlainEngine, answers, prompt_batch
from tiny import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dschat.arguments import RolloutArguments
from dschat.data.collate import PromptBatch
from dschat.models.forward import logits_of
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate

END, PAD = 0, 1


class Answering(HuggingFaceGenerate):
    """A back end with the sampling of every call but its PPO step."""

    sampling: Sampling

    def answer(self, prompts: PromptBatch, *, ppo_step: int) -> RolloutBatch:
        return self.generate(prompts, replace(self.sampling, ppo_step=ppo_step))


def backend_of(engine: PlainEngine, tokenizer, args: RolloutArguments, **options) -> Answering:
    backend = Answering(engine, tokenizer, gather=args.rollout_gather)
    backend.sampling = Sampling.of(args, **options)
    return backend


@pytest.fixture(scope="module", params=FAMILIES)
def actor(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), request.param)
    return PlainEngine(AutoModelForCausalLM.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)


def test_any_end_token_ends_an_answer(tmp_path, capsys):
    """The padding token is one of them, as in Qwen's generation_config.json."""
    folder = save_tiny_model(tmp_path)
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = prompt_batch(tokenizer, TEXTS * 4)

    def sampled() -> RolloutBatch:
        rollout = backend_of(engine, tokenizer, RolloutArguments(max_answer_seq_len=40), seed=3)
        with rollout.session():
            return rollout.answer(prompts, ppo_step=1)

    engine.module.generation_config.eos_token_id = [END]
    before = answers(sampled())
    ends = {END, PAD, *(row[5] for row in before[:3])}
    engine.module.generation_config.eos_token_id = [*ends]
    after = sampled()
    assert "answers end at any of '<|endoftext|>' (0)" in capsys.readouterr().out
    for row, longer, ended in zip(answers(after), before, after.ended.tolist(), strict=True):
        first = next((n for n, token in enumerate(longer) if token in ends), None)
        assert row == (longer if first is None else longer[: first + 1])
        assert ended == (first is not None)
    assert after.ended.sum() >= 3


def test_an_answer_does_not_depend_on_its_batch(actor):
    engine, tokenizer = actor
    rollout = backend_of(engine, tokenizer, RolloutArguments(max_answer_seq_len=10), seed=3)
    with rollout.session():
        together = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        alone = [rollout.answer(prompt_batch(tokenizer, [text]), ppo_step=1) for text in reversed(TEXTS)]
        next_step = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=2)
    assert answers(together) == [answers(one)[0] for one in reversed(alone)]
    assert answers(together) != answers(next_step)


def test_rescoring_finds_the_tokens_that_greedy_decoding_chose(actor):
    engine, tokenizer = actor
    rollout = backend_of(engine, tokenizer, RolloutArguments(max_answer_seq_len=12, temperature=1e-6), seed=0)
    with rollout.session():
        batch = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=0)
        likeliest = logits_of(engine, batch.tokens, num_tokens=len(tokenizer)).argmax(dim=-1)
    assert torch.equal(likeliest[batch.answer_mask], batch.answers[batch.answer_mask])


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.8}])
def test_recorded_log_probabilities_are_those_of_the_whole_softmax_of_each_row_alone(actor, filters):
    engine, tokenizer = actor
    args = RolloutArguments(max_answer_seq_len=10, temperature=0.7, **filters)
    prompts = prompt_batch(tokenizer, TEXTS)
    rollout = backend_of(engine, tokenizer, args, seed=3, with_logprobs=True)
    with rollout.session():
        batch = rollout.answer(prompts, ppo_step=1)
        for row, answer in enumerate(answers(batch)):
            prompt = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
            logits = engine.module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
            torch.testing.assert_close(batch.logprobs[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)
            assert not batch.logprobs[row, len(answer) :].any()


def test_without_a_cache_answers_and_log_probabilities_are_the_same(actor):
    engine, tokenizer = actor
    rollout = backend_of(
        engine, tokenizer, RolloutArguments(max_answer_seq_len=8), seed=3, with_logprobs=True
    )
    uses_cache = []
    handle = engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: uses_cache.append(kwargs["use_cache"]), with_kwargs=True
    )
    with rollout.session():
        cached = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        rollout.uses_cache = False
        uncached = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)
    handle.remove()
    assert uses_cache == [True] * 8 + [False] * 8
    assert answers(uncached) == answers(cached)
    torch.testing.assert_close(uncached.logprobs, cached.logprobs, atol=1e-5, rtol=1e-5)


def test_rows_that_pad_the_vocabulary_are_neither_sampled_nor_scored(tmp_path):
    folder = save_tiny_model(tmp_path, "llama", vocab_size=5000)  # the tokenizer has some 370 tokens
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rollout = backend_of(engine, tokenizer, RolloutArguments(max_answer_seq_len=10), seed=3)
    with rollout.session():
        batch = rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        assert int(batch.answers.max()) < len(tokenizer)
        assert logits_of(engine, batch.tokens, num_tokens=len(tokenizer)).shape[-1] == len(tokenizer)


def test_settings_for_chatting_do_not_change_the_samples_and_come_back_afterwards(actor):
    engine, tokenizer = actor
    args = RolloutArguments(max_answer_seq_len=10)
    plain = backend_of(engine, tokenizer, args, seed=3)
    with plain.session():
        expected = plain.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)
    own = engine.module.generation_config
    chatty = GenerationConfig.from_dict({**own.to_dict(), "repetition_penalty": 50.0, "min_new_tokens": 9})
    engine.module.generation_config = chatty
    try:
        rollout = backend_of(engine, tokenizer, args, seed=3)
        with rollout.session():
            assert answers(rollout.answer(prompt_batch(tokenizer, TEXTS), ppo_step=1)) == answers(expected)
        assert engine.module.generation_config is chatty
    finally:
        engine.module.generation_config = own


def test_a_phase_is_in_eval_mode_and_leaves_the_mode_as_it_was(actor):
    engine, tokenizer = actor
    engine.train()
    with backend_of(engine, tokenizer, RolloutArguments(), seed=0).session():
        assert not engine.module.training
    assert engine.module.training
