"""A reward function may raise, hang, die or return nonsense: the bad answers are found, the others scored."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from processes import environment

from dschat.errors import UserError
from dschat.rlhf.rewards import function as function_module
from dschat.rlhf.rewards.function import RewardFunction
from dschat.rlhf.rewards.text_answers import Problem, TextAnswers

RULES = """
import ctypes, os, re, sys, time
from pathlib import Path


def lengths(prompts, answers, answer, extra=None):
    print("this is no reply")
    os.system("echo neither is this")
    assert sys.stdin.read() == ""
    return [10.0 * len(a) + b for a, b in zip(answers, answer)]


def everything(prompts, answers, **columns):
    return [float(len(columns) + len(p)) for p in prompts]


def faulty(prompts, answers):
    for answer in answers:
        if answer == "raise":
            raise RuntimeError("cannot read it")
        if answer == "sleep":
            time.sleep(60)
        if answer == "regex":
            re.match("(a+)+$", "a" * 60 + "b")
        if answer == "exit":
            os._exit(3)
        if answer == "sys.exit":
            sys.exit("bye")
        if answer == "crash":
            os.kill(os.getpid(), 11)
    odd = {"nan": float("nan"), "inf": 1e999, "huge": 1e300, "text": "1.0", "none": None}
    return [odd.get(answer, 1.0) for answer in answers]


def one_score(prompts, answers):
    return [1.0]


def no_list(prompts, answers):
    return 1.0


class Array:
    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


def array(prompts, answers):
    return Array([True] * len(answers))


def out_of_memory_score(prompts, answers):
    return [float(Path("/proc/self/oom_score_adj").read_text())] * len(answers)


def process(prompts, answers):
    return [float(os.getpid())] * len(answers)


class Number:
    def __float__(self):
        return 2.0


def generated(prompts, answers):
    return (Number() if answer == "number" else len(answer) for answer in answers)


def endless(prompts, answers):
    while True:
        yield 1.0


def faulty_generator(prompts, answers):
    for answer in answers:
        yield 1 / len(answer)


def named_scores(prompts, answers):
    return {answer: 1.0 for answer in answers}


def chatters(prompts, answers):
    print("x" * 1_000_000)
    os.write(1, b"y" * 1_000_000)
    return [0.1 + len(prompt) / 3 for prompt in prompts]


def shouts(prompts, answers):
    for _ in range(3):
        print("\u00e9" * 100_000)
        print("\u00e9", file=sys.stderr)
    return [1.0] * len(answers)


def forks_and_comes_back(prompts, answers):
    os.fork()
    return [float(len(answer)) for answer in answers]


def forks_and_dies(prompts, answers):
    if os.fork() == 0:
        time.sleep(60)
    os._exit(3)


def answers_alone(answers):
    return [1.0] * len(answers)
