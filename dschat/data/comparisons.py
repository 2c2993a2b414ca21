"""Comparison: the one form that every data set is brought into, and its file of text on the way to tokens."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from dschat.data.families import Families

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("answer_turns", pa.list_(pa.string())),
        ("ranks", pa.list_(pa.float64())),
        ("margin", pa.float64()),
        ("learn_all_turns", pa.bool_()),
        ("row", pa.string()),
    ]
)
ROWS_AT_ONCE = 1000

MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""What begins a turn of a dialogue in text."""

Answer = TypeVar("Answer")


Role = Literal["tools", "system", "user", "assistant", "tool", "tokens"]
"""Who says a message; what stands by "tools" is the list of tools that the conversation may call, and by
"tokens" the ids of what is tokenised already (`dschat.data.token_turns`)."""


class Turn(NamedTuple):
    """One message of a conversation; or, by "tools" and before all others, what tools it may call."""

    role: Role
    content: str
    """Its text; by "tools" a JSON list of function schemas."""
    learn: bool | None = None
    """Whether step 1 learns it, where the data say so; None leaves that to the layout."""
    fields: str = ""
    """What else the message says, such as its reasoning and its tool calls, as a JSON object; or nothing."""

    @property
    def is_plain(self) -> bool:
        """Whether role and content are all of it."""
        return self.learn is None and not self.fields


NAMED_FIELDS = ("reasoning", "tool_calls", "tool_call_id", "name")
"""The fields of a message that make it another one. Any other may be what nobody shows, such as an id."""

Prompt = str | tuple[Turn, ...]
"""What an answer continues: a conversation; or text, which is one message or a dialogue with its marks."""

Reply = str | Turn
"""An answer: its text, or a turn of the assistant with more to it."""


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; text in which nobody is "Human" is one question.

    What stands before the first mark is a system message; a last "Assistant:" with nothing after it asks for
    the answer and is no turn.
    """
    marks = list(MARK.finditer(text))
    if not any(mark[1] == "Human" for mark in marks):
        asks = marks and not text[marks[-1].end() :].strip()
        question = (text[: marks[-1].start()] if asks else text).strip()
        return (Turn("user", question),) if question else ()
    turns = [Turn("system", text[: marks[0].start()].strip())]
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        content = text[mark.end() : following.start() if following else len(text)].strip()
        role: Role = "user" if mark[1] == "Human" else "assistant"
        if content and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{content}")
        elif content:
            turns.append(Turn(role, content))
    return tuple(turn for turn in turns if turn.content)


@dataclass(frozen=True)
class Comparison:
    """A prompt and the answers to it, the best first. None of the text is empty.

    Without answers it is a prompt for step 3, with one it is an example for step 1, with more, whose ranks
    differ, it is also something to compare for step 2.
    """

    prompt: Prompt
    answers: tuple[Reply, ...] = ()
    ranks: tuple[float, ...] | None = None
    """One number per answer, ascending; answers of equal rank are a tie. None: 0, 1, 2, ..."""
    margin: float = 0.0
    """By how much the better answer of a pair is better, on the scale of scores."""
    learn_all_turns: bool = False
    """Whether step 1 learns what the assistant said in the prompt, too."""
    row: str | None = None
    """The whole data row as JSON, where it is kept."""
    unlearned: str = ""
    """Why the row's answer is not among the answers, to be counted when it is read."""

    def __post_init__(self) -> None:
        assert self.ranks is None or len(self.ranks) == len(self.answers)
        assert self.ranks is None or list(self.ranks) == sorted(self.ranks)
        assert math.isfinite(self.margin)

    @property
    def pairs(self) -> list[tuple[Reply, Reply]]:
        """Every (better, worse) pair of answers: K choose 2 of them, less the ties."""
        return answer_pairs(self.answers, self.ranks)


def answer_pairs(answers: Sequence[Answer], ranks: Sequence[float] | None) -> list[tuple[Answer, Answer]]:
    """The pairs of answers of different rank, better first (InstructGPT's K choose 2, arXiv:2203.02155)."""
    ranked = list(zip(range(len(answers)) if ranks is None else ranks, answers, strict=True))
    return [(a, b) for (i, a), (j, b) in combinations(ranked, 2) if i < j]


@dataclass(frozen=True)
class ComparisonIndex:
    """What a split needs to know of N comparisons, without their text."""

    keys: np.ndarray
    """A hash of each prompt, uint64 [N]; equal prompts have equal keys."""
    row_keys: np.ndarray
    """A hash of each row, prompt and answers, uint64 [N]."""
    example_keys: np.ndarray
    """A hash of what step 1 learns of each, the prompt with the best answer, uint64 [N]."""
    families: np.ndarray
    """As `Families.keys`, uint64 [N]: equal where one prompt goes on from the other."""
    sources: np.ndarray
    """The number of the source each comes from, int32 [N]."""
    in_evaluation: np.ndarray
    """Whether it is for evaluation only, bool [N]."""
    num_answers: np.ndarray
    """Answers of each, int32 [N]."""
    num_pairs: np.ndarray
    """Pairs of answers of each, int32 [N]."""


