"""End tokens are a set: every source of one, and every place that keeps it."""

import json

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.data.templates import PLAIN
from dschat.export.export import export_model
from dschat.models.end_tokens import end_token_ids, is_end
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)


def saved(folder, *, in_config=None, in_generation_config=None, template=None) -> str:
    """A model whose tokenizer ends with token 0, and its configurations with these."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template or PLAIN
    save_tiny_model(folder, "llama", tokenizer=tokenizer)
    for name, ids in (("config.json", in_config), ("generation_config.json", in_generation_config)):
        if ids is not None:
            values = json.loads((folder / name).read_text()) | {"eos_token_id": ids}
            (folder / name).write_text(json.dumps(values))
    return str(folder)


def ends_of(path: str) -> tuple[tuple[int, ...], int]:
    """The set, and the id of <|im_end|>."""
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    return end_token_ids(tokenizer, model), tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_tokenizers_comes_first_and_lists_count_as_they_stand(tmp_path):
    ends, _ = ends_of(saved(tmp_path, in_config=[9, 0], in_generation_config=[5, 9]))
    assert ends == (0, 5, 9)


def test_the_token_with_which_the_template_ends_a_turn_is_one(tmp_path):
    ends, im_end = ends_of(saved(tmp_path, template=CHATML))
    assert ends == (0, im_end)


def test_a_lone_id_of_an_ordinary_token_is_an_architectures_default(tmp_path):
    """LlamaConfig says 2 whatever the vocabulary; a special token is meant."""
    tokenizer = load_tokenizer(saved(tmp_path / "a", in_config=2, in_generation_config=2))
    assert not tokenizer.added_tokens_decoder.get(2)
    assert ends_of(tmp_path / "a")[0] == (0,)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends_of(saved(tmp_path / "b", in_config=im_end, in_generation_config=0))[0] == (0, im_end)


def test_ids_beyond_the_tokenizers_are_left_out(tmp_path):
    assert ends_of(saved(tmp_path, in_generation_config=[0, 5000, -1]))[0] == (0,)


def test_exports_of_all_steps_keep_them_all(tmp_path):
    path = saved(tmp_path / "base", in_config=0, in_generation_config=[5, 0], template=CHATML)
    tokenizer = load_tokenizer(path)
    expected = [0, tokenizer.convert_tokens_to_ids("<|im_end|>"), 5]
    export_model(create_hf_model(AutoModelForCausalLM, path, tokenizer), tokenizer, tmp_path / "sft")
    actor = create_hf_model(AutoModelForCausalLM, str(tmp_path / "sft"), tokenizer)
    export_model(actor, tokenizer, tmp_path / "actor")
    critic = create_critic_model(str(tmp_path / "sft"), tokenizer, None)
    export_model(critic, tokenizer, tmp_path / "reward")
    for folder in ("sft", "actor"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == expected
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert reward.config.eos_token_id == expected


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "bloom", "falcon", "gemma", "qwen3_moe"])
def test_every_familys_configuration_takes_a_list(family, tmp_path):
    save_tiny_model(tmp_path / "base", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.generation_config.eos_token_id = [0, 5]
    model.save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    export_model(
        create_hf_model(AutoModelForCausalLM, str(tmp_path / "base"), tokenizer), tokenizer, tmp_path
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == [0, 5]


def test_is_end_marks_each_of_them():
    assert is_end(torch.tensor([[5, 0], [3, 9]]), (0, 9)).tolist() == [[False, True], [False, True]]
