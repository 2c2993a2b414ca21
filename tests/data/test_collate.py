import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from dschat.data.collate import collate_pairs, collate_prompts, collate_sft, collate_text

PAD = 9


def tokens(*rows):
    return pa.array(rows, type=pa.list_(pa.int32()))


def targets(batch):
    """The labels that count, each in the column of its token. [B, L]"""
    return batch.tokens.in_rows(torch.ones_like(batch.tokens.labels)).bool()


def test_sft_rows_are_padded_on_the_right_and_only_their_last_tokens_are_targets():
    rows = pa.table(
        {"input_ids": tokens([1, 2, 3, 4], [5, 9]), "loss_mask": [[False, False, True, True], [False, True]]}
    )
    batch = collate_sft(rows, 3, 3.0, pad_id=PAD)
    assert batch.tokens.input_ids.tolist() == [[1, 2, 3, 4], [5, 9, PAD, PAD], [PAD] * 4]
    # The second row's 9 is its own token, not padding; the third row is a filler.
    assert batch.tokens.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert targets(batch).int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.denominator == 3.0
    assert (batch.tokens.input_ids.dtype, batch.tokens.label_mask.dtype) == (torch.int64, torch.bool)


def test_labels_begin_with_the_first_column_that_has_a_target():
    flags = [[False, False, False, True], [False, False, True]]
    rows = pa.table({"input_ids": tokens([1, 2, 3, 4], [5, 6, 7]), "loss_mask": flags})
    batch = collate_sft(rows, 2, 2.0, pad_id=PAD).tokens
    assert batch.labels.tolist() == [[3, 4], [7, PAD]]
    assert batch.label_mask.tolist() == [[False, True], [True, False]]
    assert batch.first_output == 1  # where the models have read 1 2 and 5 6


def test_a_block_of_text_is_read_but_for_its_last_token_which_is_a_label_only():
    batch = collate_text(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int32))
    assert batch.input_ids.tolist() == [[1, 2], [4, 5]]
    assert batch.labels.tolist() == [[2, 3], [5, 6]]
    assert batch.label_mask.all()
    assert batch.first_output == 0
    assert batch.attention_mask is None


def test_pairs_are_all_chosen_rows_and_then_all_rejected_ones():
    rows = pa.table(
        {
            "chosen_ids": tokens([1, 2, 3], [1, 4]),
            "rejected_ids": tokens([1, 5], [1, 6, 7, 8]),
            "prompt_length": pa.array([1, 0], pa.int32()),
            "weight": pa.array([1.0, 0.5], pa.float32()),
            "group": pa.array([4, 0], pa.int32()),
            "margin": pa.array([0.0, 2.0], pa.float32()),
        }
    )
    batch = collate_pairs(rows, 3, 2.0, pad_id=PAD)
    expected = [[1, 2, 3, 9], [1, 4, 9, 9], [9, 9, 9, 9], [1, 5, 9, 9], [1, 6, 7, 8], [9, 9, 9, 9]]
    assert batch.tokens.input_ids.tolist() == expected
    assert batch.tokens.attention_mask.sum(1).tolist() == [3, 2, 1, 2, 4, 1]
    assert batch.pair_mask.tolist() == [1.0, 1.0, 0.0]
    assert batch.weights.tolist() == [1.0, 0.5, 0.0]
    assert batch.groups.tolist() == [4, 0, -1]
    assert batch.margins.tolist() == [0.0, 2.0, 0.0]
    answers = [[0, 1, 1, 0], [0, 1, 0, 0], [0] * 4, [0, 1, 0, 0], [0, 1, 1, 1], [0] * 4]
    assert targets(batch).int().tolist() == answers, "not on a first token, nor on a filler"
    assert batch.ref_logprobs is None


def test_pairs_carry_the_reference_models_logprobs_where_the_rows_have_them():
    numbers = pa.array([0.5, 1.5], pa.float32())
    columns = {"chosen_ids": tokens([1, 2], [3, 4]), "rejected_ids": tokens([1, 5], [3, 6])}
    columns |= {"prompt_length": pa.array([1, 1], pa.int32()), "weight": numbers, "margin": numbers}
    columns |= {"group": pa.array([0, 1], pa.int32())}
    columns |= {"chosen_ref_logprob": numbers, "rejected_ref_logprob": pa.array([-2.0, -3.0], pa.float32())}
    batch = collate_pairs(pa.table(columns), 3, 1.0, pad_id=PAD).to("cpu")
    assert batch.ref_logprobs.tolist() == [0.5, 1.5, 0.0, -2.0, -3.0, 0.0]


def test_prompts_are_padded_on_the_left_and_carry_keys_and_samples():
    rows = pa.table({"input_ids": tokens([1, 2], [3, 4, 5]), "key": pa.array([-(2**63), 2**63 - 1])})
    batch = collate_prompts(rows, 3, pad_id=PAD, numbers=np.array([7, 8]), samples=np.array([0, 4]))
    assert batch.input_ids.tolist() == [[PAD, 1, 2], [3, 4, 5], [PAD] * 3]
    assert batch.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert batch.keys.tolist() == [-(2**63), 2**63 - 1, 0]
    assert batch.rows.tolist() == [7, 8, -1]
    assert batch.samples.tolist() == [0, 4, -1]