def prompt_key(prompt: Prompt) -> int:
    """A 64-bit hash that stands for the prompt, the same for a conversation as text and as messages.

    Marks that say what is learned, and fields that nobody knows, make no other prompt. That two of ten
    million share one has a chance of 3e-6.
    """
    known = [_identity(turn) for turn in _turns(prompt)]
    return _hashed(known or str(prompt).strip())


def _turns(prompt: Prompt) -> tuple[Turn, ...]:
    return parse_dialogue(prompt) if isinstance(prompt, str) else prompt


def _hashed(value: Any) -> int:
    """A 64-bit hash of a JSON value."""
    return xxhash.xxh3_64_intdigest(json.dumps(value).encode())


def _identity(turn: Turn) -> list:
    fields = json.loads(turn.fields) if turn.fields else {}
    known = {name: fields[name] for name in NAMED_FIELDS if name in fields}
    return [turn.role, turn.content, known] if known else [turn.role, turn.content]


def _contents(prompt: Prompt) -> list[tuple[str, str]]:
    """Who says what in the prompt, for `Families`: whatever else differs, one conversation goes on from the
    other."""
    return [turn[:2] for turn in _turns(prompt) if turn.role != "tools"] or [("user", str(prompt).strip())]


def _marks(prompt: Prompt) -> list[list[bool | None]]:
    """Which turns are marked as to be learned or not, where any is."""
    marks = [] if isinstance(prompt, str) else [turn.learn for turn in prompt]
    return [marks] if any(mark is not None for mark in marks) else []


def text_of(reply: Reply) -> str:
    """The answer's text, without its reasoning and its tool calls."""
    return reply if isinstance(reply, str) else reply.content


def pack_prompt(prompt: Prompt) -> str:
    """The prompt as JSON, for a column of text."""
    return json.dumps(_packed(prompt), ensure_ascii=False)


def _packed(prompt: Prompt) -> str | list[list]:
    """The prompt as JSON has it. What is plain has the form, and so the hash, that it had before there was
    anything but role and content."""
    return prompt if isinstance(prompt, str) else [list(t[:2] if t.is_plain else t) for t in prompt]


def unpack_prompt(packed: str) -> Prompt:
    """The reverse of `pack_prompt`."""
    prompt = json.loads(packed)
    return prompt if isinstance(prompt, str) else tuple(Turn(*turn) for turn in prompt)


def pack_answers(answers: Sequence[Reply]) -> tuple[list[str], list[str | None] | None]:
    """The answers' texts; and where one is more than text, for each the whole turn as JSON or None."""
    texts = [text_of(answer) for answer in answers]
    turns = [None if isinstance(answer, str) else json.dumps(answer) for answer in answers]
    return texts, turns if any(turns) else None


def unpack_answers(texts: Sequence[str], turns: Sequence[str | None] | None) -> list[Reply]:
    """The reverse of `pack_answers`."""
    if turns is None:
        return list(texts)
    return [Turn(*json.loads(turn)) if turn else text for text, turn in zip(texts, turns, strict=True)]


def write_comparisons(rows: Iterable[tuple[Comparison, int, bool]], path: Path) -> ComparisonIndex:
    """Stream (comparison, source, in evaluation) to an Arrow file of `SCHEMA`, and index them."""
    types = {"keys": np.uint64, "row_keys": np.uint64, "example_keys": np.uint64, "sources": np.int32}
    types |= {"in_evaluation": bool, "num_answers": np.int32, "num_pairs": np.int32}
    columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in types.items()}
    families = Families()
    rows = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_batch(record_batch([row[0] for row in some]))
            for name, values in _index_columns([row[0] for row in some]).items():
                columns[name].append(np.array(values, dtype=types[name]))
            columns["sources"].append(np.array([source for _, source, _ in some], dtype=np.int32))
            columns["in_evaluation"].append(np.array([held_out for _, _, held_out in some], dtype=bool))
            for comparison, _, _ in some:
                families.add(_contents(comparison.prompt))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return ComparisonIndex(families=families.keys(), **joined)


def record_batch(comparisons: Sequence[Comparison]) -> pa.RecordBatch:
    """The comparisons as a batch of `SCHEMA`."""
    answers = [pack_answers(c.answers) for c in comparisons]
    columns = [
        [pack_prompt(c.prompt) for c in comparisons],
        [texts for texts, _ in answers],
        [turns for _, turns in answers],
        [c.ranks for c in comparisons],
        [c.margin for c in comparisons],
        [c.learn_all_turns for c in comparisons],
        [c.row for c in comparisons],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _index_columns(comparisons: list[Comparison]) -> dict[str, list[int]]:
    keys = [prompt_key(c.prompt) for c in comparisons]
    examples = [
        (key, c.answers[:1], c.learn_all_turns, *_marks(c.prompt))
        for key, c in zip(keys, comparisons, strict=True)
    ]
    return {
        "keys": keys,
        "row_keys": [_hashed((_packed(c.prompt), c.answers, c.ranks, c.margin)) for c in comparisons],
        "example_keys": [_hashed(example) for example in examples],
        "num_answers": [len(c.answers) for c in comparisons],
        "num_pairs": [len(c.pairs) for c in comparisons],
    }
