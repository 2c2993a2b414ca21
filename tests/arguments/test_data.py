"""The flags of the data."""

import pytest
from step_flags import assert_refused

from dschat.arguments import DataArguments


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--data_split", "2,4"], ["--data_split", "2,4,4", "'2,4'"]),
        (["--data_split", "0,0,0"], ["--data_split"]),
        (["--eval_fraction", "1"], ["--eval_fraction", "1.0", "0.05"]),
        (["--data_split", "1,1," + "9" * 400], ["--data_split needs three shares"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_shares_are_the_numbers_of_data_split():
    assert DataArguments(data_split="1, 0,2.5").shares == (1, 0, 2.5)
