"""Pairs that are token ids already."""

import pytest
from layout_rows import read

from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison
from dschat.data.token_turns import token_turn


def row(chosen, chosen_mask, rejected, rejected_mask, **columns):
    return {
        "chosen_input_ids": chosen,
        "chosen_loss_mask": chosen_mask,
        "rejected_input_ids": rejected,
        "rejected_loss_mask": rejected_mask,
        **columns,
    }


def pair(prompt, chosen, rejected, **settings):
    return Comparison((token_turn(prompt),), (token_turn(chosen), token_turn(rejected)), **settings)


PLAIN = row([5, 6, 7, 2], [0, 0, 1, 1], [5, 6, 8, 9, 2], [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (PLAIN, pair([5, 6], [7, 2], [8, 9, 2])),
        ({**PLAIN, "margin": 2}, pair([5, 6], [7, 2], [8, 9, 2], margin=2.0)),
        ({**PLAIN, "chosen_loss_mask": [False, False, True, True]}, pair([5, 6], [7, 2], [8, 9, 2])),
        # The masks say that 7 is an answer's, though both rows have it.
        (row([5, 7, 7, 2], [0, 1, 1, 1], [5, 7, 2], [0, 1, 1]), pair([5], [7, 7, 2], [7, 2])),
        # What stands after the last token that counts is padding, or the template's.
        (
            row([5, 6, 7, 2, 0, 0], [0, 0, 1, 1, 0, 0], [5, 6, 8, 2, 3], [0, 0, 1, 1, 0]),
            pair([5, 6], [7, 2], [8, 2]),
        ),
        # ColossalChat marks the end token after a line end of the template that it does not mark.
        (
            row([5, 6, 7, 4, 2], [0, 0, 1, 0, 1], [5, 6, 8, 4, 2], [0, 0, 1, 0, 1]),
            pair([5, 6], [7, 4, 2], [8, 4, 2]),
        ),
        # An earlier answer is of the prompt where both rows have it.
        (
            row([5, 6, 5, 7], [0, 1, 0, 1], [5, 6, 5, 8], [0, 1, 0, 1]),
            pair([5, 6, 5], [7], [8]),
        ),
        ({"chosen_input_ids": [5, 7, 2], "rejected_input_ids": [5, 8, 2]}, pair([5], [7, 2], [8, 2])),
        ({"chosen_input_ids": [5, 7], "rejected_input_ids": [5, 7, 8]}, pair([5], [7], [7, 8])),
        (
            {"prompt_input_ids": [5, 6], "chosen_input_ids": [7, 2], "rejected_input_ids": [7, 8, 2]},
            pair([5, 6], [7, 2], [7, 8, 2]),
        ),
        (
            {
                "chosen_input_ids": [0, 5, 7],
                "chosen_attention_mask": [0, 1, 1],
                "rejected_input_ids": [5, 8, 0],
                "rejected_attention_mask": [1, 1, 0],
            },
            pair([5], [7], [8]),
        ),
        ({name: str(value) for name, value in PLAIN.items()}, pair([5, 6], [7, 2], [8, 9, 2])),
    ],
)
def test_the_answers_are_what_the_masks_say_or_where_the_rows_part(columns, expected):
    assert read(columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen_input_ids": "5 6"}, '"chosen_input_ids" must be a list of token ids, but is str'),
        ({"chosen_input_ids": []}, '"chosen_input_ids" must be a list of token ids, but is a list: \\[\\]'),
        ({"chosen_input_ids": None}, '"chosen_input_ids" must be a list of token ids, but is null'),
        ({"chosen_input_ids": [5, 6, -100, 2]}, 'token 3 of "chosen_input_ids" must be a whole number'),
        ({"chosen_input_ids": [5, 6, 7.5, 2]}, 'token 3 of "chosen_input_ids" must be a whole number'),
        ({"chosen_input_ids": [5, 6, True, 2]}, 'token 3 of "chosen_input_ids" must be a whole number'),
        ({"chosen_input_ids": [5, 6, 2**40, 2]}, 'token 3 of "chosen_input_ids" must be a whole number'),
        ({"chosen_loss_mask": [0, 1, 1]}, "a value for each of the 4 tokens, but is 3 values"),
        ({"chosen_loss_mask": [0, 0, 2, 1]}, '"chosen_loss_mask" must hold 0 and 1, but holds a number: 2'),
        ({"chosen_loss_mask": [0, 0, 0, 0]}, '"chosen_loss_mask" marks no token'),
        ({"chosen_loss_mask": [1] * 4, "rejected_loss_mask": [1] * 5}, "no prompt before them"),
        ({"rejected_loss_mask": None}, 'one of "chosen_loss_mask" and "rejected_loss_mask" is missing'),
    ],
)
def test_what_cannot_be_read_says_why(columns, message):
    with pytest.raises(BadRow, match=message):
        read({**PLAIN, **columns})


def test_rows_that_differ_before_the_first_token_that_counts_are_dropped():
    with pytest.raises(DroppedRow, match="dialogues that part before their last answer"):
        read({**PLAIN, "rejected_input_ids": [5, 9, 8, 9, 2]})