"""
TIMEOUT = 0.5


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rules.py"
    path.write_text(RULES)
    return path


def function(path, name, *, batch_size=8, available=()):
    return RewardFunction(f"{path}:{name}", batch_size=batch_size, seconds=TIMEOUT, available=available)


def test_scores_may_be_what_yields_numbers(rules):
    assert function(rules, "generated").score(answered("a", "number", "ccc")) == [1.0, 2.0, 3.0]
    problem = Problem(
        "ZeroDivisionError", f"ZeroDivisionError: division by zero (rules.py:{line_of('1 / len')})"
    )
    assert function(rules, "faulty_generator").score(answered("a", "", "bb")) == [1.0, problem, 0.5]
    endless = Problem("no scores", "it returned more than 1 scores for 1 answers")
    assert function(rules, "endless").score(answered("a", "b")) == [endless, endless]
    (named,) = function(rules, "named_scores").score(answered("a"))
    assert named == Problem("no scores", "it returned {'a': 1.0} and no list of scores")


def test_more_than_a_pipe_holds_goes_through_it_both_ways_beside_what_the_function_prints(rules):
    source = RewardFunction(f"{rules}:chatters", batch_size=20_000, seconds=30)
    long = TextAnswers(["p" * 10] * 20_000, ["é" * 20] * 20_000, {})
    assert source.score(long) == [0.1 + 10 / 3] * 20_000  # replies of 400 kB


def test_prints_that_no_one_reads_or_can_encode_are_no_failure(rules):
    """Of a run whose output goes to `| head`, in a locale of ASCII."""
    program = (
        "from dschat.rlhf.rewards.text_answers import TextAnswers\n"
        "from dschat.rlhf.rewards.function import RewardFunction\n"
        f"source = RewardFunction({str(rules) + ':shouts'!r}, batch_size=8, seconds=30)\n"
        "open('/proc/self/fd/5', 'w').write(str(source.score(TextAnswers(['p'], ['a'], {}))))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    result, report = os.pipe()
    child = f'exec 5>&{report}; exec "$0" -c "$1" 2>&{writer}'
    env = environment(PYTHONIOENCODING="ascii")
    subprocess.run(
        ["bash", "-c", child, sys.executable, program], pass_fds=[writer, report], env=env, check=True
    )
    os.close(report)
    assert os.read(result, 100) == b"[1.0]"


def test_a_fork_of_the_function_gives_no_second_reply(rules):
    source = function(rules, "forks_and_comes_back")
    assert [source.score(answered("a" * n)) for n in (1, 2, 3)] == [[1.0], [2.0], [3.0]]


def test_a_fork_that_holds_the_pipe_does_not_hold_up_the_run(rules):
    source, start = function(rules, "forks_and_dies"), time.monotonic()
    source._seconds = 30
    assert source.score(answered("a")) == [Problem("exit", "its process ended with exit code 3")]
    assert time.monotonic() - start < 10


def answered(*answers, **columns):
    return TextAnswers([f"p{i}" for i in range(len(answers))], list(answers), columns)


def line_of(text):
    return next(number for number, line in enumerate(RULES.splitlines(), 1) if text in line)


def test_a_function_gets_the_columns_it_names_and_may_print_and_read_stdin(rules):
    source = function(rules, "lengths", available=("answer", "question"))
    got = source.score(answered("a", "bb", answer=[1, 2], question=["x", "y"]))
    assert got == [11.0, 22.0]


def test_a_function_with_columns_gets_all_of_them(rules):
    source = function(rules, "everything", available=("answer", "question"))
    assert source.score(answered("a", answer=[1], question=["x"])) == [4.0]


def test_scores_may_be_an_array_and_batches_are_cut(rules):
    assert function(rules, "array", batch_size=2).score(answered("a", "b", "c")) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        ("raise", "RuntimeError", f"RuntimeError: cannot read it (rules.py:{line_of('cannot read it')})"),
        ("sleep", "hangs", f"no score after 0.5 s (--reward_timeout) (rules.py:{line_of('sleep(60)')})"),
        ("regex", "hangs", f"no score after 0.5 s (--reward_timeout) (rules.py:{line_of('(a+)+')})"),
        ("exit", "exit", "its process ended with exit code 3"),
        ("sys.exit", "SystemExit", f"SystemExit: bye (rules.py:{line_of('sys.exit(')})"),
        ("crash", "signal 11", "its process died of SIGSEGV"),
        ("nan", "no finite number", "it returned nan, which is no finite number"),
        ("inf", "no finite number", "it returned inf, which is no finite number"),
        ("huge", "no finite number", "it returned 1e+300, which is no finite number"),
        ("text", "no finite number", "it returned '1.0', which is no finite number"),
        ("none", "no finite number", "it returned None, which is no finite number"),
    ],
)
def test_one_bad_answer_is_found_and_the_others_have_their_scores(rules, bad, kind, text):
    source = function(rules, "faulty")
    assert source.score(answered("a", bad, "b")) == [1.0, Problem(kind, text), 1.0]
    assert source.score(answered("c")) == [1.0]  # the next batch has a worker again


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one_score", "it returned 1 scores for 2 answers"),
        ("no_list", "it returned 1.0 and no list of scores"),
    ],
)
def test_what_is_no_list_of_scores_is_tried_answer_by_answer(rules, name, text):
    alone = {"one_score": 1.0, "no_list": Problem("no scores", text)}[name]
    assert function(rules, name).score(answered("a", "b")) == [alone, alone]


@pytest.mark.slow
def test_a_function_that_always_hangs_costs_a_bounded_time(rules, monkeypatch):
    monkeypatch.setattr(function_module, "MAX_LOST_WORKERS", 3)
    start = time.monotonic()
    kinds = [problem.kind for problem in function(rules, "faulty").score(answered(*["sleep"] * 20))]
    assert kinds == ["hangs"] * 2 + ["not tried"] * 18  # the first time-out was the batch's
    assert time.monotonic() - start < 3 * (TIMEOUT + 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/oom_score_adj"), reason="Linux says so")  # noqa: PTH110
def test_memory_that_runs_out_takes_the_worker_first(rules):
    assert function(rules, "out_of_memory_score").score(answered("a")) == [1000.0]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "f", "there is no file"),
        ("def f(prompts, answers:\n    pass\n", "f", r"SyntaxError: .*\(rule\.py:1\)"),
        ("import json\n\n1 / 0\n", "f", r"ZeroDivisionError: division by zero \(rule\.py:3\)"),
        ("import no_such_library\n", "f", r"No module named 'no_such_library' \(rule\.py:1\)"),
        ("def g(prompts, answers): pass\n", "f", r"no function 'f' \(found: g\)"),
        (
            "def f(texts, answers): pass\n",
            "f",
            r"takes \(texts, answers\), but must take prompts and answers",
        ),
        (
            "def f(prompts, answers, solution): pass\n",
            "f",
            r"needs the column 'solution'.*: answer, question",
        ),
        ("import os\nos._exit(1)\n", "f", "the process ended"),
    ],
)
def test_a_file_that_cannot_serve_is_told_at_the_start(tmp_path, content, name, message):
    path = tmp_path / "rule.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"--reward_function .*rule.py:{name}.*{message}"):
        function(path, name, available=("answer", "question"))


def test_a_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour.py").write_text("SCORE = 4.0\n")
    (tmp_path / "rule.py").write_text(
        "from neighbour import SCORE\ndef f(prompts, answers):\n    return [SCORE] * len(answers)\n"
    )
    assert function(tmp_path / "rule.py", "f").score(answered("a")) == [4.0]


def test_the_worker_ends_with_its_owner(rules):
    source = function(rules, "process")
    (pid,) = map(int, source.score(answered("a")))
    assert psutil.pid_exists(pid)
    del source
    assert not psutil.pid_exists(pid)


def test_no_worker_outlives_a_run_that_is_killed(rules, tmp_path):
    """Not even one that is busy: it ends when its time is up."""
    script = (
        "import sys\n"
        "from dschat.rlhf.rewards.text_answers import TextAnswers\n"
        "from dschat.rlhf.rewards.function import RewardFunction\n"
        f"source = RewardFunction({str(rules)!r} + ':faulty', batch_size=8, seconds=1)\n"
        "print(source._worker._process.pid, flush=True)\n"
        "source.score(TextAnswers(['p'], ['sleep'], {}))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment()
    )
    pid = int(run.stdout.readline())
    time.sleep(0.3)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)
