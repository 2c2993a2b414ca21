from dataclasses import replace

import pytest
import torch

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout.batch import RolloutBatch, gather_rollouts, mask_up_to_first_end

END, PAD = 0, 1


def test_mask_reaches_the_first_end_token_and_no_further():
    tokens = torch.tensor([[5, END, 6, END], [END, 5, 5, 5], [5, 6, 7, 8]])
    assert mask_up_to_first_end(tokens, (END,)).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


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


def test_answers_are_kept_up_to_their_first_end_token():
    # The padding token ends answers too, as in Qwen's generation_config.json.
    prompts = PromptBatch(
        input_ids=torch.tensor([[7, 8], [PAD, 9]]),
        attention_mask=torch.tensor([[1, 1], [0, 1]]),
        keys=torch.zeros(2, dtype=torch.long),
        rows=torch.tensor([5, 3]),
        samples=torch.zeros(2, dtype=torch.long),
    )
    tokens, logprobs = torch.tensor([[4, END, 6], [6, 6, 6]]), torch.tensor([[-1.0, -2, 9], [-3, -4, -5]])
    rollout = RolloutBatch.of_answers(prompts, tokens, (END, PAD), PAD, logprobs)
    assert rollout.input_ids.tolist() == [[7, 8, 4, END, PAD], [PAD, 9, 6, 6, 6]]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert rollout.answer_mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.logprobs.tolist() == [[-1, -2, 0], [-3, -4, -5]]
    assert (rollout.prompt_rows.tolist(), rollout.prompt_length) == ([5, 3], 2)
    assert RolloutBatch.of_answers(prompts, tokens, (END,), PAD).logprobs is None
