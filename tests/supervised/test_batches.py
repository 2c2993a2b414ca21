from dataclasses import replace

import pyarrow as pa
import pytest

from dschat.arguments import parse_arguments
from dschat.data.packing import PADDED, RowLayout
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.supervised.batches import Loaders, build_loaders
from dschat.supervised.settings import SupervisedSettings

LENGTHS = {"train": [3, 9, 4, 5, 2], "evaluation": [7, 2, 6]}


def names(rows: pa.Table, num_rows: int, denominator: float) -> list[str]:
    """A batch of names instead of tokens."""
    return rows["name"].to_pylist()


@pytest.fixture
def loaders() -> Loaders:
    flags = ["--per_device_train_batch_size=2", "--per_device_eval_batch_size=1", "--eval_iters=2"]
    args = parse_arguments("sft", ["--model_name_or_path=m", "--gradient_accumulation_steps=2", *flags])
    parts = [
        Rows.from_dict({"length": lengths, "name": [f"{part} {n}" for n in lengths]})
        for part, lengths in LENGTHS.items()
    ]
    return build_loaders(SplitData(*parts, {}, "key"), names, SupervisedSettings.of(args))


def test_training_and_evaluation_have_batches_of_their_own_sizes(loaders):
    # Four of five examples fill an optimiser step of 2 micro-batches of 2.
    assert loaders.train.steps_per_epoch == 2
    assert sorted(len(batch) for batch in loaders.train) == [0, 1, 2, 2]
    assert list(loaders.evaluation) == [["evaluation 7"], ["evaluation 6"], ["evaluation 2"]]
    assert len(list(loaders.short_evaluation)) == 2


def test_the_longest_row_is_that_of_both_parts(loaders):
    assert loaders.longest_row == 9


def test_a_token_budget_divides_training_and_counts_the_layout_of_rows():
    flags = ["--per_device_train_batch_size=4", "--max_tokens_per_batch=16"]
    args = parse_arguments("sft", ["--model_name_or_path=m", *flags])
    rows = Rows.from_dict({"length": [8, 8, 3, 3], "input_ids": [[1] * n for n in (8, 8, 3, 3)]})

    def lengths(rows: pa.Table, num_rows: int, denominator: float, layout: RowLayout = PADDED) -> list[int]:
        return rows["length"].to_pylist()

    made = build_loaders(SplitData(rows, rows, {}, "key"), lengths, SupervisedSettings.of(args))
    assert list(made.train) == [[8, 8], [3, 3]]
    assert list(made.laid_out(RowLayout(12)).train) == [[8], [8], [3], [3]]
    assert list(made.evaluation) == [[8, 8, 3, 3]]


def test_further_columns_leave_the_batches_as_they_are(loaders):
    data = loaders.data
    train = Rows.from_dict({"length": LENGTHS["train"], "name": [f"new {n}" for n in LENGTHS["train"]]})
    evaluation = Rows(data.evaluation.table.append_column("number", [[1, 2, 3]]))
    extended = loaders.over(replace(data, train=train, evaluation=evaluation))
    assert extended.data.train is train
    old, new = ([name for batch in found.train for name in batch] for found in (loaders, extended))
    assert new == [name.replace("train", "new") for name in old]
    assert list(extended.evaluation) == list(loaders.evaluation)
    assert list(extended.short_evaluation) == list(loaders.short_evaluation)
