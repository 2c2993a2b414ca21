"""Prompts and answers to token ids, and within a limit of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from dschat.data.cells import DroppedRow
from dschat.data.comparisons import Prompt, Reply, text_of
from dschat.data.special_text import SpecialText
from dschat.data.templates import TOOLS, ChatTemplate
from dschat.data.token_turns import tokens_of
from dschat.data.tokenizer_fingerprint import start_tokens
from dschat.data.truncation import Truncation
from dschat.errors import UserError

MISSED = "thoughts of earlier answers, so that these are not learned"
"""What a template does not show where earlier turns are missed."""


@dataclass(frozen=True)
class EncodedRow:
    """One prompt and answers to it, as token ids."""

    prompt: list[int]
    learned: list[bool]
    """Of the prompt's tokens, those that step 1 learns."""
    answers: list[list[int]]
    answer_learned: bool = True
    """Whether step 1 learns the answer."""
    num_missed: int = 0
    """Earlier turns that it ought to learn but does not, for they are shown in another form."""
    truncation: Truncation = Truncation.WHOLE

    @property
    def size(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(map(len, self.answers), default=0)


Reread = Callable[[list[int], list[Prompt]], list[EncodedRow]]


class Encoder:
    """Prompts and answers to token ids, with a tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._special = SpecialText(tokenizer)
        self._start = start_tokens(tokenizer)
        self._end = tokenizer.eos_token_id
        self._ends = {self._end, self._template.turn_end}

    def check_answers(self) -> None:
        """Raise `UserError` where the template shows answers so that they cannot be learned."""
        self._template.check_answers()

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Prompts with the tokenizer's start tokens, once, and no end token.

        Raises `UserError` for tools that the template does not take.
        """
        rows = self.rows(prompts, [()] * len(prompts))
        if refused := sum(row.truncation == Truncation.WITH_TOOLS for row in rows):
            raise UserError(f"{refused} of the prompts are {TOOLS}; leave them out.")
        return [row.prompt for row in rows]

    def answers_alone(self, answers: Sequence[Reply], ended: Sequence[bool]) -> list[list[int]]:
        """Answers to whatever prompts, with the end token where they `ended`; at least one token each.

        The text of a special token inside an answer is encoded as text: it is not the template's.
        """
        shown = [self._template.answer_alone(*pair) for pair in zip(answers, ended, strict=True)]
        encoded = self._encode(shown)
        for number, (whole, answer) in enumerate(zip(shown, map(text_of, answers), strict=True)):
            if self._special.is_in(answer):
                before, text, after = whole.partition(answer.strip())
                parts = self._encode([before, *self._special.cut(text), after])
                encoded[number] = list(chain.from_iterable(parts))
        return [
            self._ended(ids) if whole or not ids else ids for ids, whole in zip(encoded, ended, strict=True)
        ]

    def rows(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Reply]], *, learned: bool = False
    ) -> list[EncodedRow]:
        """Each prompt with its answers; `learned` says whether the prompt is, too."""
        given = [self._given(*row, learned=learned) for row in zip(prompts, answers, strict=True)]
        texts = [
            None if row else _taken(self._template.texts, prompt, replies)
            for row, prompt, replies in zip(given, prompts, answers, strict=True)
        ]
        taken = [some for some in texts if some is not None]
        starts = iter(self._encode([asked for asked, _ in taken]))
        rest = iter(self._encode([answer for _, shown in taken for answer in shown]))
        rows = []
        for row, some, replies in zip(given, texts, answers, strict=True):
            if row is not None:
                rows.append(row)
                continue
            if some is None:
                rows.append(EncodedRow([], [], [[] for _ in replies], truncation=Truncation.WITH_TOOLS))
                continue
            ids = self._started(next(starts))
            ended = [self._ended(next(rest)) for _ in replies]
            rows.append(EncodedRow(ids, [learned] * len(ids), ended))
        return rows

    def _given(self, prompt: Prompt, answers: Sequence[Reply], *, learned: bool) -> EncodedRow | None:
        """The row as it is where the data hold its tokens, but for padding at its end; None where it is text.

        Raises `UserError` for tokens that are not in the vocabulary.
        """
        ids = tokens_of(prompt)
        if ids is None:
            return None
        ended = [self._without_padding(tokens_of(answer) or []) for answer in answers]
        largest = max(chain(ids, *ended))
        if largest >= len(self._tokenizer):
            raise UserError(
                f"token {largest} is not in the model's vocabulary of {len(self._tokenizer)}: the data were "
                "tokenised for another model."
            )
        return EncodedRow(ids, [learned] * len(ids), ended)

    def _without_padding(self, ids: list[int]) -> list[int]:
        pad = self._tokenizer.pad_token_id
        num_pads = len(list(takewhile(lambda token: token == pad, reversed(ids[1:]))))
        return ids if pad == self._end else ids[: len(ids) - num_pads]

    def conversations(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Reply],
        all_turns: Sequence[bool],
        *,
        with_prompt: bool = False,
    ) -> list[EncodedRow]:
        """Each conversation with what is learned of it, as `ChatTemplate.pieces` says."""
        found = [
            _taken(self._template.pieces, prompt, answer, all_turns=flag, with_prompt=with_prompt)
            for prompt, answer, flag in zip(prompts, answers, all_turns, strict=True)
        ]
        rest = iter(self._encode([text for some in found if some for text, _ in some[0]]))
        return [
            EncodedRow([], [], [[]], truncation=Truncation.WITH_TOOLS)
            if some is None
            else self._joined([(next(rest), learned) for _, learned in some[0]], some[1], with_prompt)
            for some in found
        ]

    def unshown(self, prompt: Prompt, answers: Sequence[Reply], num_missed: int = 0) -> str:
        """What the template does not show of the row, a name a line; mostly nothing."""
        if tokens_of(prompt) is not None:
            return ""
        return "\n".join(
            [*sorted(self._template.unshown(prompt, answers)), *([MISSED] if num_missed else [])]
        )

    def _joined(self, pieces: list[tuple[list[int], bool]], num_missed: int, with_prompt: bool) -> EncodedRow:
        *before, (answer, answer_learned) = pieces
        ids = list(chain.from_iterable(ids for ids, _ in before))
        learned = list(chain.from_iterable([flag] * len(ids) for ids, flag in before))
        started = self._started(ids)
        learned = [with_prompt] * (len(started) - len(ids)) + learned
        return EncodedRow(started, learned, [self._ended(answer)], answer_learned, num_missed)

    def fitted(
        self, rows: Sequence[EncodedRow], prompts: Sequence[Prompt], max_tokens: int, reread: Reread
    ) -> list[EncodedRow]:
        """The rows within `max_tokens`, without their first turns or cut; or marked as to be dropped.

        `reread` makes the rows of those numbers of shorter prompts.
        """
        rows, prompts = list(rows), list(prompts)
        too_long = [number for number, row in enumerate(rows) if row.size > max_tokens]
        while too_long:
            shorter = [
                self._template.without_first_exchange(prompts[n]) if tokens_of(prompts[n]) is None else None
                for n in too_long
            ]
            left = [(number, prompt) for number, prompt in zip(too_long, shorter, strict=True) if prompt]
            too_long = [number for number, _ in left]
            again = reread(too_long, [prompt for _, prompt in left])
            for (number, prompt), row in zip(left, again, strict=True):
                prompts[number] = prompt
                rows[number] = (
                    replace(row, truncation=Truncation.FEWER_TURNS)
                    if row.truncation == Truncation.WHOLE
                    else row
                )
            too_long = [number for number in too_long if rows[number].size > max_tokens]
        return [self._cut_to(max_tokens, *pair) for pair in zip(rows, prompts, strict=True)]

    def _cut_to(self, max_tokens: int, row: EncodedRow, prompt: Prompt) -> EncodedRow:
        if len(row.prompt) > max_tokens:
            return replace(row, truncation=Truncation.LONG_PROMPT)
        if row.size <= max_tokens:
            return row
        if tokens_of(prompt) is not None:
            start = len(self._start) if row.prompt[: len(self._start)] == self._start else 0
            return _cut(row, max_tokens, start, start)
        marks = self._started(self._encode([self._template.before_question(prompt)])[0])
        # A space at the end of the marks may be one token with the question's first word.
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(marks, row.prompt, strict=False))
        return _cut(row, max_tokens, len(self._start), len(list(shared)))

    def _started(self, ids: list[int]) -> list[int]:
        start = self._start
        return ids if start and ids[: len(start)] == start else start + ids

    def _ended(self, ids: list[int]) -> list[int]:
        """The answer with one end token: the first that it ends with, or else the tokenizer's."""
        num_ends = len(list(takewhile(lambda token: token in self._ends, reversed(ids))))
        return ids[: len(ids) - num_ends + 1] if num_ends else [*ids, self._end]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]


def _cut(row: EncodedRow, max_tokens: int, num_start: int, num_marks: int) -> EncodedRow:
    """The row within `max_tokens`: the prompt gives way and keeps at least its last token; only then are
    answers cut, and still end with their end token.

    The prompt's first `num_start` tokens stay, and the first `num_marks`, which stand before its question,
    where there is room for more than them.
    """
    room = max_tokens - max(map(len, row.answers))
    num_head = num_marks if num_start < num_marks < min(room, len(row.prompt)) else num_start
    first = max(len(row.prompt) - max(room - num_head, 1), num_head)
    prompt = row.prompt[:num_head] + row.prompt[first:]
    learned = row.learned[:num_head] + row.learned[first:]
    room = max_tokens - len(prompt)
    answers = [ids if len(ids) <= room else ids[: room - 1] + ids[-1:] for ids in row.answers]
    return replace(row, prompt=prompt, learned=learned, answers=answers, truncation=Truncation.CUT)


def _taken(show: Callable, *conversation: object, **settings: bool) -> Any:
    """What the template shows of a conversation; None where it does not take the tools in it."""
    try:
        return show(*conversation, **settings)
    except DroppedRow:
        return None
