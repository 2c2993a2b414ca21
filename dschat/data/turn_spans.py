"""Positions of turns in a rendered conversation, to learn them or to leave them out."""

import json
from collections.abc import Sequence

from dschat.data.answer_marks import AnswerMarks
from dschat.data.comparisons import Turn
from dschat.data.rendering import Renderer, shared_start

PLACE = "\ue000a place\ue000"
"""Content put in the place of a turn's own, to find where a template shows it."""

Span = tuple[int, int]


class TurnSpans:
    """Finds turns in rendered text: their own words with the mark that ends each, not the one before."""

    def __init__(self, renderer: Renderer, marks: AnswerMarks) -> None:
        self._renderer = renderer
        self._marks = marks

    def find(self, turns: Sequence[Turn], numbers: Sequence[int], whole: str) -> dict[int, Span]:
        """Where `whole` shows the turns of those numbers; less those that it shows in another form, such as
        without their thoughts."""
        by_place = [number for number in numbers if self._is_shown_alone(turns[number])]
        spans = self._at_places(turns, by_place, whole) if by_place else {}
        if spans is None:
            alone = [self._at_places(turns, [number], whole) for number in by_place]
            spans = {number: span for found in alone if found for number, span in found.items()}
        position = 0
        for number in sorted(numbers):
            if number not in spans and turns[number].role == "assistant":
                found = self._as_generated(turns, number, whole, position)
                spans |= {number: found} if found else {}
            position = spans.get(number, (0, position))[1]
        return spans

    def _is_shown_alone(self, turn: Turn) -> bool:
        """Whether the turn's content is all that it says."""
        return bool(turn.content) and not {"reasoning", "tool_calls"} & set(json.loads(turn.fields or "{}"))

    def _at_places(self, turns: Sequence[Turn], numbers: Sequence[int], whole: str) -> dict[int, Span] | None:
        """The turns by what the template shows in their places; None unless it shows them all as they are."""
        places = [
            turn._replace(content=PLACE) if number in numbers else turn for number, turn in enumerate(turns)
        ]
        first, *rest = self._renderer.render(places, True).split(PLACE)
        if len(rest) != len(numbers):
            return None
        shown, spans = first, {}
        for number, following in zip(sorted(numbers), rest, strict=True):
            spans[number] = (len(shown), len(shown) + len(turns[number].content))
            shown += turns[number].content + following
        if shown != whole:
            return None
        position = 0
        for number, (start, end) in spans.items():
            lead, close = self._marks.lead, self._marks.close_inside
            if turns[number].role == "assistant":
                start -= len(lead) * whole.endswith(lead, position, start)
            position = end + len(close) * whole.startswith(close, end)
            spans[number] = (start, position)
        return spans

    def _as_generated(self, turns: Sequence[Turn], number: int, whole: str, position: int) -> Span | None:
        """The turn where `whole` shows it as it would be generated, after the generation prompt."""
        if number == 0:
            return None
        before, after = (
            self._renderer.attempt(turns[:number], True),
            self._renderer.attempt(turns[: number + 1]),
        )
        asked = before.removesuffix(self._marks.opens)
        thinks = self._thinks(turns[number])
        if not asked or not after.startswith(asked) or (asked != before and thinks):
            return None
        answer = after[len(asked) :]
        if self._marks.ending and answer.endswith(self._marks.ending):
            answer = answer.removesuffix(self._marks.ending) + self._marks.close_inside
        if not answer.strip():
            return None
        prompt = asked[len(shared_start(asked, self._renderer.attempt(turns[:number]))) :]
        # Earlier answers may be shown without the empty thought that stands before the last one.
        for shown in (answer, *([] if thinks else [answer.removeprefix(self._marks.lead)])):
            start = whole.find(
                prompt + shown, len(asked) - len(prompt) if whole.startswith(asked) else position
            )
            if start >= 0:
                return start + len(prompt), start + len(prompt) + len(shown)
        return None

    def _thinks(self, turn: Turn) -> bool:
        """Whether a thought stands before the turn's content."""
        in_text = (self._marks.thought_end or "</think>") in turn.content
        return in_text or "reasoning" in json.loads(turn.fields or "{}")
