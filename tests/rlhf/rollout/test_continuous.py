import pytest
import torch
import transformers
from packaging.version import Version
from rollout_helpers import TEXTS, PlainEngine, answers, prompt_batch
from tiny import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat.errors import UserError
from dschat.models.attention import MEASURED
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.continuous import PAGE, ContinuousBatching
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate

# In transformers 5.24 GPT-J knows of pages, and GPT-NeoX no longer passes them where they write.
SINCE_5_24 = Version(transformers.__version__) >= Version("5.24")
CANNOT = ("gpt_neox" if SINCE_5_24 else "gptj", "bloom", "falcon", "falcon_alibi")


def actor_of(folder, family: str, *, ends=(0, *range(20, 60))):
    save_tiny_model(folder, family)
    engine = PlainEngine(AutoModelForCausalLM.from_pretrained(folder))
    engine.module.generation_config.eos_token_id = [*ends]  # answers of all lengths
    return engine, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CANNOT])
def test_answers_and_log_probabilities_are_those_of_generate(family, tmp_path):
    engine, tokenizer = actor_of(tmp_path, family)
    plain = HuggingFaceGenerate(engine, tokenizer)
    ours = ContinuousBatching(plain)
    ours.check(longest=80)
    prompts = prompt_batch(tokenizer, [*TEXTS, TEXTS[1], TEXTS[0], TEXTS[1]])
    for options in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"greedy": True}):
        sampling = Sampling(max_answer_length=24, seed=3, with_logprobs=True, **options)
        with plain.session():
            expected = plain.generate(prompts, sampling)
        with ours.session():
            found = ours.generate(prompts, sampling)
        assert answers(found) == answers(expected)
        assert torch.equal(found.ended, expected.ended)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)
    if family == "llama":
        assert found.ended.any()
        assert len(set(found.answer_lengths.tolist())) > 1


@pytest.mark.parametrize("family", CANNOT)
def test_architectures_without_paged_attention_are_refused_at_the_start(family, tmp_path, capfd):
    engine, tokenizer = actor_of(tmp_path, family)
    ours = ContinuousBatching(HuggingFaceGenerate(engine, tokenizer))
    with pytest.raises(
        UserError, match=f"the model of type '{family.removesuffix('_alibi')}' does not predict"
    ):
        ours.check(longest=80)
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return actor_of(tmp_path_factory.mktemp("llama"), "llama")


def both(llama, prompts, sampling):
    plain = HuggingFaceGenerate(*llama)
    ours = ContinuousBatching(plain)
    with ours.session():
        return ours.generate(prompts, sampling), plain.generate(prompts, sampling)


def assert_same(found, expected) -> None:
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)


SAMPLING = Sampling(max_answer_length=40, seed=3, with_logprobs=True)


def test_no_key_or_value_outlives_a_change_of_the_weights(llama, tmp_path):
    """Prompts of more than one page, so that they are such as managers keep the pages of."""
    engine, tokenizer = actor_of(tmp_path, "llama")
    plain = HuggingFaceGenerate(engine, tokenizer)
    ours = ContinuousBatching(plain)
    prompts = prompt_batch(tokenizer, [TEXTS[1] * 3, TEXTS[1] * 4, TEXTS[1] * 3])
    assert int(prompts.attention_mask.sum(dim=1).min()) > PAGE
    seen = []
    for _ in range(2):
        with ours.session():
            seen.append(ours.generate(prompts, SAMPLING))
            assert_same(seen[-1], plain.generate(prompts, SAMPLING))
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 20)
    assert answers(seen[0]) != answers(seen[1])
    assert not hasattr(engine.module, "_cached_continuous_batching_manager")


def test_a_prompt_that_is_read_in_several_passes_gets_the_same_answer(llama, monkeypatch):
    monkeypatch.setattr("dschat.rlhf.rollout.continuous.MOST_TOKENS_PER_PASS", 16)
    _, tokenizer = llama
    prompts = prompt_batch(tokenizer, [*TEXTS, TEXTS[1] * 3])
    lengths = prompts.attention_mask.sum(dim=1)
    assert lengths.min() < 16 < lengths.max()
    assert_same(*both(llama, prompts, SAMPLING))


def test_an_answer_does_not_depend_on_its_batch(llama):
    _, tokenizer = llama
    together, _ = both(llama, prompt_batch(tokenizer, TEXTS), SAMPLING)
    alone = [both(llama, prompt_batch(tokenizer, [text]), SAMPLING)[0] for text in TEXTS]
    assert answers(together) == [answers(one)[0] for one in alone]


def test_rows_of_the_vocabulary_that_no_token_has_are_not_sampled(tmp_path):
    save_tiny_model(tmp_path, "llama", vocab_size=5000)  # the tokenizer has some 370 tokens
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    actor = PlainEngine(AutoModelForCausalLM.from_pretrained(tmp_path)), tokenizer
    found, expected = both(actor, prompt_batch(tokenizer, TEXTS), SAMPLING)
    assert int(found.answers.max()) < len(tokenizer)
    assert_same(found, expected)


def test_generating_leaves_attention_generators_mode_and_settings_as_they_were(llama):
    engine, tokenizer = llama
    model = engine.module
    own = model.config._attn_implementation
    model.config._attn_implementation = MEASURED
    try:
        engine.train()
        settings, state = model.generation_config, torch.get_rng_state()
        found, expected = both(llama, prompt_batch(tokenizer, TEXTS), SAMPLING)
        assert_same(found, expected)
        assert model.config._attn_implementation == MEASURED
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert model.generation_config is settings
    finally:
        model.config._attn_implementation = own


def test_without_a_cache_generate_answers_without_one(llama):
    _, tokenizer = llama
    plain = HuggingFaceGenerate(*llama)
    ours = ContinuousBatching(plain)
    prompts, sampling = prompt_batch(tokenizer, TEXTS), Sampling(max_answer_length=6, seed=3)
    with ours.session():
        cached = ours.generate(prompts, sampling)
        ours.uses_cache = False
        assert answers(ours.generate(prompts, sampling)) == answers(cached)
    assert not plain.uses_cache
    assert cached.logprobs is None


def test_windows_and_weights_that_are_gathered_by_layer_are_refused(tmp_path):
    engine, tokenizer = actor_of(tmp_path, "mistral")
    plain = HuggingFaceGenerate(engine, tokenizer)
    with pytest.raises(UserError, match="attends to the last 256 tokens alone, and rows have up to 300"):
        ContinuousBatching(plain).check(longest=300)
    plain.keeps_in_step = True
    with pytest.raises(UserError, match="give --rollout_gather always"):
        ContinuousBatching(plain).check(longest=80)


def test_an_error_of_transformers_ends_the_run_with_a_message(llama, monkeypatch):
    engine, tokenizer = llama
    ours = ContinuousBatching(HuggingFaceGenerate(engine, tokenizer))

    def fails(**_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(engine.module, "forward", fails)
    with ours.session(), pytest.raises(UserError, match="ended with 'no such luck'; use --rollout_backend"):
        ours.generate(prompt_batch(tokenizer, TEXTS), SAMPLING)
    assert engine.module.config._attn_implementation == "sdpa"
