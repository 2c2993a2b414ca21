"""How the rows of an optimiser step are divided by tokens."""

from functools import partial
from itertools import chain

import numpy as np
import pytest

from dschat.data.collate import collate_pairs, collate_sft
from dschat.data.loaders import TrainLoader, build_train_loader
from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import Rows
from dschat.data.token_budget import TokenBudget
from dschat.errors import UserError

LAYOUTS = {
    "padded": PADDED,
    "round": RowLayout(16),
    "packed": RowLayout(16, separated_by="mask"),
    "one row": RowLayout(16, separated_by="positions", in_one_row=True),
}
COLLATE = {"rows": collate_sft, "pairs": collate_pairs}
NUM_EXAMPLES = 90


def examples(kind: str) -> Rows:
    """Sequences of 2 to 400 tokens, most of them short; a sequence holds its example's number plus 1."""
    drawn = np.random.default_rng(0).gamma(1.0, 60.0, (NUM_EXAMPLES, 2)).astype(int).clip(2, 400)
    if kind == "rows":
        drawn = drawn[:, :1]
    ids = [[[number + 1] * length for length in row] for number, row in enumerate(drawn.tolist())]
    columns = {"length": drawn.max(axis=1)}
    if kind == "rows":
        masks = [[False] + [True] * (length - 1) for (length,) in drawn.tolist()]
        columns |= {"input_ids": [row[0] for row in ids], "loss_mask": masks, "num_targets": drawn[:, 0] - 1}
    else:
        columns |= {"chosen_ids": [row[0] for row in ids], "rejected_ids": [row[1] for row in ids]}
        columns |= {name: [1] * len(drawn) for name in ("prompt_length", "group")}
        columns |= {name: [1.0] * len(drawn) for name in ("weight", "margin")}
    return Rows.from_dict(columns)


def loader(kind: str, layout: RowLayout, rank: int, world_size: int, max_tokens: int) -> TrainLoader:
    """Steps of 24 examples over all ranks."""
    made = build_train_loader(
        examples(kind),
        partial(COLLATE[kind], pad_id=0, layout=layout),
        batch_size=12 // world_size,
        accumulation_steps=2,
        rank=rank,
        world_size=world_size,
        seed=1,
        max_tokens=max_tokens,
    )
    if made.budget is None:
        return made
    budget = TokenBudget(max_tokens, made.budget.lengths, layout)
    return TrainLoader(**{**made.__dict__, "budget": budget})


def steps_of(made: TrainLoader) -> list:
    return [step for step, _ in zip(made.steps_after(0), range(made.steps_per_epoch), strict=False)]


def numbers_in(step) -> list[int]:
    ids = chain.from_iterable(batch.tokens.input_ids[:, 0].tolist() for batch in step.micro_batches)
    return [number - 1 for number in ids if number]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", COLLATE)
def test_micro_batches_keep_the_budget_and_steps_their_rows(kind, layout, world_size):
    budget = 1000
    ranks = [steps_of(loader(kind, LAYOUTS[layout], rank, world_size, budget)) for rank in range(world_size)]
    plain = [steps_of(loader(kind, LAYOUTS[layout], rank, world_size, 0)) for rank in range(world_size)]
    for step, whole in zip(zip(*ranks, strict=True), zip(*plain, strict=True), strict=True):
        assert len({len(share.micro_batches) for share in step}) == 1
        assert {share.denominator for share in step} == {share.denominator for share in whole}
        for ours, theirs in zip(step, whole, strict=True):
            assert sorted(numbers_in(ours)) == sorted(numbers_in(theirs))
            places = [batch.tokens.placement.source.numel() for batch in ours.micro_batches]
            assert 0 < max(places) <= budget
    sizes = {batch.tokens.input_ids.shape[0] for share in ranks[0] for batch in share.micro_batches}
    assert len(sizes) > 1  # few long rows at once, or many short ones


def test_rows_of_known_lengths_are_divided_as_by_hand():
    lengths = np.array([[9], [8], [5], [4], [4], [2], [1]])
    # Rank 0 reads 9 | 5 4 1, of which the last three take 3 x 5 places, and rank 1 reads 8 4 | 2.
    parts = TokenBudget(16, lengths).divided(np.arange(7), 2)
    assert [[rows.tolist() for rows in share] for share in parts] == [[[0], [2, 4, 6]], [[1, 3], [5]]]
    # 8 | 4 on rank 0; rank 1 needs one micro-batch for 4 2 and gets an empty one.
    parts = TokenBudget(8, np.array([[8], [4], [4], [2]])).divided(np.arange(4), 2)
    assert [[rows.tolist() for rows in share] for share in parts] == [[[0], [2]], [[1, 3], []]]


def test_sequences_that_share_rows_fill_the_budget_better():
    lengths = np.array([[200], [50], [40], [30], [20], [10]])
    packed = TokenBudget(520, lengths, RowLayout(separated_by="mask"))
    assert [len(rows) for rows in packed.divided(np.arange(6), 1)[0]] == [6]
    assert [len(rows) for rows in TokenBudget(520, lengths).divided(np.arange(6), 1)[0]] == [2, 4]


def test_the_number_of_micro_batches_of_an_epoch_is_counted():
    made = loader("pairs", PADDED, 1, 3, 900)
    assert len(made) == len(list(made)) == sum(len(step.micro_batches) for step in steps_of(made))


def test_steps_of_a_later_epoch_and_of_a_resumed_run_are_the_same():
    made = loader("rows", LAYOUTS["packed"], 0, 1, 900)
    whole = [numbers_in(step) for step, _ in zip(made.steps_after(0), range(8), strict=False)]
    rest = [numbers_in(step) for step, _ in zip(made.steps_after(5), range(3), strict=False)]
    assert rest == whole[5:]


@pytest.mark.parametrize(("kind", "needed"), [("rows", 416), ("pairs", 832)])
def test_an_example_larger_than_the_budget_is_refused(kind, needed):
    lengths = np.array([[3, 401], [4, 5]])[:, -1 if kind == "rows" else 0 :]
    TokenBudget(needed, lengths).check(32)
    with pytest.raises(UserError, match=rf"--max_tokens_per_batch .*has 401 tokens.*{needed} or more"):
        TokenBudget(needed - 1, lengths).check(32)


def test_ranks_that_share_rows_divide_what_they_take():
    lengths = np.array([[64], [64], [32]])
    assert [len(part) for part in TokenBudget(64, lengths, num_sharing=2).divided(np.arange(3), 1)[0]] == [
        2,
        1,
    ]
    TokenBudget(208, np.array([[401]]), num_sharing=2).check(32)
    with pytest.raises(UserError, match="Give 208 or more"):
        TokenBudget(207, np.array([[401]]), num_sharing=2).check(32)
