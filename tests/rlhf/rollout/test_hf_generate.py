from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dschat.arguments import RolloutArguments
from dschat.data.collate import PromptBatch
from dschat.models.forward import logits_of
from dschat.rlhf.rollout.batch import RolloutBatch, gather_rollouts, mask_up_to_first_end
from dschat.rlhf.rollout.hf_generate import Rollout

END, PAD = 0, 1


class PlainEngine:
    """A model where a DeepSpeed engine is expected."""

    def __init__(self, model) -> None:
        self.module = model
        self.device = torch.device("cpu")
        self.training = True

    def eval(self) -> None:
        self.train(False)

    def train(self, mode: bool = True) -> None:
        self.training = mode
        self.module.train(mode)

    def __call__(self, **inputs):
        return self.module(**inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def actor(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), request.param)
    return PlainEngine(AutoModelForCausalLM.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)


def prompt_batch(tokenizer, texts: list[str]) -> PromptBatch:
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    keys = torch.tensor([hash(tuple(tokenizer(text)["input_ids"])) for text in texts])
    zeros = torch.zeros(len(texts), dtype=torch.long)
    return PromptBatch(batch["input_ids"], batch["attention_mask"], keys, rows=zeros, samples=zeros)


TEXTS = ["Count", "\n\nHuman: Count to nine, please.\n\nAssistant:", "\n\nHuman: Is it?\n\nAssistant:"]


def answers(rollout: RolloutBatch) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.answers, rollout.answer_mask, strict=True)]


def test_mask_reaches_the_first_end_token_and_no_further():
    tokens = torch.tensor([[5, END, 6, END], [END, 5, 5, 5], [5, 6, 7, 8]])
    assert mask_up_to_first_end(tokens, (END,)).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_any_end_token_ends_an_answer(tmp_path, capsys):
    """The padding token is one of them, as in Qwen's generation_config.json."""
    folder = save_tiny_model(tmp_path)
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = prompt_batch(tokenizer, TEXTS * 4)

    def sampled() -> RolloutBatch:
        rollout = Rollout(engine, tokenizer, RolloutArguments(max_answer_seq_len=40), seed=3)
        with rollout.phase():
            return rollout.generate(prompts, ppo_step=1)

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
    rollout = Rollout(engine, tokenizer, RolloutArguments(max_answer_seq_len=10), seed=3)
    with rollout.phase():
        together = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        alone = [rollout.generate(prompt_batch(tokenizer, [text]), ppo_step=1) for text in reversed(TEXTS)]
        next_step = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=2)
    assert answers(together) == [answers(one)[0] for one in reversed(alone)]
    assert answers(together) != answers(next_step)


def test_rescoring_finds_the_tokens_that_greedy_decoding_chose(actor):
    engine, tokenizer = actor
    rollout = Rollout(engine, tokenizer, RolloutArguments(max_answer_seq_len=12, temperature=1e-6), seed=0)
    with rollout.phase():
        batch = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=0)
        likeliest = logits_of(engine, batch.tokens, num_tokens=len(tokenizer)).argmax(dim=-1)
    assert torch.equal(likeliest[batch.answer_mask], batch.answers[batch.answer_mask])


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.8}])
def test_recorded_log_probabilities_are_those_of_the_whole_softmax_of_each_row_alone(actor, filters):
    engine, tokenizer = actor
    args = RolloutArguments(max_answer_seq_len=10, temperature=0.7, **filters)
    prompts = prompt_batch(tokenizer, TEXTS)
    rollout = Rollout(engine, tokenizer, args, seed=3, records_logprobs=True)
    with rollout.phase():
        batch = rollout.generate(prompts, ppo_step=1)
        for row, answer in enumerate(answers(batch)):
            prompt = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
            logits = engine.module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
            torch.testing.assert_close(batch.logprobs[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)
            assert not batch.logprobs[row, len(answer) :].any()


def test_without_a_cache_answers_and_log_probabilities_are_the_same(actor):
    engine, tokenizer = actor
    rollout = Rollout(
        engine, tokenizer, RolloutArguments(max_answer_seq_len=8), seed=3, records_logprobs=True
    )
    uses_cache = []
    handle = engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: uses_cache.append(kwargs["use_cache"]), with_kwargs=True
    )
    with rollout.phase():
        cached = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        rollout.uses_cache = False
        uncached = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)
    handle.remove()
    assert uses_cache == [True] * 8 + [False] * 8
    assert answers(uncached) == answers(cached)
    torch.testing.assert_close(uncached.logprobs, cached.logprobs, atol=1e-5, rtol=1e-5)


