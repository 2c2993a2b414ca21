import pytest
import torch

from dschat.data.token_batch import TokenBatch

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])


def test_the_output_at_the_last_prompt_token_predicts_the_first_of_the_answer():
    # columns 0 1 2 are the prompts, 3 4 5 the answers, predicted at 2 3 4
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = TokenBatch.of(TOKENS, mask)
    assert batch.input_ids is TOKENS
    assert batch.labels.tolist() == [[4, 5, 6], [10, 11, 12]]
    assert batch.label_mask.tolist() == mask.tolist()
    assert torch.arange(6)[batch.outputs].tolist() == [2, 3, 4]


def test_of_a_mask_of_whole_rows_the_first_column_is_left_out():
    batch = TokenBatch.of(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    assert batch.labels.tolist() == TOKENS[:, 1:].tolist()
    assert batch.label_mask.shape == (2, 5)
    assert torch.arange(6)[batch.outputs].tolist() == [0, 1, 2, 3, 4]


def test_a_last_token_that_is_not_read_is_a_label():
    batch = TokenBatch.of(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), reads_last=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert batch.labels[:, -1].tolist() == [6, 12]
    assert torch.arange(5)[batch.outputs].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError):
        batch.in_rows(batch.labels)


def test_rows_of_one_token_have_no_labels():
    batch = TokenBatch.of(TOKENS[:, :1], torch.zeros(2, 1, dtype=torch.bool))
    assert batch.labels.shape == batch.label_mask.shape == (2, 0)
    assert batch.outputs == slice(0, 0)
    assert batch.in_rows(torch.zeros(2, 0)).tolist() == [[0], [0]]


def test_numbers_of_labels_go_to_the_columns_of_their_tokens():
    batch = TokenBatch.of(TOKENS, torch.tensor([[True, True], [True, False]]))
    numbers = torch.tensor([[0.5, 0.25], [2.0, float("nan")]])
    assert batch.in_rows(numbers).tolist() == [[0, 0, 0, 0, 0.5, 0.25], [0, 0, 0, 0, 2, 0]]


def test_a_batch_moves_as_a_whole():
    mask = torch.ones_like(TOKENS)
    batch = TokenBatch.of(TOKENS, mask.bool(), attention_mask=mask).to("meta")
    assert {part.device.type for part in vars(batch).values() if isinstance(part, torch.Tensor)} == {"meta"}
    assert batch.position_ids is None
    assert batch.first_output == 0
