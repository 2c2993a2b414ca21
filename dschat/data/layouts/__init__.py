"""Layouts: how a row of a data set becomes a Comparison. Each is one small function, known by its columns.

To add one, write a function from a row to a Comparison and put `@layout(name, column, ...)` above it, in a
file that is imported here. Where several fit a row, the one that was registered first is taken, so the more
columns, the earlier; hence the order of these imports. The name is what --data_format takes.
"""

# ruff: noqa: I001 - the order in which layouts are tried
from dschat.data.layouts.registry import LAYOUTS, Layout, ReadRow, layout, recognise
from dschat.data.layouts.prompts import a_prompt, text_prompt
from dschat.data.layouts.pairs import ASSISTANT, JUDGEMENTS, answers_to_a_prompt, whole_dialogues
from dschat.data.layouts.winners import VERDICTS, two_answers
from dschat.data.layouts.tokens import tokenised_pair
from dschat.data.layouts.examples import alpaca, question_answer

__all__ = [
    "ASSISTANT",
    "JUDGEMENTS",
    "LAYOUTS",
    "VERDICTS",
    "Layout",
    "ReadRow",
    "a_prompt",
    "alpaca",
    "answers_to_a_prompt",
    "layout",
    "question_answer",
    "recognise",
    "text_prompt",
    "tokenised_pair",
    "two_answers",
    "whole_dialogues",
]
