"""The origin of a model."""

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.export.provenance import golden_rows, step_provenance


def test_golden_rows_are_the_ends_of_the_first_rows():
    pairs = {"chosen_ids": [[1] * 30 + [2], [3, 4]], "rejected_ids": [[5], [6, 7]], "length": [31, 2]}
    assert golden_rows(Rows.from_dict(pairs)) == [[1] * 23 + [2], [3, 4], [6, 7]]
    prompts = {"input_ids": [[i, i] for i in range(9)], "key": list(range(9))}
    assert golden_rows(Rows.from_dict(prompts)) == [[i, i] for i in range(8)]


def test_a_step_records_flags_data_and_what_decides_its_prompts():
    description = parse_arguments(
        "dpo", ["--model_name_or_path=org/base", "--data_path", "a:0.5", "--seed=7"]
    ).description
    rows = Rows.from_dict({"chosen_ids": [[1, 2], [3]], "rejected_ids": [[4, 5], [6, 7]]})
    data = SplitData(train=rows, evaluation=Rows(rows.table.slice(0, 1)), num_rows={"a": 3}, key="0")
    made = step_provenance(description, "org/base", data, {"eval_loss": 0.5}, head="value", verdict="good")
    assert (made.step, made.base_model, made.head, made.verdict) == ("dpo", "org/base", "value", "good")
    assert made.golden_inputs == [[1, 2], [4, 5], [6, 7]]  # all but the row of one token
    assert made.flags == {"data_path": ["a:0.5"], "model_name_or_path": "org/base", "seed": 7}
    assert made.data == {"data_path": ["a"], "data_split": "2,4,4", "seed": 7, "eval_fraction": 0.05}
    assert (made.num_rows, made.num_used) == ({"a": 3}, {"training": 2, "evaluation": 1})
