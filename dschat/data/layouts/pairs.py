"""Layouts of rows that name the better answer by its column, or by its place in a list."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from dschat.data.cells import (
    BadRow,
    DroppedRow,
    Row,
    describe,
    finite_number,
    has,
    optional,
    sound_text,
    text,
    value_of,
)
from dschat.data.comparisons import Comparison, Prompt, Reply, Turn, parse_dialogue
from dschat.data.layouts.prompts import (
    a_prompt,
    from_text,
    messages_from_text,
    text_prompt,
    unix_marks,
    with_columns,
)
from dschat.data.layouts.registry import layout
from dschat.data.messages import prompt_and_answer, reply, turns

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

TIES = "ties"
"""The reason under which pairs without a better answer are counted."""

SCORES = tuple(
    pair
    for kind, mark in product(("score", "rating", "reward", "avg_rating", "avg-rating"), ("_", "-"))
    for pair in (
        (f"{kind}{mark}chosen", f"{kind}{mark}rejected"),
        (f"chosen{mark}{kind}", f"rejected{mark}{kind}"),
    )
)
"""Columns that score the better and the worse answer."""

JUDGEMENTS = ("score", "scores", "rating", "ratings", "reward", "rewards", "label", "labels", "rank", "ranks")
"""Columns that may tell the order of a list of answers."""


def margin(row: Row) -> float:
    """The row's margin, 0 where it has none."""
    value = optional(row, "margin")
    if value is None:
        return 0.0
    number = finite_number(value, '"margin"')
    if number < 0:
        raise BadRow(f'"margin" must be at least 0, but is {number}')
    return number


def check_scores(row: Row) -> None:
    """`check_order` for every pair of `SCORES` that the row has."""
    for better, worse in SCORES:
        if has(row, better, worse):
            check_order(row, better, worse)


def check_order(row: Row, better: str, worse: str) -> None:
    """Raise `BadRow` where the better answer's score, in one column, is below the worse one's in the other,
    and `DroppedRow` where they are equal."""
    high, low = (finite_number(value_of(row, column), f'"{column}"') for column in (better, worse))
    if high < low:
        raise BadRow(
            f'"{better}" must be above "{worse}", for the better answer, but is {high} against {low}'
        )
    if high == low:
        raise DroppedRow(TIES)


def ranked(prompt: Prompt, answers: Sequence[str], ranks: Sequence[float], **settings: Any) -> Comparison:
    """A Comparison of answers in any order; the lower the rank, the better."""
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    return Comparison(
        prompt, tuple(answers[i] for i in order), tuple(float(ranks[i]) for i in order), **settings
    )


@layout("preference", "prompt", "chosen", "rejected")
def answers_to_a_prompt(row: Row) -> Comparison:
    """A prompt and two answers, each text or messages; messages may repeat the prompt before the answer."""
    return chosen_and_rejected(row, a_prompt(row))


def chosen_and_rejected(row: Row, prompt: Prompt) -> Comparison:
    """The prompt with the row's two answers, and what else a row of a pair may say."""
    check_scores(row)
    return continued(row, prompt, "chosen", "rejected", margin=margin(row))


def continued(row: Row, prompt: Prompt, *columns: str, **settings: Any) -> Comparison:
    """The prompt and its answers in those columns; what stands before the answers must be the prompt."""
    befores, answers = zip(*(_end_of(row, column) for column in columns), strict=True)
    repeated = {before: column for before, column in zip(befores, columns, strict=True) if before}
    if len(repeated) > 1:
        raise DroppedRow("dialogues that part before their last answer")
    for before, column in repeated.items():
        prompt = _whole_prompt(before, prompt, column)
    return Comparison(with_columns(row, prompt), answers, **settings)


def _end_of(row: Row, column: str) -> tuple[tuple[Turn, ...], Reply]:
    """An answer, and the messages before it if there are any."""
    value = messages_from_text(row.get(column))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return (), text(row, column)
    *before, last = turns(value, f'"{column}"')
    if last.role != "assistant":
        raise DroppedRow("conversations that end with a question")
    return tuple(before), reply(last)


def _whole_prompt(before: tuple[Turn, ...], prompt: Prompt, column: str) -> tuple[Turn, ...]:
    """The messages before an answer, which may say more than the prompt, such as a system message."""
    question = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    if not set(question) <= set(before):
        raise BadRow(f'"{column}" has messages before its answer, and they are not the prompt')
    return before


@layout("sharegpt_preference", "conversations", "chosen", "rejected")
def sharegpt_preference(row: Row) -> Comparison:
    """`conversations` up to the question, and two answers as messages or text."""
    return chosen_and_rejected(row, a_prompt(row, "conversations"))


