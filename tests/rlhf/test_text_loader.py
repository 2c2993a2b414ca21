"""The text beside PPO: how long its blocks are, how many meet, and what is refused."""

from pathlib import Path

import pytest
from tiny import save_tiny_model

from dschat.arguments import RolloutArguments, TextArguments
from dschat.errors import UserError
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.text_loader import build_text_loader


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """GPT-2 has learned 512 positions."""
    return save_tiny_model(tmp_path_factory.mktemp("text") / "gpt2", "gpt2")


def build(model: Path, *names: str, longest_answer: int = 12):
    return build_text_loader(
        TextArguments(unsupervised_dataset_name=list(names)),
        RolloutArguments(max_prompt_seq_len=20, max_answer_seq_len=longest_answer),
        load_tokenizer(str(model)),
        model_path=str(model),
        batch_size=2,
        accumulation_steps=3,
        seed=1,
        data_output_path=str(model.parent / "cache"),
    )


def save_text(model: Path, num_lines: int) -> str:
    path = model.parent / f"{num_lines}.txt"
    path.write_text("".join(f"{n} bottles of water on the wall.\n" for n in range(num_lines)))
    return str(path)


def test_without_the_flag_there_is_no_text(model):
    assert build(model) is None


def test_a_block_is_as_long_as_a_prompt_with_its_answer_and_as_many_meet_as_answers(model):
    loader = build(model, save_text(model, 100))
    step = next(iter(loader))
    # Blocks of 20 + 12 tokens, of which the first is not predicted.
    assert [tuple(batch.labels.shape) for batch in step.micro_batches] == [(2, 31)] * 3
    assert step.denominator == 2 * 3 * 31
    assert loader.num_targets == 2 * 3 * 31


def test_a_text_shorter_than_a_block_is_an_error(model):
    with pytest.raises(UserError, match="--unsupervised_dataset_name"):
        build(model, save_text(model, 1), longest_answer=400)


def test_a_block_beyond_the_positions_is_an_error(model):
    with pytest.raises(UserError, match=r"a block of text has 520 tokens .* 512 positions"):
        build(model, save_text(model, 100), longest_answer=500)
