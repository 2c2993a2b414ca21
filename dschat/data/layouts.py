"""Layouts: how a row of a data set becomes a Comparison. Each is one small function, known by its columns.

To add one, write a function from a row to a Comparison and put `@layout(name, column, ...)` above it. Where
several fit a row, the one that was registered first is taken, so the more columns, the earlier. The name is
what --data_format takes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dschat.data.cells import BadRow, DroppedRow, Row, describe, finite_number, sound_text, text, value_of
from dschat.data.comparisons import MARK, Comparison, Prompt, Reply, Turn, parse_dialogue
from dschat.data.messages import asked, prompt_and_answer, reply, turns

ReadRow = Callable[[Row], Comparison]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
WINDOWS_MARK = re.compile(r"\r\n\r\n(Human|Assistant):")


@dataclass(frozen=True)
class Layout:
    """A way to read rows that have certain columns."""

    name: str
    columns: tuple[str, ...]
    read: ReadRow


LAYOUTS: dict[str, Layout] = {}
"""The known layouts by name, in the order in which they are tried."""


def layout(name: str, *columns: str) -> Callable[[ReadRow], ReadRow]:
    """Register the function below as the layout of rows with these columns."""

    def register(read: ReadRow) -> ReadRow:
        LAYOUTS[name] = Layout(name, columns, read)
        return read

    return register


def recognise(row: Row) -> Layout:
    """The layout of a row by its columns. Raises `BadRow` where none fits."""
    for known in LAYOUTS.values():
        if set(known.columns) <= set(row) and not _half_a_pair(known, row):
            return known
    found = ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in map(str, row)) or "none"
    closest = max(LAYOUTS.values(), key=lambda known: len(set(known.columns) & set(row)))
    missing = ", ".join(f'"{column}"' for column in closest.columns if column not in row)
    listed = "; or ".join(", ".join(known.columns) for known in LAYOUTS.values())
    raise BadRow(
        f"the row has no {missing}; its columns are: {found}; the known layouts are: {listed}; "
        "--prompt_key, --chosen_key, --rejected_key and --messages_key name columns that are called otherwise"
        + "".join(
            f'; if the rows are the objects in "{name}", save that list alone'
            for name, value in row.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        )
    )


def _half_a_pair(known: Layout, row: Row) -> bool:
    """Whether the layout would overlook that one answer of a pair is missing."""
    return "chosen" not in known.columns and ("chosen" in row) != ("rejected" in row)


def text_prompt(value: str) -> str:
    """A prompt that is text. Raises `DroppedRow` where it ends with no question that an answer fits."""
    value = _unix_marks(value)
    marks = list(MARK.finditer(value))
    if marks and marks[-1][1] == "Assistant" and value[marks[-1].end() :].strip():
        raise DroppedRow("prompts that end inside an answer")
    said = parse_dialogue(value)
    if not said or said[-1].role != "user":
        raise DroppedRow("prompts with an empty question")
    return value


def _unix_marks(value: str) -> str:
    """The text with Unix line endings, if it is a dialogue whose marks stand after Windows' own."""
    return value.replace("\r\n", "\n") if WINDOWS_MARK.search(value) else value


def a_prompt(row: Row, column: str = "prompt") -> Prompt:
    """The prompt in that column: text, or messages of which the last is a question."""
    if isinstance(row.get(column), list):
        prompt = turns(row[column], f'"{column}"')
        if prompt[-1].role == "assistant":
            raise DroppedRow("prompts that end with an answer")
        return asked(prompt, f'"{column}"')
    return text_prompt(text(row, column))


def margin(row: Row) -> float:
    """The row's margin, 0 where it has none."""
    value = row.get("margin")
    if value is None:
        return 0.0
    number = finite_number(value, '"margin"')
    if number < 0:
        raise BadRow(f'"margin" must be at least 0, but is {number}')
    return number


def ranked(prompt: Prompt, answers: Sequence[str], ranks: Sequence[float], **settings: Any) -> Comparison:
    """A Comparison of answers in any order; the lower the rank, the better."""
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    return Comparison(
        prompt, tuple(answers[i] for i in order), tuple(float(ranks[i]) for i in order), **settings
    )


@layout("preference", "prompt", "chosen", "rejected")
def answers_to_a_prompt(row: Row) -> Comparison:
    """A prompt and two answers, each text or messages; messages may repeat the prompt before the answer."""
    return _continued(row, a_prompt(row), "chosen", "rejected", margin=margin(row))


def _continued(row: Row, prompt: Prompt, *columns: str, **settings: Any) -> Comparison:
    """The prompt and its answers in those columns; what stands before the answers must be the prompt."""
    befores, answers = zip(*(_end_of(row, column) for column in columns), strict=True)
    repeated = {before: column for before, column in zip(befores, columns, strict=True) if before}
    if len(repeated) > 1:
        raise DroppedRow("dialogues that part before their last answer")
    for before, column in repeated.items():
        prompt = _whole_prompt(before, prompt, column)
    return Comparison(prompt, answers, **settings)


