"""What became of the data, in numbers and in words."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from tiny import comparison_rows

from dschat.data import splits
from dschat.data.comparisons import Comparison, write_comparisons
from dschat.data.findings import Findings
from dschat.data.report import columns_of, listed, num_related, rows_report, source_report
from dschat.data.share import Task
from dschat.data.tokenization import Tokenized

ONE, OTHER = Comparison("p", ("a", "b")), Comparison("p", ("c",))
COMPARISONS = [ONE, OTHER, ONE, Comparison("q"), Comparison("q", ("a",)), Comparison("r", ("a", "b"))]
PARTS = np.array([0, 0, 0, 0, 0, splits.EVALUATION])


def test_a_sources_rows_are_shared_repeated_or_dropped_and_add_up(tmp_path):
    index = write_comparisons(((found, 0, False) for found in COMPARISONS), tmp_path / "comparisons.arrow")
    first = np.array([0, -1, -1, 0, -1, splits.EVALUATION])  # of each prompt its first row alone
    findings = Findings(dropped=Counter(ties=2))
    report = source_report(0, index, first, PARTS, findings, Task(2, comparison_rows, "--max_seq_len", 8, {}))
    assert report["rows"] == 6 + 2
    assert report["shares"] == [2, 0, 0]
    assert report["evaluation"] == 1
    assert report["dropped"] == {"ties": 2, "repeated row": 1}
    assert report["further"] == 2  # the second answer to p, and the answer to q
    assert Findings.of_json(report["findings"]) == findings


def test_evaluation_prompts_that_training_dialogues_go_on_from_are_counted():
    families = np.array([0, 0, 1, 2, 2])
    first = np.array([0, splits.EVALUATION, splits.EVALUATION, 2, splits.EVALUATION])
    assert num_related(families, first) == 2  # of families 0 and 2


@pytest.mark.parametrize(("lengths", "mean"), [([2, 4], 3.0), ([], 0.0)])
def test_the_rows_of_a_part_are_counted_with_their_mean_length(lengths, mean):
    rows = Dataset.from_dict({"length": np.array(lengths, dtype=np.int32)})
    tokenized = Tokenized(rows, 1, 2, dropped={}, unshown={"mood": 1}, shortest_prompt=2)
    assert rows_report(tokenized, {"ties": 3}) == {
        "rows": len(lengths),
        "mean_length": mean,
        "fewer_turns": 1,
        "cut": 2,
        "dropped": {"ties": 3},
        "unshown": {"mood": 1},
    }


def test_columns_are_those_that_any_row_has():
    assert columns_of(Dataset.from_dict({"row": ['{"a": 1}', '{"b": 2, "a": 1}']})) == {"a", "b"}


def test_counts_are_listed_with_their_reasons_and_nothing_is_said_of_none():
    assert listed("; dropped", {"ties": 2, "bad": 1}) == "; dropped 2 (ties), 1 (bad)"
    assert listed("; dropped", {}) == ""
