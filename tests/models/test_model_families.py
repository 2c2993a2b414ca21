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
    assert_same(two_ranks[family], one_rank[family])


def assert_same(two_ranks: dict, one_rank: dict, tolerance: float = 1e-3) -> None:
    assert_trained(two_ranks)
    assert_scores_alike(two_ranks["scores"])
    (sharded,), (whole,) = two_ranks["ppo"], one_rank["ppo"]
    for name in ("score", "entropy", "value_loss", "answer_length"):
        assert sharded[name] == pytest.approx(whole[name], rel=tolerance, abs=tolerance), name


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_family_does_the_same_on_two_ranks_at_any_stage(stage, one_rank, tmp_path):
    python(WORKER, tmp_path, stage, *FAMILIES, ranks=2, timeout=3000)
    for family, seen in read(tmp_path).items():
        for loss in ("initial_eval_loss", "eval_loss"):
            assert seen["sft"][loss] == pytest.approx(one_rank[family]["sft"][loss], rel=1e-4), family
        assert_same(seen, one_rank[family], tolerance=1e-4)
