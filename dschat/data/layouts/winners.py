"""The layout of two answers beside a column that says which of them is better, under the names in use."""

import re
from typing import Any, NamedTuple

from dschat.data.cells import (
    BadRow,
    DroppedRow,
    Row,
    describe,
    finite_number,
    first_filled,
    has,
    replaced,
    value_of,
)
from dschat.data.comparisons import Comparison
from dschat.data.layouts.pairs import TIES, check_order, continued, instructed, margin, parted
from dschat.data.layouts.prompts import a_prompt, from_text
from dschat.data.layouts.registry import LAYOUTS, layout

ANSWER = re.compile(
    r"(answer|response|output|completion|conversation|candidate|reply|generation|summary)[ _-]?([a-zA-Z0-9])"
)
"""Names of columns that hold one of several answers."""

SIDES = (("a", "b"), ("0", "1"), ("1", "2"))
"""What the names of two answers end with."""

PROMPTS = ("prompt", "question", "instruction")

VERDICTS = (
    *("winner", "preference", "preferred", "better", "best", "choice", "chosen", "selected", "verdict"),
    *("comparison", "label", "better_response_id", "better_answer", "better_response", "preferred_answer"),
    *("preferred_response", "chosen_answer", "chosen_response", "chosen_index", "preferred_index"),
)
"""Columns that say which of two answers is better."""

SIGNED = ("overall_preference", "preference_strength")
"""Columns that say the same as HelpSteer does: below 0 the first answer is better, above 0 the second."""

ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
"""Columns of which the one that is 1 says the same."""

TIED: tuple[str, ...] = (
    "tie",
    "tied",
    "draw",
    "both",
    "equal",
    "same",
    "neither",
    "bothbad",
    "both_bad",
    "both bad",
)
TIED += ("tie (bothbad)", "tie(bothbad)", "tie (both bad)", "no preference", "no_preference", "c")

NOUNS: tuple[str, ...] = (
    "",
    "model",
    "assistant",
    "answer",
    "response",
    "output",
    "completion",
    "conversation",
    "candidate",
)
NOUNS += ("option", "reply", "generation", "summary")


class Pair(NamedTuple):
    """The columns of two answers, and what their names end with."""

    columns: tuple[str, str]
    sides: tuple[str, str]


def pair_of(row: Row) -> Pair | None:
    """The columns of the row's two answers, None where there are none, or more than two."""
    found: dict[str, dict[str, str]] = {}
    for column in row:
        if name := ANSWER.fullmatch(str(column)):
            found.setdefault(name[1], {})[name[2].lower()] = column
    for columns in found.values():
        sides = tuple(sorted(columns))
        if sides in SIDES:
            return Pair((columns[sides[0]], columns[sides[1]]), sides)
    return None


def _score_columns(row: Row, pair: Pair) -> tuple[str, str] | None:
    for kind in ("score", "rating", "reward"):
        for form in ("{kind}_{side}", "{kind}{side}", "{column}_{kind}", "{kind}_{column}"):
            one, other = (
                form.format(kind=kind, side=side, column=column)
                for side, column in zip(pair.sides, pair.columns, strict=True)
            )
            if {one, other} <= set(row):
                return one, other
    return None


def _has_two_answers(row: Row) -> bool:
    if {"chosen", "rejected"} <= set(row) or (pair := pair_of(row)) is None:
        return False
    if any(name in row for name in (*VERDICTS, *SIGNED, *ONE_HOT)) or _score_columns(row, pair):
        return True
    # Without a verdict it is an error, lest the answers are overlooked, unless the row has another answer.
    others = (known for name, known in LAYOUTS.items() if name not in ("two_answers", "prompt_only"))
    return any(name in row for name in PROMPTS) and not any(known.matches(row) for known in others)


@layout("two_answers", "prompt", "answer_a", "answer_b", "winner", fits=_has_two_answers)
def two_answers(row: Row) -> Comparison:
    """A prompt, two answers, and which of them is better: by the letter, number, name or text of one.

    A tie is dropped; what is neither one of the answers nor a tie is an error, so that no pair is inverted.
    """
    pair = pair_of(row)
    if pair is None:
        raise BadRow('the row has no two answers such as "answer_a" and "answer_b"')
    better = _better(row, pair)
    if better is None:
        raise DroppedRow(TIES)
    columns = (pair.columns[better], pair.columns[1 - better])
    if scores := _score_columns(row, pair):
        check_order(row, scores[better], scores[1 - better])
    prompt = next((name for name in PROMPTS if name in row), None)
    if prompt is not None and (spread := _rounds(row, prompt, pair)) is not None:
        return parted(spread, *columns, margin=margin(row))
    if prompt is None:
        return parted(row, *columns, margin=margin(row))
    asked = instructed(row) if prompt == "instruction" else a_prompt(row, prompt)
    return continued(row, asked, *columns, margin=margin(row))


