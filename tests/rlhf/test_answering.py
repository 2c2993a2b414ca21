"""Answers of a model alone. What a comparison makes of them is in tests/scripts/test_compare.py."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.arguments import RolloutArguments
from dschat.data.comparisons import Prompt
from dschat.errors import UserError
from dschat.rlhf.answering import Answers, answer, check_vocabularies, load, log_likelihoods
from dschat.rlhf.rollout.batch import RolloutBatch

PROMPTS: list[Prompt] = ["Name a tea, please.", "Why?", "Why?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "a")


def settings(batch_size: int) -> RolloutArguments:
    return RolloutArguments(max_answer_seq_len=5, per_device_generation_batch_size=batch_size)


def test_answers_stand_in_the_order_of_the_prompts_whatever_their_batches(folder):
    model = load(str(folder), "--model")
    together, apart = (answer(model, PROMPTS, settings(size), seed=3) for size in (3, 2))
    assert together.texts == apart.texts
    assert [len(batch.input_ids) for batch in apart.batches] == [2, 1]  # the two shortest prompts first
    assert together.texts[1] != together.texts[2]  # equal prompts are sampled apart


def test_figures_are_means_over_the_answers_of_all_batches():
    def batch(answer_mask, ended):
        mask = torch.tensor(answer_mask).bool()
        ids = torch.arange(mask.numel() + len(mask)).view(len(mask), -1)
        attention = torch.cat([torch.ones(len(mask), 1).bool(), mask], dim=1).long()
        rows = torch.arange(len(mask))
        return RolloutBatch(ids, attention, mask, torch.tensor(ended), rows, prompt_length=1)

    answers = Answers(["", "", ""], [batch([[1, 1], [1, 0]], [False, True]), batch([[1, 1, 1]], [True])])
    # Lengths 2, 1 and 3; two of three ended.
    assert answers.metrics == {"answer_length": 2.0, "eos_share": pytest.approx(2 / 3)}
    assert answers.token_ids == [[0, 1, 2], [3, 4], [0, 1, 2, 3]]


def test_a_log_likelihood_is_the_sum_over_the_answer_given_the_prompt(folder):
    model = load(str(folder), "--model")
    answers = answer(model, PROMPTS[:1], settings(1), seed=3)
    (ids,), (length,) = answers.token_ids, answers.batches[0].answer_lengths.tolist()
    with torch.no_grad():
        logprobs = model.module(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    expected = sum(logprobs[place - 1, ids[place]].item() for place in range(len(ids) - length, len(ids)))
    assert log_likelihoods(model, answers, temperature=1.0).item() == pytest.approx(expected, abs=1e-5)


def test_models_of_other_tokens_are_not_compared(folder, tmp_path):
    other = save_tiny_model(tmp_path / "b", tokenizer=tiny_tokenizer(["zebra zebra"]))
    models = {"a": load(str(folder), "--model"), "b": load(str(other), "--model")}
    check_vocabularies({"a": models["a"]}, "a")
    with pytest.raises(UserError, match="--reference a: the tokens of b are not those of a"):
        check_vocabularies(models, "a")


def test_a_folder_that_is_not_there_is_named_with_its_flag(tmp_path):
    with pytest.raises(UserError, match=r"--model .*there is no such folder"):
        load(str(tmp_path / "gone"), "--model")


def test_an_adapter_is_loaded_with_its_base(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7, 8]])
    model = load(str(tmp_path / "lora"), "--model")
    torch.testing.assert_close(model(input_ids=ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    settings_file = tmp_path / "lora" / "adapter_config.json"
    settings_file.write_text(settings_file.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    with pytest.raises(UserError, match="is an adapter of task_type SEQ_CLS; one of CAUSAL_LM is needed"):
        load(str(tmp_path / "lora"), "--model")
