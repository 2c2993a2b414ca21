"""Samples of a PPO step: rows of numbers and text, and a table."""

import math
from types import SimpleNamespace

import pytest
import torch

from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.samples import SHOWN_CHARACTERS, distributions, samples_of, samples_table

TOKENIZER = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids.tolist())))


@pytest.fixture
def experience() -> SimpleNamespace:
    """Two prompts, one padded, with an answer of 3 tokens and one of 1; 0 is padding."""
    rollout = RolloutBatch(
        input_ids=torch.tensor([[0, 5, 7, 8, 9], [4, 5, 7, 0, 0]]),
        attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        answer_mask=torch.tensor([[True, True, True], [True, False, False]]),
        ended=torch.tensor([True, False]),
        prompt_rows=torch.tensor([0, 1]),
        prompt_length=2,
    )
    ref = torch.zeros(2, 3)
    logprobs = torch.tensor([[0.5, -0.25, 1.0], [2.0, 9.0, 9.0]])  # 9: beyond the answer
    analysis = AnswerAnalysis(logprobs, ref, ref, None, torch.tensor([1.5, -2.0]))
    return SimpleNamespace(rollout=rollout, analysis=analysis)


def test_rows_have_text_without_padding_score_kl_and_length(experience):
    assert samples_of(experience, TOKENIZER) == [
        {"prompt": "5", "answer": "7 8 9", "score": 1.5, "kl": 1.25, "length": 3},
        {"prompt": "4 5", "answer": "7", "score": -2.0, "kl": 2.0, "length": 1},
    ]


def test_histograms_are_of_all_answers_and_of_their_tokens_alone(experience):
    arrays = {tag: values.tolist() for tag, values in distributions(experience).items()}
    assert arrays == {
        "rollout/scores": [1.5, -2.0],
        "rollout/answer_lengths": [3, 1],
        "actor/log_ratios": [0.5, -0.25, 1.0, 2.0],
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_is_as_wide_as_the_terminal_and_in_its_characters(encoding, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(encoding=encoding))
    long = "begins " + "x" * SHOWN_CHARACTERS + " ends"
    row = {"prompt": long, "answer": long, "score": math.nan, "kl": 12.345, "length": 7}
    table = samples_table(3, [row, row | {"prompt": "[red]", "answer": ":smile:"}])
    assert "answers of PPO step 3" in table
    assert {len(line) for line in table.splitlines()[1:]} == {100}
    assert table.isascii() == (encoding == "ascii")
    assert "nan" in table
    assert "12.3" in table
    assert "[red]" in table
    assert ":smile:" in table
    assert "begins" in table  # of the answer
    assert " ends" in table  # of the prompt
    assert "| ..." in table.replace("│", "|")  # before what is left of the prompt
