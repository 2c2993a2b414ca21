"""Rows that cannot be tokenised are named, or marked and counted."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features

from dschat.data.refused_rows import RowError, encode_rows, refused_rows
from dschat.data.truncation import Truncation
from dschat.errors import UserError


def test_the_first_row_that_fails_by_itself_is_named():
    def encode(batch):
        if "bad" in batch["prompt"]:
            raise KeyError("what is it")
        return batch

    rows = {"prompt": ["a", "bad", "bad"]}
    with pytest.raises(RowError, match="row 8 cannot be tokenised: KeyError: 'what is it'"):
        encode_rows(rows, [6, 7, 8], encode, with_indices=False)
    with pytest.raises(RowError) as caught:
        encode_rows(rows, [6, 7, 8], encode, with_indices=False)
    assert pickle.loads(pickle.dumps(caught.value)).number == 7


KINDS = {
    "input_ids": pa.list_(pa.int32()),
    **{"prompt_size": pa.int32(), "unshown": pa.string(), "truncation": pa.int8()},
}


def encode(batch):
    if 0 in batch["x"]:
        raise UserError("nothing of it.")
    size = len(batch["x"])
    return {"input_ids": [[x] for x in batch["x"]], "prompt_size": [1] * size, "unshown": [""] * size,
            "truncation": [0] * size}  # fmt: skip


def test_the_first_row_that_fails_ends_the_work_with_its_number():
    with pytest.raises(RowError, match=r"row 12 cannot be tokenised: nothing of it\.") as error:
        encode_rows({"x": [1, 0, 0]}, [10, 11, 12], encode, with_indices=False)
    copied = pickle.loads(pickle.dumps(error.value))
    assert (copied.number, copied.reason) == (11, "nothing of it.")


def test_rows_that_fail_are_marked_where_they_may_and_the_others_stay():
    marked = encode_rows({"x": [1, 0, 3]}, [10, 11, 12], encode, with_indices=False, marked_as=KINDS)
    assert marked["input_ids"] == [[1], [], [3]]
    table = Dataset.from_dict(marked, features=Features.from_arrow_schema(pa.schema(KINDS)))
    truncations = np.array(marked["truncation"])
    assert truncations.tolist() == [0, Truncation.REFUSED, 0]
    assert refused_rows(table, truncations) == {11: "nothing of it."}


def test_an_error_that_no_row_makes_by_itself_is_raised():
    def together(batch):
        if len(batch["x"]) > 1:
            raise ValueError("too many")
        return encode(batch)

    with pytest.raises(ValueError, match="too many"):
        encode_rows({"x": [1, 2]}, [0, 1], together, with_indices=False)
