"""The worker's protocol: which columns a function takes, and what its results and errors become."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dschat.rlhf.rewards import function_worker
from dschat.rlhf.rewards.function_worker import (
    BadResult,
    as_list,
    described,
    number,
    reply_to,
    shortened,
    signature,
)


def takes_some(prompts, answers, solution, level=1):
    return [1.0] * len(answers)


def takes_all(answers, prompts, **columns):
    return [1.0] * len(answers)


def takes_texts(texts, answers):
    return [1.0] * len(answers)


def test_a_function_names_its_columns_and_those_without_a_default_are_required():
    assert signature(takes_some) == {"columns": ["solution", "level"], "required": ["solution"]}
    assert signature(takes_all) == {"columns": None, "required": []}
    with pytest.raises(BadResult, match=r"takes \(texts, answers\), but must take prompts and answers"):
        signature(takes_texts)


@pytest.mark.parametrize(
    ("result", "scores"), [([1, 2], [1, 2]), ((1, 2), [1, 2]), (range(2), [0, 1]), (iter("ab"), ["a", "b"])]
)
def test_what_has_an_order_is_a_list_of_scores(result, scores):
    assert as_list(result, 2) == scores


@pytest.mark.parametrize("result", ["ab", b"ab", {1, 2}, {1: 2, 3: 4}, 5, None, [1], [1, 2, 3]])
def test_what_has_none_or_another_length_is_refused(result):
    with pytest.raises(BadResult):
        as_list(result, 2)


@pytest.mark.parametrize(
    ("score", "value"),
    [
        (1, 1.0),
        (True, 1.0),
        (-3.4e38, -3.4e38),
        (3.5e38, None),
        (float("nan"), None),
        ("1", None),
        (None, None),
    ],
)
def test_a_score_is_a_number_that_float32_holds(score, value):
    assert number(score) == value


def test_a_reply_has_none_in_the_place_of_each_bad_score_and_its_problem():
    request = {"prompts": ["p"] * 3, "answers": ["a", "b", "c"], "columns": {}}
    reply = reply_to(lambda prompts, answers: [1, None, 2.5], request, "rule.py")
    problem = ["no finite number", "it returned None, which is no finite number"]
    assert json.loads(json.dumps(reply)) == {"scores": [1.0, None, 2.5], "problems": {"1": problem}}


def test_an_error_is_described_with_the_last_line_of_the_file_that_it_passed():
    def fails(prompts, answers):
        raise KeyError("x")

    line = fails.__code__.co_firstlineno + 1
    reply = reply_to(fails, {"prompts": [], "answers": [], "columns": {}}, __file__)
    assert reply == {"problem": ["KeyError", f"KeyError: 'x' ({Path(__file__).name}:{line})"]}
    assert described(ValueError(""), "rule.py") == ["ValueError", "ValueError"]
    assert described(BadResult("no list"), "rule.py") == ["no scores", "no list"]


def test_long_texts_are_cut_to_their_first_line():
    assert shortened("one\ntwo") == "one"
    assert shortened("x" * 301) == "x" * 300 + "..."


def test_the_worker_imports_no_torch_and_ends_with_its_requests(tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import sys\ndef f(prompts, answers):\n    return ['torch' in sys.modules for _ in answers]\n"
    )
    request = json.dumps({"prompts": ["p"], "answers": ["a"], "columns": {}})
    command = [sys.executable, function_worker.__file__, str(rule), "f", "5"]
    done = subprocess.run(
        command, input=request + "\n", capture_output=True, text=True, timeout=60, check=True
    )
    columns, reply = map(json.loads, done.stdout.splitlines())
    assert columns == {"columns": [], "required": []}
    assert reply == {"scores": [0.0], "problems": {}}


def test_output_that_cannot_be_written_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    os.dup2(writer, 2)
    try:
        written = io.BufferedWriter(function_worker.LastingOutput()).write(b"lost")
    finally:
        os.dup2(stderr, 2)
        os.close(writer)
        os.close(stderr)
    assert written == 4
