"""Layouts of rows with one answer or none: examples for step 1, prompts for step 3."""

from typing import Any

from dschat.data.cells import BadRow, Row, describe, finite_number, first_filled, text, value_of
from dschat.data.comparisons import Comparison, Turn
from dschat.data.layouts.pairs import check_best_first, continued, instructed, texts_of
from dschat.data.layouts.prompts import a_prompt, from_text, with_columns
from dschat.data.layouts.registry import layout
from dschat.data.messages import prompt_and_answer, turns

LABELS = ("label", "kto_tag")
"""Columns that say whether the one answer of a row is a good one."""

LABELLED_BAD = "answers labelled bad"
NO_TEXT = "answers that are no text"


def labelled(row: Row, comparison: Comparison) -> Comparison:
    """The comparison; without its answer, which nothing learns, where the row labels it as bad."""
    column = first_filled(row, *LABELS)
    if column is None or _is_good(row[column], column):
        return comparison
    return Comparison(comparison.prompt, unlearned=LABELLED_BAD)


def _is_good(value: Any, column: str) -> bool:
    """What a label says. Raises `BadRow` for one that is neither true nor false."""
    word = value.strip().lower() if isinstance(value, str) else value
    known: dict[str | bool, bool] = {"true": True, "1": True, "1.0": True, True: True}
    known |= {"false": False, "0": False, "0.0": False, False: False}  # 1 and 0 equal True and False
    try:
        return known[word]
    except (KeyError, TypeError) as error:
        raise BadRow(
            f'"{column}" must be true or false (or 1 or 0), whether the answer is a good one, but is '
            f"{describe(value)}; call the column otherwise if it says something else"
        ) from error


@layout("messages", "messages")
def messages(row: Row) -> Comparison:
    """A conversation; step 1 learns all that the assistant says in it."""
    return _conversation(row, "messages")


@layout("sharegpt", "conversations")
def sharegpt(row: Row) -> Comparison:
    """The same as messages, from {"from": "human" | "gpt" | "system", "value"}."""
    return _conversation(row, "conversations")


def _conversation(row: Row, column: str) -> Comparison:
    message = from_text(value_of(row, column))
    prompt, answer = prompt_and_answer(turns(message, f'"{column}"'), f'"{column}"')
    return labelled(row, Comparison(with_columns(row, prompt), (answer,), learn_all_turns=True))


@layout("alpaca", "instruction", "output")
def alpaca(row: Row) -> Comparison:
    """An instruction, where there is one an input below it, and the answer, or a list of them, the best
    first."""
    prompt = with_columns(row, instructed(row))
    if isinstance(row.get("output"), list):
        check_best_first(row, "output")
        return Comparison(prompt, tuple(texts_of(row, "output")))
    return labelled(row, Comparison(prompt, (text(row, "output"),)))


@layout("instruction_response", "instruction", "response")
def instruction_response(row: Row) -> Comparison:
    """As alpaca, under the names of Dolly: what stands below the instruction is its `context`."""
    below = "context" if first_filled(row, "input") is None else "input"
    prompt = with_columns(row, instructed(row, below))
    return labelled(row, Comparison(prompt, (text(row, "response"),)))


@layout("question_answer", "question", "answer")
def question_answer(row: Row) -> Comparison:
    """A question and its answer, as in GSM8K. A number is text; what is neither is learned by no step, and a
    reward function of step 3 has it."""
    prompt = with_columns(row, (Turn("user", text(row, "question").strip()),))
    answer = value_of(row, "answer")
    if isinstance(answer, bool | list | dict):
        return Comparison(prompt, unlearned=NO_TEXT)
    if isinstance(answer, int | float):
        finite_number(answer, '"answer"')
        return labelled(row, Comparison(prompt, (str(answer),)))
    return labelled(row, Comparison(prompt, (text(row, "answer"),)))


@layout("prompt_completion", "prompt", "completion")
def prompt_completion(row: Row) -> Comparison:
    """A prompt and one answer, each text or messages."""
    return labelled(row, continued(row, a_prompt(row), "completion"))


@layout("prompt_response", "prompt", "response")
def prompt_response(row: Row) -> Comparison:
    """A prompt and one answer under another name."""
    return labelled(row, continued(row, a_prompt(row), "response"))


@layout("prompt_only", "prompt")
def prompt_only(row: Row) -> Comparison:
    """A prompt without an answer, for step 3."""
    return Comparison(with_columns(row, a_prompt(row)))
