"""The flags of the sources of scores."""

import pytest
from step_flags import assert_refused

from dschat.arguments.rewards import RewardSourceArguments


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--reward_endpoint", "http://us:word@host:port/"], ["--reward_endpoint 'http://***@host:port/'"]),
        (["--reward_endpoint", "http:///score"], ["--reward_endpoint", "must be a URL"]),
        (["--reward_function", "rules.py"], ["--reward_function 'rules.py'", "FILE.py:NAME"]),
        (["--reward_function", "rules:f"], ["--reward_function 'rules:f'", "FILE.py:NAME"]),
        (["--reward_function", "a.py:f", "b.py:f"], ["two sources", "'f'"]),
        (["--reward_function", "a.py:model"], ["two sources", "'model'"]),
        (["--reward_endpoint", "localhost:8000"], ["--reward_endpoint", "http://localhost:8000/score"]),
        (["--reward_weights", "model=1"], ["--reward_weights", "alone", "--reward_function"]),
        (
            ["--reward_function", "a.py:f", "--reward_weights", "f=much"],
            ["--reward_weights 'f=much'", "NAME=NUMBER"],
        ),
        (["--reward_timeout", "0"], ["--reward_timeout", "positive"]),
        (["--reward_endpoint_timeout", "-1"], ["--reward_endpoint_timeout", "positive"]),
        (["--reward_endpoint_retries", "-1"], ["--reward_endpoint_retries", "at least 0"]),
        (["--reward_batch_size", "0"], ["--reward_batch_size", "at least 1"]),
        (["--reward_on_error", "nan"], ["--reward_on_error", "finite"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_endpoints_are_numbered_from_the_second():
    urls = ["http://a", "http://b", "http://c"]
    sources = RewardSourceArguments(reward_function=["dir/rules.py:short"], reward_endpoint=urls)
    assert sources.endpoints == dict(zip(["endpoint", "endpoint_2", "endpoint_3"], urls, strict=True))
    assert sources.names == ["short", "endpoint", "endpoint_2", "endpoint_3"]
    assert sources.has_sources
    assert not RewardSourceArguments().has_sources


def test_weights_are_numbers_by_name():
    weights = ["f=-.5", "model=1e-1"]
    sources = RewardSourceArguments(reward_function=["a.py:f"], reward_weights=weights)
    assert sources.given_weights == {"f": -0.5, "model": 0.1}