def test_a_batch_without_rows_is_all_fillers():
    rows = pa.table({"input_ids": tokens(), "loss_mask": pa.array([], pa.list_(pa.bool_()))})
    batch = collate_sft(rows, 2, 1.0, pad_id=PAD)
    assert batch.tokens.input_ids.tolist() == [[PAD], [PAD]]
    assert batch.tokens.attention_mask.tolist() == [[1], [1]]
    assert batch.tokens.labels.shape == batch.tokens.label_mask.shape == (2, 0)


def test_rows_taken_from_the_middle_of_a_table_keep_their_tokens():
    rows = pa.table(
        {"input_ids": tokens([1], [2, 3], [4, 5, 6]), "loss_mask": [[True], [False, True], [True] * 3]}
    ).slice(1, 2)
    batch = collate_sft(rows, 2, 1.0, pad_id=PAD)
    assert batch.tokens.input_ids.tolist() == [[2, 3, PAD], [4, 5, 6]]
    # Nothing predicts a row's first token, so it is no target whatever its flag says.
    assert targets(batch).tolist() == [[False, True, False], [False, True, True]]


def test_to_moves_every_tensor_and_keeps_numbers():
    rows = pa.table({"input_ids": tokens([1, 2]), "loss_mask": [[False, True]]})
    moved = collate_sft(rows, 1, 5.0, pad_id=PAD).to("meta")
    parts = vars(moved.tokens).values()
    assert [part.device.type for part in parts if isinstance(part, torch.Tensor)] == ["meta"] * 4
    assert moved.denominator == 5.0


# The padding token stands among the tokens, too: no mask may be guessed from it.
ROWS = st.lists(st.lists(st.integers(0, PAD), min_size=1, max_size=9), max_size=5)


def unpadded(ids, mask):
    return [row[marked.bool()].tolist() for row, marked in zip(ids, mask, strict=True)]


@given(rows=ROWS, num_fillers=st.integers(0, 3), data=st.data())
def test_collated_sft_rows_are_all_there_and_fillers_count_for_nothing(rows, num_fillers, data):
    num_rows = max(len(rows) + num_fillers, 1)
    flags = [data.draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in rows]
    table = pa.table({"input_ids": tokens(*rows), "loss_mask": pa.array(flags, pa.list_(pa.bool_()))})
    batch = collate_sft(table, num_rows, 1.0, pad_id=PAD)
    mask = batch.tokens.attention_mask
    assert unpadded(batch.tokens.input_ids, mask) == rows + [[PAD]] * (num_rows - len(rows))
    assert batch.tokens.input_ids.shape == (num_rows, max(map(len, rows), default=1))
    expected = [[False, *of_row[1:]] for of_row in flags]  # nothing predicts a row's first token
    assert unpadded(targets(batch), mask)[: len(rows)] == expected
    assert int(batch.tokens.label_mask.sum()) == sum(map(sum, expected))
    assert not (targets(batch) & ~mask.bool()).any()
    steps = mask.diff(dim=1)
    assert (steps <= 0).all()  # padding only on the right


@given(rows=st.lists(st.tuples(*[st.lists(st.integers(0, PAD), min_size=1, max_size=9)] * 2), max_size=5))
def test_collated_pairs_stand_in_two_halves_of_one_width(rows):
    num_rows = len(rows) + 1
    chosen, rejected = [one for one, _ in rows], [other for _, other in rows]
    numbers = pa.array([number + 0.5 for number in range(len(rows))], pa.float32())
    table = pa.table(
        {
            "chosen_ids": tokens(*chosen),
            "rejected_ids": tokens(*rejected),
            "prompt_length": pa.array([1] * len(rows), pa.int32()),
            "weight": numbers,
            "group": pa.array(range(len(rows)), pa.int32()),
            "margin": numbers,
        }
    )
    batch = collate_pairs(table, num_rows, 1.0, pad_id=PAD)
    ids, mask = batch.tokens.input_ids, batch.tokens.attention_mask
    assert unpadded(ids, mask) == [*chosen, [PAD], *rejected, [PAD]]
    expected = [number + 0.5 for number in range(len(rows))] + [0.0]
    assert batch.weights.tolist() == batch.margins.tolist() == expected
    assert batch.pair_mask.tolist() == [1.0] * len(rows) + [0.0]


@given(rows=ROWS, num_fillers=st.integers(0, 3))
def test_collated_prompts_end_in_the_last_column(rows, num_fillers):
    num_rows = max(len(rows) + num_fillers, 1)
    table = pa.table({"input_ids": tokens(*rows), "key": pa.array(range(len(rows)), pa.int64())})
    batch = collate_prompts(table, num_rows, pad_id=PAD, numbers=np.arange(len(rows)))
    assert unpadded(batch.input_ids, batch.attention_mask) == rows + [[PAD]] * (num_rows - len(rows))
    assert batch.attention_mask[:, -1].all()
    assert batch.input_ids[: len(rows), -1].tolist() == [row[-1] for row in rows]
    assert (batch.attention_mask.diff(dim=1) >= 0).all()
    assert batch.rows.tolist() == [*range(len(rows)), *[-1] * (num_rows - len(rows))]


def test_prompts_are_as_wide_as_the_next_multiple():
    rows = pa.table({"input_ids": tokens([1, 2, 3], [4]), "key": [5, 6]})
    batch = collate_prompts(rows, 2, pad_id=PAD, multiple_of=4)
    assert batch.input_ids.tolist() == [[PAD, 1, 2, 3], [PAD, PAD, PAD, 4]]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 1]