def _end_of(row: Row, column: str) -> tuple[tuple[Turn, ...], Reply]:
    """An answer, and the messages before it if there are any."""
    value = row.get(column)
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
    """`conversations` up to the question, and two answers as messages or text; `system` may stand apart."""
    prompt = a_prompt(row, "conversations")
    comparison = _continued(row, prompt, "chosen", "rejected", margin=margin(row))
    if not isinstance(comparison.prompt, str):
        return replace(comparison, prompt=_with_system(row, comparison.prompt))
    said = parse_dialogue(comparison.prompt)
    told = _with_system(row, said)
    return comparison if told == said else replace(comparison, prompt=told)


@layout("ranked", "prompt", "answers")
def several_answers(row: Row) -> Comparison:
    """A prompt and a list of answers, the best first; or in any order with `scores` (higher is better) or
    `ranks` (lower is better), where equal numbers are a tie."""
    answers = value_of(row, "answers")
    if not isinstance(answers, list) or not answers:
        raise BadRow(f'"answers" must be a list of texts, but is {describe(answers)}')
    answers = [sound_text(answer, f"answer {number}") for number, answer in enumerate(answers, start=1)]
    if row.get("ranks") is not None:
        ranks = _numbers(row, "ranks", len(answers))
    elif row.get("scores") is not None:
        # 0.0 - 0.0 is 0.0, but -0.0 would be written as another row.
        ranks = [0.0 - score for score in _numbers(row, "scores", len(answers))]
    else:
        ranks = list(range(len(answers)))
    return ranked(a_prompt(row), answers, ranks)


def _numbers(row: Row, column: str, count: int) -> list[float]:
    values = row[column]
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
    is_text = not isinstance(row.get("chosen"), list)
    cut = _cut_marked_dialogue if is_text else _cut_messages
    prompt, chosen = cut(row, "chosen")
    other_prompt, rejected = cut(row, "rejected")
    if prompt != other_prompt:
        raise DroppedRow("dialogues that part before their last answer")
    prompt = text_prompt(prompt) if isinstance(prompt, str) else prompt
    return Comparison(prompt, (chosen, rejected), margin=margin(row))


def _cut_messages(row: Row, column: str) -> tuple[Prompt, Reply]:
    return prompt_and_answer(turns(value_of(row, column), f'"{column}"'), f'"{column}"')


def _cut_marked_dialogue(row: Row, column: str) -> tuple[str, str]:
    before, marker, answer = _unix_marks(text(row, column)).rpartition(ASSISTANT)
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


@layout("messages", "messages")
def messages(row: Row) -> Comparison:
    """A conversation; step 1 learns all that the assistant says in it."""
    prompt, answer = prompt_and_answer(turns(value_of(row, "messages"), '"messages"'), '"messages"')
    return Comparison(prompt, (answer,), learn_all_turns=True)


@layout("sharegpt", "conversations")
def sharegpt(row: Row) -> Comparison:
    """The same as messages, from {"from": "human" | "gpt" | "system", "value"}; `system` may stand apart."""
    conversation = _with_system(row, turns(value_of(row, "conversations"), '"conversations"'))
    prompt, answer = prompt_and_answer(conversation, '"conversations"')
    return Comparison(prompt, (answer,), learn_all_turns=True)


def _with_system(row: Row, conversation: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The conversation, led by the message in the column `system` where it has none of its own."""
    apart = row.get("system")
    nothing = apart is None or (isinstance(apart, str) and not apart.strip())
    if nothing or conversation[0].role == "system":
        return conversation
    return (Turn("system", text(row, "system").strip()), *conversation)


@layout("alpaca", "instruction", "output")
def alpaca(row: Row) -> Comparison:
    """An instruction, where there is one an input below it, and the answer."""
    extra = row.get("input")
    question = text(row, "instruction").strip()
    if extra is not None and extra != "":
        question += f"\n\n{text(row, 'input').strip()}"
    return Comparison((Turn("user", question),), (text(row, "output"),))


@layout("question_answer", "question", "answer")
def question_answer(row: Row) -> Comparison:
    """A question and its answer, as in GSM8K."""
    return Comparison((Turn("user", text(row, "question").strip()),), (text(row, "answer"),))


@layout("prompt_completion", "prompt", "completion")
def prompt_completion(row: Row) -> Comparison:
    """A prompt and one answer, each text or messages."""
    return _continued(row, a_prompt(row), "completion")


@layout("prompt_response", "prompt", "response")
def prompt_response(row: Row) -> Comparison:
    """A prompt and one answer under another name."""
    return _continued(row, a_prompt(row), "response")


@layout("prompt_only", "prompt")
def prompt_only(row: Row) -> Comparison:
    """A prompt without an answer, for step 3."""
    return Comparison(a_prompt(row))