@layout("alpaca_preference", "instruction", "chosen", "rejected")
def alpaca_preference(row: Row) -> Comparison:
    """An instruction, where there is one an input below it, and two answers."""
    return chosen_and_rejected(row, instructed(row))


def instructed(row: Row, below: str = "input") -> tuple[Turn, ...]:
    """A question from an instruction and what stands below it."""
    question = text(row, "instruction").strip()
    if optional(row, below) is not None:
        question += f"\n\n{text(row, below).strip()}"
    return (Turn("user", question),)


@layout("question_preference", "question", "chosen", "rejected")
def question_preference(row: Row) -> Comparison:
    """A question and two answers."""
    return chosen_and_rejected(row, a_prompt(row, "question"))


@layout("ranked", "prompt", "answers")
def several_answers(row: Row) -> Comparison:
    """A prompt and a list of answers, the best first; or in any order with `scores` (higher is better) or
    `ranks` (lower is better), where equal numbers are a tie."""
    answers = texts_of(row, "answers")
    if optional(row, "ranks") is not None:
        ranks = _numbers(row, "ranks", len(answers))
    elif optional(row, "scores") is not None:
        # 0.0 - 0.0 is 0.0, but -0.0 would be written as another row.
        ranks = [0.0 - score for score in _numbers(row, "scores", len(answers))]
    else:
        check_best_first(row, "answers")
        ranks = list(range(len(answers)))
    return ranked(with_columns(row, a_prompt(row)), answers, ranks)


def texts_of(row: Row, column: str) -> list[str]:
    """A list of texts, at least one."""
    values = from_text(value_of(row, column))
    if not isinstance(values, list) or not values:
        raise BadRow(f'"{column}" must be a list of texts, but is {describe(values)}')
    name = column.removesuffix("s")
    return [sound_text(value, f"{name} {number}") for number, value in enumerate(values, start=1)]


def check_best_first(row: Row, column: str) -> None:
    """Raise `BadRow` where a list of answers would be taken as the best first beside a column that may say
    otherwise."""
    for verdict in JUDGEMENTS:
        if has(row, verdict):
            raise BadRow(
                f'"{column}" would be read as the best answer first, and what "{verdict}" says of them is '
                'not known; give numbers as "scores" (higher is better) or "ranks" (lower is better) beside '
                f'"prompt" and "answers", or remove "{verdict}"'
            )


def _numbers(row: Row, column: str, count: int) -> list[float]:
    values = from_text(row[column])
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(
            f'"{column}" must be a list of {count} numbers, one an answer, but is {describe(values)}'
        )
    return [finite_number(value, f'{number} of "{column}"') for number, value in enumerate(values, start=1)]


@layout("hh", "chosen", "rejected")
def whole_dialogues(row: Row) -> Comparison:
    """Two dialogues that differ in the last answer: "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH, or
    messages. Dialogues that part earlier compare answers to different prompts and are dropped.
    """
    check_scores(row)
    return parted(row, "chosen", "rejected", margin=margin(row))


def parted(row: Row, better: str, worse: str, **settings: Any) -> Comparison:
    """The prompt that the dialogues in those columns share, and their last answers."""
    is_text = not isinstance(messages_from_text(row.get(better)), list)
    cut = _cut_marked_dialogue if is_text else _cut_messages
    prompt, chosen = cut(row, better)
    other_prompt, rejected = cut(row, worse)
    if prompt != other_prompt:
        raise DroppedRow("dialogues that part before their last answer")
    prompt = text_prompt(prompt) if isinstance(prompt, str) else prompt
    return Comparison(with_columns(row, prompt), (chosen, rejected), **settings)


def _cut_messages(row: Row, column: str) -> tuple[Prompt, Reply]:
    message = messages_from_text(value_of(row, column))
    return prompt_and_answer(turns(message, f'"{column}"'), f'"{column}"')


def _cut_marked_dialogue(row: Row, column: str) -> tuple[str, str]:
    before, marker, answer = unix_marks(text(row, column)).rpartition(ASSISTANT)
    if not marker:
        raise BadRow(
            f'"{column}" holds no {ASSISTANT!r}, and the row no "prompt"; '
            "give whole dialogues, or the prompt in a column of its own"
        )
    if HUMAN in answer:
        raise DroppedRow("dialogues that end with a question")
    if not before.strip():
        raise BadRow(f'"{column}" has an answer but no question before it')
    if not answer.strip():
        raise DroppedRow("empty answers")  # HH has some
    return before + marker, answer
