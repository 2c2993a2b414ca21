import pytest

from dschat.errors import UserError
from dschat.serving.settings import DEFAULTS, checked, completed, given, sampling_of


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("temperature", value)
            for value in ("-1", "hot", float("nan"), float("inf"), "nan", True, None, [])
        ],
        *[("top_p", value) for value in (0, "0", 1.5)],
        *[("max_tokens", value) for value in (0, 1.5, "1.5", 2**21)],
        *[("seed", value) for value in (-1, 2**63, 1e30)],
    ],
)
def test_what_cannot_be_sampled_with_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be a (whole )?number in "):
        checked(name, value)


def test_bounds_are_part_of_the_ranges():
    with pytest.raises(UserError, match=r"top_p must be a number in \(0, 1\], got 0\."):
        checked("top_p", 0)
    assert [checked("top_p", 1), checked("temperature", "0"), checked("max_tokens", 7.0)] == [1, 0, 7]
    with pytest.raises(UserError, match=r"whole number in \[1, 64\], got 65"):
        checked("max_tokens", 65, most=64)


def test_settings_that_are_not_given_have_defaults_that_fit_the_model():
    assert given({"seed": "3", "top_p": None, "system": "x"}) == {"seed": 3}
    assert completed({"seed": 3}, None) == {**DEFAULTS, "seed": 3}
    assert completed({}, 100)["max_tokens"] == 50
    with pytest.raises(UserError, match="max_tokens 100 leaves no room for a question in the model's 100"):
        completed({"max_tokens": 100}, 100)


def test_a_temperature_of_0_takes_the_likeliest_token():
    assert sampling_of({**DEFAULTS, "temperature": 0.0}).greedy
    sampling = sampling_of({**DEFAULTS, "temperature": 0.5, "top_k": 3, "max_tokens": 9})
    assert (sampling.greedy, sampling.temperature, sampling.top_k) == (False, 0.5, 3)
    assert (sampling.max_answer_length, sampling.seed) == (9, 1234)
