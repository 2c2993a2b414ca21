"""The layout of pairs that are token ids already, as ColossalChat and TRL prepare them."""

from itertools import takewhile

from dschat.data.cells import BadRow, DroppedRow, Row, describe, has, value_of
from dschat.data.comparisons import Comparison
from dschat.data.layouts.pairs import check_scores, margin
from dschat.data.layouts.prompts import from_text
from dschat.data.layouts.registry import layout
from dschat.data.token_turns import token_turn

LARGEST_ID = 2**31 - 1
DECODED = ("chosen_label_decode", "rejected_label_decode")
"""Columns in which ColossalChat repeats the answers as text."""

Side = tuple[list[int], list[int]]
"""The tokens of prompt and answer, and the places at which a run of tokens that count begins."""


@layout("tokens", "chosen_input_ids", "rejected_input_ids")
def tokenised_pair(row: Row) -> Comparison:
    """Token ids of the prompt with the better and with the worse answer; `chosen_loss_mask` and
    `rejected_loss_mask` mark the answers. Without masks the answers begin where the rows part, or after
    `prompt_input_ids`.
    """
    check_scores(row)
    for column in DECODED:
        row.get(column)
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    start = _start_of_answers(chosen, rejected)
    if start == 0:
        raise BadRow("the answers have no prompt before them: the first token counts already")
    prompt, answers = chosen[0][:start], (chosen[0][start:], rejected[0][start:])
    return Comparison((token_turn(prompt),), tuple(map(token_turn, answers)), margin=margin(row))


def _side(row: Row, side: str) -> Side:
    """One row of tokens up to the last that counts, without padding."""
    ids = _ids(row, f"{side}_input_ids")
    attended = _mask(row, f"{side}_attention_mask", ids)
    counts = _mask(row, f"{side}_loss_mask", ids)
    before = _ids(row, "prompt_input_ids") if has(row, "prompt_input_ids") else []
    kept = [place for place in range(len(ids)) if attended is None or attended[place]]
    ids = [*before, *(ids[place] for place in kept)]
    if counts is None:
        return ids, [len(before)] if before else []
    marks = [*([0] * len(before)), *(counts[place] for place in kept)]
    if not any(marks):
        raise BadRow(f'"{side}_loss_mask" marks no token, so there is no answer')
    end = len(marks) - marks[::-1].index(1)
    starts = [place for place in range(end) if marks[place] and not (place and marks[place - 1])]
    return ids[:end], starts


def _start_of_answers(chosen: Side, rejected: Side) -> int:
    """The number of tokens before both answers."""
    (better, starts), (worse, other_starts) = chosen, rejected
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(better, worse, strict=False))))
    if bool(starts) != bool(other_starts):
        raise BadRow('one of "chosen_loss_mask" and "rejected_loss_mask" is missing')
    if not starts:
        return min(shared, len(better) - 1, len(worse) - 1)
    both = [start for start in starts if start in other_starts and start <= shared]
    if not both:
        raise DroppedRow("dialogues that part before their last answer")
    return max(both)


def _ids(row: Row, column: str) -> list[int]:
    """A list of token ids, at least one."""
    values = from_text(value_of(row, column))
    if not isinstance(values, list) or not values:
        raise BadRow(f'"{column}" must be a list of token ids, but is {describe(values)}')
    for place, value in enumerate(values, start=1):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_ID:
            raise BadRow(
                f'token {place} of "{column}" must be a whole number of at least 0, but is {describe(value)}'
            )
    return values


def _mask(row: Row, column: str, ids: list[int]) -> list[int] | None:
    """A list of 0 and 1 as long as the tokens; None where the row has none."""
    if not has(row, column):
        return None
    values = from_text(row[column])
    if not isinstance(values, list) or len(values) != len(ids):
        found = f"{len(values)} values" if isinstance(values, list) else describe(values)
        raise BadRow(f'"{column}" must hold a value for each of the {len(ids)} tokens, but is {found}')
    for value in values:
        if value not in (0, 1):  # False and True equal them
            raise BadRow(f'"{column}" must hold 0 and 1, but holds {describe(value)}')
    return [int(value) for value in values]
