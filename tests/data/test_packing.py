import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dschat.data.packing import Placement, RowLayout
from dschat.data.token_batch import TokenBatch


def batch_of(lengths: list[int], prompts: list[int], *, left: bool = False) -> TokenBatch:
    """Sequences whose tokens are numbered through, each with a prompt of so many tokens."""
    width = max(lengths)
    ids, mask, is_label = (np.zeros((len(lengths), width), dtype) for dtype in (np.int64, np.int64, bool))
    number = 100
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        first = width - length if left else 0
        ids[row, first : first + length] = np.arange(number, number + length)
        mask[row, first : first + length] = 1
        is_label[row, first + prompt : first + length] = True
        number += 100
    return TokenBatch.of(
        torch.from_numpy(ids), torch.from_numpy(is_label), attention_mask=torch.from_numpy(mask)
    )


def as_read(batch: TokenBatch) -> torch.Tensor:
    return batch.input_ids.flatten()[batch.placement.source]


def test_rows_are_as_wide_as_the_next_multiple():
    batch = batch_of([3, 5], [1, 2]).placed(RowLayout(4))
    # where there is no token, a row's first stands in for it
    assert as_read(batch).tolist() == [[100, 101, 102, *[100] * 5], [200, 201, 202, 203, 204, *[200] * 3]]
    # 101 102 and 202 203 204 are predicted one place before them, and three more outputs are asked for
    assert batch.placement.outputs.tolist() == [0, 1, 9, 10, 11, 0, 0, 0]
    assert batch.labels.flatten()[batch.placement.label_places].tolist() == [101, 102, 202, 203, 204]
    assert batch.placement.last_tokens.tolist() == [2, 12]
    assert batch.placement.position_ids is None


def test_no_row_is_wider_than_the_positions_that_a_model_learned():
    batch = batch_of([3, 5], [1, 2])
    assert batch.placed(RowLayout(4, limit=6)).placement.source.shape == (2, 6)
    assert batch.placed(RowLayout(4, limit=8)).placement.source.shape == (2, 8)


def test_padding_on_the_left_is_left_out():
    left, right = (batch_of([3, 5], [1, 2], left=left).placed(RowLayout(4)) for left in (True, False))
    assert as_read(left).tolist() == as_read(right).tolist()
    assert left.placement.outputs.tolist() == right.placement.outputs.tolist()
    read = [batch.labels.flatten()[batch.placement.label_places].tolist() for batch in (left, right)]
    assert read[0] == read[1]


def test_sequences_share_rows_the_longest_first():
    lengths = [100, 200, 50, 156, 6]
    batch = batch_of(lengths, [1] * 5).placed(RowLayout(32, "mask"))
    # 200 50 6 fill one row of 256, and 156 100 another
    assert batch.placement.source.shape == (2, 256)
    assert as_read(batch)[0].tolist() == [*range(200, 400), *range(300, 350), *range(500, 506)]
    assert batch.placement.position_ids[1].tolist() == [*range(156), *range(100)]
    assert batch.placement.segments[1].unique().tolist() == [0, 3]


def test_a_sequence_longer_than_a_packed_row_makes_the_rows_longer():
    batch = batch_of([300, 100, 190], [1] * 3).placed(RowLayout(32, "positions"))
    assert batch.placement.source.shape == (2, 320)  # 300, and 190 with 100
    assert batch.placement.segments is None


def test_the_places_of_all_rows_are_counted():
    lengths = np.array([200, 50, 40, 30])  # 200 50 | 40 30 where they share rows
    assert RowLayout(16).num_places(lengths) == 4 * 208
    assert RowLayout(16, separated_by="mask").num_places(lengths) == 2 * 256
    assert RowLayout(16).tokens_per_sequence([lengths, lengths[1:]]) == (4 * 208 + 3 * 64) / 7
    assert RowLayout(16, separated_by="positions", in_one_row=True).num_places(lengths) == 320


def test_one_row_holds_all_sequences_in_their_order():
    batch = batch_of([3, 5, 4], [1] * 3).placed(RowLayout(16, "positions", in_one_row=True))
    assert as_read(batch).tolist() == [[*range(100, 103), *range(200, 205), *range(300, 304), *[100] * 4]]
    assert batch.placement.position_ids.tolist() == [[*range(3), *range(5), *range(4), *[0] * 4]]
    for multiple_of, padding in ((16, [4]), (4, [])):
        batch = batch.placed(RowLayout(multiple_of, "mask", in_one_row=True))
        assert batch.placement.lengths().tolist() == [[[[3, 5, 4, *padding]]]]


