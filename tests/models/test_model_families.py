"""Every family goes through all three steps, and its reward model scores alike in transformers.

The base models have no padding token, so each vocabulary grows on the way.
"""

import json
import math
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import FAMILIES

WORKER = ROOT / "tests" / "workers" / "three_steps.py"
SHARDED = ("qwen3_moe", "bloom")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[str, dict]:
    """What came out of each family, and how long it took; all in one process."""
    folder = tmp_path_factory.mktemp("families")
    python(WORKER, folder, 0, *FAMILIES)
    return read(folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    """The same of some families at ZeRO stage 3 on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    python(WORKER, folder, 3, *SHARDED, ranks=2)
    return read(folder)


def read(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "seen.json").read_text())


def assert_trained(seen: dict) -> None:
    """SFT learned, actors generate with a grown vocabulary, and PPO's first step began where it should."""
    assert seen["sft"]["eval_loss"] < seen["sft"]["initial_eval_loss"]
    assert seen["generated"] == {"sft": 3, "ppo/actor": 3}
    base, sft, actor = seen["vocabulary"]
    assert base + 1 == sft == actor
    (step,) = seen["ppo"]
    assert [name for name, value in step.items() if not math.isfinite(value)] == []
    assert step["first_minibatch_ratio_error"] == 0
    assert step["kl"] == 0
    assert step["actor_grad_norm"] > 0
    assert step["critic_grad_norm"] > 0


def assert_scores_alike(scores: dict[str, float]) -> None:
    assert scores["spread"] > 0.01
    assert scores["live_difference"] < 1e-5
    assert scores["reloaded_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_goes_through_all_three_steps(family, one_rank):
    assert_trained(one_rank[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_reward_model_scores_alike_in_transformers(family, one_rank):
    scores = one_rank[family]["scores"]
    print(f"{family}: largest difference of a score {scores['live_difference']:.1e}")  # with pytest -rP
    assert_scores_alike(scores)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARDED)
def test_the_family_does_the_same_sharded_over_two_ranks(family, two_ranks, one_rank):
    assert_trained(two_ranks[family])
    assert_scores_alike(two_ranks[family]["scores"])
    (sharded,), (whole,) = two_ranks[family]["ppo"], one_rank[family]["ppo"]
    for name in ("score", "entropy", "value_loss", "answer_length"):
        assert sharded[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-3), name
