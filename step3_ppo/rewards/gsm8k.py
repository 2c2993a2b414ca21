"""A rule as a reward, for GSM8K and data like it: is the number that the answer ends with the right one?

python step3_ppo/main.py --reward_function step3_ppo/rewards/gsm8k.py:exact_answer ...

The right number is the one that the row's own answer ends with, in the column `answer`. Copy this file for a
rule of your own: a reward function takes lists and returns a list, one score an answer (docs/rewards.md).
"""

import re
from fractions import Fraction

RIGHT = 1.0
WELL_FORMED = 0.1
"""For a wrong number behind ####: a little, so that there is something to learn before the first success."""

MARK = "####"
NUMBER = re.compile(
    r"(?<![\w.])([-+]?)(?:[$€£]\s?)?([-+]?)(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
"""Signs before or after a currency, thousands in commas; not a digit inside a word."""


def exact_answer(prompts: list[str], answers: list[str], answer: list[str]) -> list[float]:
    """1 for the right number, 0.1 for another one behind ####, else 0; `answer` is the rows' column."""
    return [score(given, right) for given, right in zip(answers, answer, strict=True)]


def score(given: str, right: str) -> float:
    """The score of one answer. Raises ValueError where the right answer has no number."""
    expected = final_number(right)
    if expected is None:
        raise ValueError(f"no number in the row's answer {right!r}")
    if final_number(given) == expected:
        return RIGHT
    return WELL_FORMED if marked_number(given) is not None else 0.0


def final_number(text: str) -> Fraction | None:
    """The first number behind the last ####, else the last number; None without any."""
    marked = marked_number(text)
    return marked if marked is not None else next(reversed(_numbers(text)), None)


def marked_number(text: str) -> Fraction | None:
    """The first number behind the last ####."""
    _, mark, behind = text.rpartition(MARK)
    return next(iter(_numbers(behind)), None) if mark else None


def _numbers(text: str) -> list[Fraction]:
    """Every number in the text: "$1,250.50" is 1250.5; the unit, also a percent sign, does not count."""
    found = NUMBER.findall(text)
    return [
        Fraction(digits.replace(",", "")) * (-1 if "-" in (before + after) else 1)
        for before, after, digits in found
    ]
