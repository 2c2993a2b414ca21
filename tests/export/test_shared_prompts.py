"""A step says where the model it starts from was trained on other shares of the same data."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dschat.arguments import RunDescription, parse_arguments
from dschat.export.shared_prompts import overlap_warnings, share_settings
from dschat.export.upstream import UpstreamModel

MODELS = {
    "sft": ("--model_name_or_path=m",),
    "reward": ("--model_name_or_path=m",),
    "dpo": ("--model_name_or_path=m",),
    "rlhf": ("--actor_model_name_or_path=m", "--critic_model_name_or_path=r"),
}


def description(step: str, *flags: str) -> RunDescription:
    return parse_arguments(step, [*MODELS[step], *flags]).description


def received(*flags: str) -> UpstreamModel:
    """A model that step 1 trained with these flags."""
    return UpstreamModel("m", "--model", SimpleNamespace(data=share_settings(description("sft", *flags))))


@pytest.mark.parametrize("step", ["reward", "dpo", "rlhf"])
@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("--data_split=1,0,0", "--data_split is 2,4,4 and was 1,0,0"),
        ("--seed=7", "--seed is 1234 and was 7"),
        ("--eval_fraction=0.2", "--eval_fraction is 0.05 and was 0.2"),
    ],
)
def test_each_flag_that_differs_is_said_with_both_values(step, then, said):
    (warning,) = overlap_warnings(description(step), [received(then), received()])
    assert said in warning
    assert "when m (--model) was trained on this data" in warning


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ([], []),
        (["--data_split=1,2,2"], ["--data_split", "2,4,4.0"]),
        (["--data_path", "a/b", "--seed=7"], ["--data_path", "c/d"]),  # other data
        (["--data_path", "a/b:0.3", "c/d"], ["--data_path", "c/d:0.5"]),
    ],
)
def test_what_makes_the_same_shares_is_not_spoken_of(then, now):
    assert not list(overlap_warnings(description("rlhf", *now), [received(*then)]))


def test_a_file_is_the_same_by_another_path_and_after_a_move(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    now = description("rlhf", "--data_path", str(tmp_path / "pairs.jsonl"))
    for path, is_same in (("pairs.jsonl", True), ("moved/pairs.jsonl", True), ("other.jsonl", False)):
        assert bool(list(overlap_warnings(now, [received("--data_path", path, "--seed=7")]))) is is_same


def test_step_1_and_models_of_which_nothing_is_known_are_left_alone():
    assert not list(overlap_warnings(description("sft"), [received("--seed=7")]))
    unknown = [UpstreamModel("m", "--model", None), UpstreamModel("m", "--model", SimpleNamespace(data=None))]
    assert not list(overlap_warnings(description("rlhf"), unknown))


def test_a_manifest_says_of_its_data_what_decides_the_shares():
    told = share_settings(description("reward", "--data_path", f"{Path('a')}/b:0.3", "--seed=7"))
    assert told == {"data_path": ["a/b"], "data_split": "2,4,4", "seed": 7, "eval_fraction": 0.05}