def test_rows_that_pad_the_vocabulary_are_neither_sampled_nor_scored(tmp_path):
    folder = save_tiny_model(tmp_path, "llama", vocab_size=5000)  # the tokenizer has some 370 tokens
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rollout = Rollout(engine, tokenizer, RolloutArguments(max_answer_seq_len=10), seed=3)
    with rollout.phase():
        batch = rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)
        assert int(batch.answers.max()) < len(tokenizer)
        assert logits_of(engine, batch.tokens, num_tokens=len(tokenizer)).shape[-1] == len(tokenizer)


def test_settings_for_chatting_do_not_change_the_samples_and_come_back_afterwards(actor):
    engine, tokenizer = actor
    args = RolloutArguments(max_answer_seq_len=10)
    plain = Rollout(engine, tokenizer, args, seed=3)
    with plain.phase():
        expected = plain.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)
    own = engine.module.generation_config
    chatty = GenerationConfig.from_dict({**own.to_dict(), "repetition_penalty": 50.0, "min_new_tokens": 9})
    engine.module.generation_config = chatty
    try:
        rollout = Rollout(engine, tokenizer, args, seed=3)
        with rollout.phase():
            assert answers(rollout.generate(prompt_batch(tokenizer, TEXTS), ppo_step=1)) == answers(expected)
        assert engine.module.generation_config is chatty
    finally:
        engine.module.generation_config = own


def test_a_phase_is_in_eval_mode_and_leaves_the_mode_as_it_was(actor):
    engine, tokenizer = actor
    engine.train()
    with Rollout(engine, tokenizer, RolloutArguments(), seed=0).phase():
        assert not engine.module.training
    assert engine.module.training


@pytest.fixture
def two_rows() -> RolloutBatch:
    # prompts "7 8" and "9", answers "5 END" and "6 6 6" (cut at the limit)
    return RolloutBatch(
        input_ids=torch.tensor([[7, 8, 5, END, PAD], [PAD, 9, 6, 6, 6]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
        answer_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
        ended=torch.tensor([True, False]),
        prompt_rows=torch.tensor([5, 3]),
        prompt_length=2,
        logprobs=torch.tensor([[-1.0, -2, 0], [-3, -4, -5]]),
    )


def test_positions_count_real_tokens_only(two_rows):
    assert two_rows.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3]]


def test_selected_rows_lose_the_columns_that_are_padding_in_all_of_them(two_rows):
    second = two_rows.rows(torch.tensor([1]))
    assert (second.input_ids.tolist(), second.prompt_length) == ([[9, 6, 6, 6]], 1)
    first = two_rows.rows(torch.tensor([0]))
    assert first.input_ids.tolist() == [[7, 8, 5, END]]
    assert first.answer_mask.tolist() == [[True, True]]
    assert first.logprobs.tolist() == [[-1, -2]]


def test_padding_and_selecting_give_the_rows_back(two_rows):
    wide = two_rows.padded(6, 9, PAD)
    assert wide.input_ids.shape == (2, 15)
    back = wide.rows(torch.tensor([0, 1]))
    for column in ("input_ids", "attention_mask", "answer_mask", "ended", "logprobs"):
        assert torch.equal(getattr(back, column), getattr(two_rows, column))


def test_batches_of_different_widths_are_gathered_in_order(two_rows):
    narrow = two_rows.rows(torch.tensor([1]))
    together = gather_rollouts([narrow, two_rows], PAD)
    assert together.input_ids.tolist() == [[PAD, 9, 6, 6, 6], [7, 8, 5, END, PAD], [PAD, 9, 6, 6, 6]]
    assert together.answer_lengths.tolist() == [3, 2, 3]
    assert together.ended.tolist() == [False, True, False]
    assert together.logprobs.tolist() == [[-3, -4, -5], [-1, -2, 0], [-3, -4, -5]]
    unrecorded = replace(two_rows, logprobs=None)
    assert gather_rollouts([unrecorded], PAD).rows(torch.tensor([0])).logprobs is None


def test_an_answer_of_one_token_is_a_row_like_any_other(two_rows):
    short = replace(two_rows, answer_mask=torch.tensor([[1, 0, 0], [0, 0, 0]]).bool())
    assert short.rows(torch.tensor([0, 1])).answer_mask.tolist() == [[True], [False]]