def _rounds(row: Row, prompt: str, pair: Pair) -> Row | None:
    """The row with whole conversations in place of answers, where prompt and answers are lists, or JSON texts
    of lists, of as many strings each, one a round, as LMSYS has them; else None."""
    lists = []
    for column in (prompt, *pair.columns):
        value = from_text(row[column])
        if not isinstance(value, list) or not all(part is None or isinstance(part, str) for part in value):
            return None
        lists.append(value)
    if len({len(value) for value in lists}) > 1 or not lists[0]:
        return None
    whole = {
        column: [
            {"role": role, "content": content}
            for turn in zip(lists[0], answers, strict=True)
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        for column, answers in zip(pair.columns, lists[1:], strict=True)
    }
    return replaced(row, **whole)


def _better(row: Row, pair: Pair) -> int | None:
    """Which answer is better, 0 or 1, None for a tie. Raises `BadRow` where the row does not say."""
    if (column := first_filled(row, *VERDICTS)) is not None:
        better = _named(row[column], column, row, pair)
        _check_other_verdicts(better, column, row, pair)
        return better
    if has(row, *ONE_HOT[:2]):
        return _one_hot(row)
    if (column := first_filled(row, *SIGNED)) is not None:
        number = finite_number(row[column], f'"{column}"')
        return None if number == 0 else int(number > 0)
    if (scores := _score_columns(row, pair)) is not None:
        first, second = (finite_number(value_of(row, column), f'"{column}"') for column in scores)
        return None if first == second else int(second > first)
    empty = next((name for name in (*VERDICTS, *SIGNED, *ONE_HOT) if name in row), None)
    if empty is not None:
        raise BadRow(f'"{empty}" is empty, so nothing says which answer is better')
    raise BadRow(
        f'the row has two answers, "{pair.columns[0]}" and "{pair.columns[1]}", but no column that is known '
        f"to say which is better ({', '.join((*VERDICTS[:6], *SIGNED))}, ...); give it one of these names, "
        "or --data_format prompt_only to use the prompts alone"
    )


def _one_hot(row: Row) -> int | None:
    filled = [column for column in ONE_HOT if has(row, column)]
    numbers = [finite_number(row[column], f'"{column}"') for column in filled]
    if sorted(numbers)[-2:] != [0, 1] or len(set(numbers)) != 2 or sum(numbers) != 1:
        if sum(numbers) == 0 and len(numbers) == 2:
            return None
        raise BadRow(f"of {', '.join(filled)} one must be 1 and the others 0, but they are {numbers}")
    return {0: 0, 1: 1, 2: None}[numbers.index(1)]


def _named(value: Any, column: str, row: Row, pair: Pair) -> int | None:
    """Which answer a verdict names. Raises `BadRow` where it names none, or could name either."""
    word = _word(value)
    chosen = [side for side in (0, 1) if word is not None and word in _names(side, row, pair)]
    if len(chosen) == 1:
        return chosen[0]
    if not chosen and word in TIED:
        return None
    first, second = pair.columns
    known = (
        f'"{pair.sides[0]}" or "{pair.sides[1]}", "{first}" or "{second}", "left" or "right", the text of one'
    )
    problem = "could be either answer" if chosen else "names neither answer"
    raise BadRow(
        f'"{column}" {problem}: it is {describe(value)}; known are {known}, and for a tie '
        + ", ".join(TIED[:4])
    )


def _check_other_verdicts(better: int | None, verdict_column: str, row: Row, pair: Pair) -> None:
    """Raise `BadRow` where a further column names the other answer."""
    for column in VERDICTS:
        if column == verdict_column or not has(row, column) or better is None:
            continue
        word = _word(dict.__getitem__(row, column))
        agrees, differs = (word in _names(side, row, pair) for side in (better, 1 - better))
        if differs and not agrees:
            raise BadRow(f'"{verdict_column}" and "{column}" name different answers')
        if agrees and not differs:
            row.get(column)  # it has been read


def _word(value: Any) -> str | None:
    """A verdict in the form in which it is compared."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    word = str(value).strip().lower()
    word = word.removeprefix("[[").removesuffix("]]")
    return word.removesuffix(".0") if re.fullmatch(r"\d+\.0", word) else word


def _names(side: int, row: Row, pair: Pair) -> set[str]:
    """What the answer on that side may be called."""
    end = pair.sides[side]
    names = {f"{noun}{mark}{end}" for noun in NOUNS for mark in ("_", " ", "-", "")} | {
        pair.columns[side].lower(),
        ("left", "right")[side],
        ("first", "second")[side],
    }
    return names | {
        value.strip().lower()
        for value in (row.get(pair.columns[side]), row.get(f"model_{end}"))
        if isinstance(value, str) and value.strip()
    }
