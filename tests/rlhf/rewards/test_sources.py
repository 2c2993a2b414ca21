"""The weighted sum of all sources of scores: the same on any number of ranks, also where something fails."""

import json
from collections import Counter

import pytest
from processes import ROOT, python
from test_endpoint import Server
from tiny import tiny_tokenizer
from workers.reward_scores import run

from dschat.errors import UserError
from dschat.rlhf.rewards.sources import Rewards

WORKER = ROOT / "tests" / "workers" / "reward_scores.py"
RULES = '''
def length(prompts, answers):
    """With the checks of what a function is given."""
    assert set(prompts) <= {"Say a.", "Say it again, b.", "c?", "And d"}, prompts
    return [float(len(answer)) for answer in answers]


def process(prompts, answers):
    import os

    return [float(os.getpid())] * len(answers)


def row_number(prompts, answers, number, prompt, row_answers):
    assert prompts == prompt
    assert row_answers == [["one", "two"] if n == 3 else None for n in number], row_answers
    for answer in answers:
        if answer == "raise":
            raise KeyError("this one")
    return [float("nan") if a == "nan" else 10.0 * n for a, n in zip(answers, number)]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rules.py").write_text(RULES)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def flags_of(folder, *flags):
    return [flag.format(rules=folder / "rules.py") for flag in flags]


SUM = ["--reward_function", "{rules}:length", "{rules}:row_number", "--critic_model_name_or_path=c"]
WEIGHTS = ["--reward_weights", "length=0.5", "model=2", "--reward_on_error=-1", "--normalize_scores"]
BATCHES = [["x", "raise", "xx", "nan"], ["raise", "raise", "", "x"]]


def assert_summed(result):
    # The rows' numbers are 2, 0, 3, 1. The model's 5, 7, 9, 11 less 8 over 2 are -1.5, -0.5, 0.5, 1.5.
    model = [-1.5, -0.5, 0.5, 1.5]
    first = {"model": model, "length": [1, 5, 2, 3], "row_number": [20, -1, 30, -1]}
    second = {"model": model, "length": [5, 5, 0, 1], "row_number": [-1, -1, 30, 10]}
    assert result == {
        "results": [
            [[-3 + 0.5 + 20, -1 + 2.5 - 1, 1 + 1 + 30, 3 + 1.5 - 1], first, {"length": 0, "row_number": 2}],
            [[-3 + 2.5 - 1, -1 + 2.5 - 1, 1 + 30, 3 + 0.5 + 10], second, {"length": 0, "row_number": 2}],
        ],
        "error": None,
    }


def assert_named_once(told):
    assert told.count("reward row_number: ") == 2
    assert "reward row_number: KeyError: 'this one' (rules.py:19); answer 'raise' to 'Say a.'" in told
    assert "which is no finite number; answer 'nan' to 'Say it again, b.'. It counts as -1" in told


@pytest.mark.slow
def test_the_sum_is_weighted_and_failures_are_counted_and_named_once(folder, capsys):
    assert_summed(run(folder, flags_of(folder, *SUM, *WEIGHTS), BATCHES))
    assert_named_once(capsys.readouterr().out)


@pytest.mark.slow
def test_a_function_alone_needs_no_weight(folder):
    lengths = [1, 0, 3, 2]
    result = run(folder, flags_of(folder, "--reward_function={rules}:length"), [["x", "", "xxx", "xx"]])
    assert result == {"results": [[lengths, {"length": lengths}, {"length": 0}]], "error": None}


@pytest.mark.slow
def test_a_function_that_scores_nothing_ends_the_run_after_three_batches(folder):
    bad, good = ["raise"] * 4, ["x", "raise", "raise", "raise"]
    flags = flags_of(folder, "--reward_function={rules}:row_number")
    result = run(folder, flags, [bad, bad, good, bad, bad, bad, good])
    assert len(result["results"]) == 5
    assert "row_number had no score for any answer of 3 rollout batches in a row" in result["error"]


def test_failures_of_evaluations_are_counted_apart_from_those_of_training():
    rewards = Rewards.__new__(Rewards)
    rewards._num_failures = Counter()
    for occasion in ("rollout batches", "evaluations", "rollout batches", "evaluations"):
        rewards._check_failures(occasion, {"rule": True})  # two of each, none of which is a third
    rewards._check_failures("rollout batches", {"rule": False})
    with pytest.raises(UserError, match="no score for any answer of 3 evaluations in a row"):
        rewards._check_failures("evaluations", {"rule": True})


@pytest.mark.slow
def test_tensor_ranks_ask_a_source_once_and_share_what_it_says(two_ranks):
    scores = [results[-1]["results"][0][0] for results in two_ranks[0]]
    assert scores[0] == scores[1]
    assert len(set(scores[0])) == 1


@pytest.fixture(scope="module")
def two_ranks(folder):
    """What each rank has of the runs below, what was printed, and the endpoint's URL."""

    def lengths(body):
        assert "x" not in body["answers"], "the connection ends without a reply"
        return [len(answer) for answer in body["answers"]]

    with Server(lengths) as server:
        endpoint = [f"--reward_endpoint={server.url}", "--reward_endpoint_retries=1"]
        runs = [
            [flags_of(folder, *SUM, *WEIGHTS), BATCHES],
            [endpoint, [["a", "b", "c", "d"], ["a", "x", "c", "d"]]],  # the second answer is rank 1's
        ]
        wavering = [flags_of(folder, "--reward_function={rules}:process"), [["a", "b", "c", "d"]]]
        texts = map(json.dumps, (runs, wavering))
        process = python(WORKER, folder, folder, *texts, ranks=2, env={"no_proxy": "127.0.0.1"})
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return results, process.stdout, server.url


@pytest.mark.slow
def test_two_ranks_have_the_sum_of_one(two_ranks):
    results, told, _ = two_ranks
    for summed, *_ in results:
        assert_summed(summed)
    assert_named_once(told)


@pytest.mark.slow
def test_an_endpoint_that_fails_one_rank_ends_all_of_them_alike(two_ranks):
    results, told, url = two_ranks
    errors = [failed["error"] for _, failed, _ in results]
    assert errors == [errors[0]] * 2
    assert f"--reward_endpoint {url}: " in errors[0]
    assert "2 times in a row" in errors[0]
    assert [len(failed["results"]) for _, failed, _ in results] == [1, 1]
    assert "attempt 2 of 2 in 1 s" in told