def test_a_token_sees_those_before_it_in_its_own_sequence():
    batch = batch_of([2, 1], [1, 0]).placed(RowLayout(4, "mask", in_one_row=True))
    mask = batch.placement.mask(torch.bfloat16)
    assert (mask.dtype, mask.shape) == (torch.bfloat16, (1, 1, 4, 4))
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert (
        mask.min() == torch.finfo(torch.bfloat16).min
    )  # minus infinity would give padding no weights at all


def test_a_batch_without_a_label_that_counts_still_has_an_output():
    batch = batch_of([1, 1], [1, 1]).placed(RowLayout(4))
    assert batch.labels.shape == (2, 0)
    assert batch.placement.outputs.tolist() == [0, 0, 0, 0]
    assert batch.placement.label_places.tolist() == []
    fillers = TokenBatch.of(torch.ones(2, 3).long(), torch.zeros(2, 2).bool()).placed(RowLayout())
    assert fillers.placement.outputs.tolist() == [0]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)), min_size=1, max_size=9),
    st.sampled_from(
        [RowLayout(), RowLayout(8), RowLayout(8, "mask"), RowLayout(4, "positions", in_one_row=True)]
    ),
    st.booleans(),
)
def test_every_token_stands_once_and_every_label_after_the_output_that_predicts_it(sequences, layout, left):
    lengths = [length for length, _ in sequences]
    batch = batch_of(lengths, [max(1, min(prompt, length)) for length, prompt in sequences], left=left)
    batch = batch.placed(layout)
    placement, read = batch.placement, as_read(batch).flatten()
    assert placement.source.shape[1] % layout.multiple_of == 0
    assert sorted(set(read.tolist())) == sorted(batch.input_ids[batch.attention_mask.bool()].tolist())
    assert read[placement.last_tokens].tolist() == [100 * (i + 1) + n - 1 for i, n in enumerate(lengths)]
    if not batch.label_mask.any():
        return
    labels = batch.labels.flatten()[placement.label_places]
    assert labels.tolist() == batch.labels[batch.label_mask].tolist()
    assert torch.equal(read[placement.outputs[: len(labels)]] + 1, labels)  # tokens are numbered through
    numbers = torch.arange(len(labels)).float() + 1
    per_label = placement.per_label(numbers, batch.labels)
    assert torch.equal(per_label[batch.label_mask], numbers)
    assert not per_label[~batch.label_mask].any()


def test_a_placement_moves_with_its_batch():
    placement = batch_of([3, 5], [1, 2]).placed(RowLayout(4, "mask")).to("meta").placement
    assert isinstance(placement, Placement)
    tensors = [value for name, value in vars(placement).items() if name != "ends_here"]  # rows that are whole
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_the_parts_of_rows_have_every_token_label_and_end_once(size):
    is_token = np.arange(11) < np.array([[11], [6], [1]])
    label_mask = is_token[:, 3:]
    whole = Placement.of(is_token, label_mask, first_output=2, layout=RowLayout())
    parts = [whole.part(rank, size) for rank in range(size)]
    width = -(-11 // size)
    assert {part.source.shape for part in parts} == {(3, width)}
    assert torch.cat([part.source for part in parts], dim=1)[:, :11].equal(whole.source)
    assert torch.cat([part.position_ids for part in parts], dim=1)[0, :11].equal(torch.arange(11))
    assert max(int(part.position_ids.max()) for part in parts) == 10  # a model may have learned no more
    labels = torch.cat([part.label_places for part in parts])
    assert labels.sort().values.equal(torch.from_numpy(label_mask.ravel().nonzero()[0]))
    for part in parts:
        places = part.outputs[: len(part.label_places)]
        columns = part.position_ids.flatten()[places]
        assert columns.equal(part.label_places % 8 + 2)  # the output before the label's token
        assert (places // width).equal(part.label_places // 8)
        assert len(part.outputs) > 0
    ends = torch.stack([part.ends_here for part in parts])
    assert ends.sum(dim=0).tolist() == [1, 1, 1]
    for row, length in enumerate((11, 6, 1)):
        part = parts[int(ends[:, row].int().argmax())]
        assert part.last_tokens[row] // width == row
        assert part.position_ids.flatten()[part.last_tokens[row]] == length - 1
