import pytest
import torch
from rollout_helpers import TEXTS, PlainEngine, answers, prompt_batch
from tiny import FAMILIES, save_tiny_model, with_moved_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.arguments import ModelArguments
from dschat.models.lora import add_lora
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.decode_modes import MODES
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.static_decoding import StaticDecoding, batch_size_of

OF_FP32_MODELS = [name for name, mode in MODES.items() if not mode.in_fp32 and not mode.is_graphed]
WITHOUT_READY_MASK = ("gptj", "bloom", "falcon", "falcon_alibi")


@pytest.fixture(scope="module", params=FAMILIES)
def actor(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("actor"), request.param)
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine.module.generation_config.eos_token_id = [0, *range(20, 60)]  # answers of all lengths
    return engine, tokenizer, request.param


def test_answers_and_log_probabilities_are_those_of_generate_in_every_mode(actor):
    engine, tokenizer, family = actor
    plain = HuggingFaceGenerate(engine, tokenizer)
    ours = StaticDecoding(plain, longest=80)
    prompts = prompt_batch(tokenizer, [*TEXTS, TEXTS[1], TEXTS[0], TEXTS[1]])
    for options in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"greedy": True}):
        sampling = Sampling(max_answer_length=24, seed=3, with_logprobs=True, **options)
        with plain.session():
            expected = plain.generate(prompts, sampling)
        with ours.session():
            modes = ours.modes()
            assert "model" in modes
            assert modes == OF_FP32_MODELS or family in WITHOUT_READY_MASK
            for ours.mode in modes:
                found = ours.generate(prompts, sampling)
                assert answers(found) == answers(expected)
                assert torch.equal(found.ended, expected.ended)
                torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)
    if family == "llama":
        lengths = expected.answer_lengths
        assert lengths.min() < lengths.max()  # so that rows have left the batch


def test_an_answer_does_not_depend_on_its_batch(actor):
    engine, tokenizer, _ = actor
    ours = StaticDecoding(HuggingFaceGenerate(engine, tokenizer), longest=80)
    sampling = Sampling(max_answer_length=12, seed=3)
    with ours.session():
        together = ours.generate(prompt_batch(tokenizer, TEXTS), sampling)
        alone = [ours.generate(prompt_batch(tokenizer, [text]), sampling) for text in TEXTS]
    assert answers(together) == [answers(one)[0] for one in alone]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return PlainEngine(model), AutoTokenizer.from_pretrained(folder)


def passes(engine) -> tuple[list[tuple[int, int]], object]:
    """The shapes of the ids that the model reads from now on, and what ends that."""
    shapes = []
    handle = engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes, handle


def test_a_prompt_is_read_once_and_rows_that_ended_leave_the_batch(llama):
    engine, tokenizer = llama
    plain = HuggingFaceGenerate(engine, tokenizer)
    plain.end_ids = (0, *range(2, 60))
    ours = StaticDecoding(plain, longest=80)
    prompts = prompt_batch(tokenizer, TEXTS * 8)
    with ours.session():
        ours.mode = "matmul"  # a traced pass has no hooks
        shapes, handle = passes(engine)
        rollout = ours.generate(prompts, Sampling(max_answer_length=24, seed=3))
    handle.remove()
    assert shapes[0] == (3, prompts.input_ids.shape[1])
    lengths = rollout.answer_lengths
    left = [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert [rows for rows, _ in shapes[1:]] == [batch_size_of(rows) for rows in left]
    assert left[0] > left[-1]


def test_without_a_cache_generate_answers_without_one(llama):
    engine, tokenizer = llama
    ours = StaticDecoding(HuggingFaceGenerate(engine, tokenizer), longest=80)
    sampling = Sampling(max_answer_length=6, seed=3)
    with ours.session():
        cached = ours.generate(prompt_batch(tokenizer, TEXTS), sampling)
        ours.uses_cache = False
        shapes, handle = passes(engine)
        uncached = ours.generate(prompt_batch(tokenizer, TEXTS), sampling)
    handle.remove()
    assert [columns for _, columns in shapes] == [shapes[0][1] + n for n in range(6)]
    assert answers(uncached) == answers(cached)


def test_generate_answers_for_architectures_that_agree_in_no_mode(llama, monkeypatch, capsys):
    engine, tokenizer = llama
    monkeypatch.setattr("dschat.rlhf.rollout.static_decoding.agreeing_modes", lambda *_, **__: [])
    ours = StaticDecoding(HuggingFaceGenerate(engine, tokenizer), longest=80)
    with ours.session():
        shapes, handle = passes(engine)
        ours.generate(prompt_batch(tokenizer, TEXTS), Sampling(max_answer_length=2, seed=3))
    handle.remove()
    assert len(shapes) == 2
    assert "static decoding does not agree with this architecture" in capsys.readouterr().out


def test_a_recorded_pass_has_the_adapters_of_the_day(tmp_path):
    folder = save_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_lora(model, ModelArguments(model_name_or_path=str(folder), lora_dim=4))
    plain = HuggingFaceGenerate(PlainEngine(model), AutoTokenizer.from_pretrained(folder))
    ours = StaticDecoding(plain, longest=80)
    prompts = prompt_batch(AutoTokenizer.from_pretrained(folder), TEXTS)
    sampling, answered = Sampling(max_answer_length=12, seed=3, with_logprobs=True), []
    for _ in range(2):
        with ours.session():
            assert ours.mode == "traced"
            found, expected = ours.generate(prompts, sampling), plain.generate(prompts, sampling)
        assert answers(found) == answers(expected)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)
        answered.append(found.logprobs)
        with_moved_adapters(model)
    assert not torch.equal(*answered)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_batches_have_few_sizes():
    sizes = [batch_size_of(rows) for rows in range(34)]
    assert sizes == [1, 1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, *[24] * 8, *[32] * 8, 48]
