"""The example rule: which number an answer ends with, and what it scores."""

import importlib.util
from fractions import Fraction

import pytest
from processes import ROOT

FILE = ROOT / "step3_ppo" / "rewards" / "gsm8k.py"
spec = importlib.util.spec_from_file_location("gsm8k_reward", FILE)
gsm8k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm8k)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 left.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $1,250.50", Fraction(2501, 2)),
        ("#### -5", -5),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("#### $ 40", 40),
        ("#### 20%", 20),
        ("#### .5", Fraction(1, 2)),
        ("#### 10.0", 10),
        ("#### 10.", 10),
        ("#### 5 apples and 6 pears", 5),
        ("#### 5 or\n#### 6", 6),
        ("The answer is 1,000,000 dollars.", 1000000),
        ("first 3 then 4", 4),
        ("7 - 5", 5),
        ("7-5", 5),
        ("3 #### none", 3),
        ("x2 and B52", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_an_answer_ends_with(text, number):
    assert gsm8k.final_number(text) == number


@pytest.mark.parametrize(
    ("answer", "score"),
    [("#### 1,234", 1), ("so it is 1234.00", 1), ("#### 12", 0.1), ("it is 12", 0), ("1234 #### 12", 0.1),
     ("####", 0), ("#### x", 0), ("", 0)],
)  # fmt: skip
def test_right_is_1_and_a_wrong_number_in_the_right_form_a_little(answer, score):
    assert gsm8k.exact_answer(["p"], [answer], ["2 * 617 = <<2*617=1234>>1234\n#### 1234"]) == [score]


def test_a_row_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="no number in the row's answer 'none'"):
        gsm8k.exact_answer(["p"], ["1"], ["none"])
