"""One optimiser step of actor and critic, with made-up models: what is trained, and what is noted of it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up_rollout import ROLLOUT

from dschat.arguments import PpoArguments, RunArguments
from dschat.data.loaders import OptimizerStep
from dschat.engines.skipped_steps import SkippedSteps
from dschat.rlhf import updates
from dschat.rlhf.experience import MicroBatch, Minibatch
from dschat.rlhf.first_pass import FirstPass
from dschat.rlhf.position import Position
from dschat.rlhf.updates import ActorCriticUpdates, UpdateSettings

ZEROS = torch.zeros(2, 2)
BATCH = MicroBatch(ROLLOUT, ZEROS, ZEROS, ZEROS, torch.ones(2, 2), torch.ones(2, 2))
MINIBATCH = Minibatch([BATCH], num_tokens=3, is_first=True, kl_coef=0.1)
LOG_RATIO = math.log(1.5)


class Model:
    """In the place of an engine."""

    def __init__(self, name: str) -> None:
        self.name, self.skip_reason = name, None

    def train(self) -> None:
        pass


class Average:
    num_updates = 0

    def update(self) -> None:
        self.num_updates += 1


class Texts:
    """One text per optimiser step."""

    num_targets = 4

    def __iter__(self) -> Any:
        return self.steps_after(0)

    def steps_after(self, num_done: int) -> Any:
        return iter([OptimizerStep([torch.tensor(float(number))], 4.0) for number in range(num_done, 9)])


@pytest.fixture
def models(monkeypatch) -> SimpleNamespace:
    """An actor whose tokens' ratios are 1.5 and a critic whose values are 2; losses that are trained on."""
    actor, critic = Model("actor"), Model("critic")
    models = SimpleNamespace(
        actor=actor, critic=critic, ema=Average(), trained=[actor, critic], losses=[],
        by_name={"actor": actor, "critic": critic},
    )  # fmt: skip
    monkeypatch.setattr(updates, "predictions_of", lambda *_, **__: (torch.full((2, 2), LOG_RATIO), None))
    monkeypatch.setattr(updates, "values_of", lambda *_: torch.full((2, 2), 2.0))
    monkeypatch.setattr(updates, "token_logprobs_of", lambda engine, text, **_: -text * torch.ones(1, 4))
    monkeypatch.setattr(
        updates, "train_on", lambda engine, loss: models.losses.append((engine.name, loss.item()))
    )
    monkeypatch.setattr(updates, "gradient_norm", lambda engine: 0.5)
    monkeypatch.setattr(updates, "learning_rate", lambda engine: 0.1)
    return models


def updates_of(
    models: SimpleNamespace, texts: Texts | None = None, first_pass: FirstPass | None = None, **ppo: Any
) -> ActorCriticUpdates:
    settings = UpdateSettings(PpoArguments(**ppo), temperature=1.0, num_tokens=9, unsup_coef=2.0)
    return ActorCriticUpdates(models, settings, SkippedSteps(RunArguments()), texts, first_pass)


def test_actor_and_critic_are_trained_and_the_metrics_are_means_over_tokens(models):
    made, position = updates_of(models), Position()
    made.step(MINIBATCH, position, trains_actor=True)
    # Ratio 1.5 is clipped at 1.2 for an advantage of 1: three tokens of -1.2 over 3. Values of 2 for
    # returns of 1: 0.5 * max((2 - 1)^2, (0.2 - 1)^2).
    assert models.losses == [("actor", pytest.approx(-1.2)), ("critic", pytest.approx(0.5))]
    metrics = made.metrics(position)
    assert metrics["policy_loss"] == pytest.approx(-1.2)
    assert metrics["value_loss"] == pytest.approx(0.5)
    assert metrics["approx_kl"] == pytest.approx(0.5 * LOG_RATIO**2)
    assert metrics["approx_k3"] == pytest.approx(0.5 - LOG_RATIO)
    assert (metrics["clip_fraction"], metrics["value_clip_fraction"]) == (1, 1)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["first_minibatch_ratio_error"] == pytest.approx(0.5)
    assert (metrics["updates_done"], metrics["skipped_steps"]) == (1, 0)
    assert (metrics["actor_lr"], metrics["critic_grad_norm"]) == (0.1, 0.5)
    assert models.ema.num_updates == 1


def test_an_actor_that_waits_is_left_alone(models):
    made, position = updates_of(models, Texts()), Position()
    made.step(MINIBATCH, position, trains_actor=False)
    assert [name for name, _ in models.losses] == ["critic"]
    assert (models.ema.num_updates, position.num_text_steps) == (0, 0)
    assert "approx_kl" not in made.metrics(position)


@pytest.mark.parametrize(("target", "is_enough"), [(None, False), (0.05, True), (0.1, False)])
def test_a_step_that_moves_the_actor_too_far_is_noted(models, target, is_enough):
    position = Position()  # approx_kl is 0.5 (ln 1.5)^2 = 0.082
    updates_of(models, target_approx_kl=target).step(MINIBATCH, position, trains_actor=True)
    assert position.has_moved_enough == is_enough


def test_a_skipped_step_is_counted_and_not_averaged(models):
    models.actor.skip_reason = "gradient"
    position = Position()
    updates_of(models).step(MINIBATCH, position, trains_actor=True)
    assert (position.num_skipped, position.updates_done, models.ema.num_updates) == (1, 1, 0)


def test_texts_are_learned_beside_the_answers_and_go_on_after_a_checkpoint(models):
    made, position = updates_of(models, Texts()), Position(num_text_steps=3)
    made.resume(position)
    made.step(MINIBATCH, position, trains_actor=True)
    # The text's 4 log-probabilities are -3: a mean loss of 3, by a coefficient of 2.
    assert models.losses[0] == ("actor", pytest.approx(-1.2 + 6))
    assert position.num_text_steps == 4
    assert made.metrics(position)["unsup_loss"] == pytest.approx(3)


def test_what_the_analysis_kept_is_learned_from_once(models):
    first_pass = FirstPass()
    first_pass.begin(keeps_actor=True)
    first_pass.keep(ZEROS, ZEROS, torch.full((2, 2), 3.0))
    made = updates_of(models, first_pass=first_pass)
    made.step(MINIBATCH, Position(), trains_actor=True)
    made.step(MINIBATCH, Position(), trains_actor=True)
    # Ratios of 1 and values of 3, 0.5 (3 - 1)^2, are those kept; then the models are asked.
    assert models.losses[:2] == [("actor", pytest.approx(-1)), ("critic", pytest.approx(2))]
    assert models.losses[2:] == [("actor", pytest.approx(-1.2)), ("critic", pytest.approx(0.5))]


def test_nothing_that_was_kept_is_learned_from_after_a_checkpoint(models):
    first_pass = FirstPass()
    first_pass.begin(keeps_actor=True)
    first_pass.keep(ZEROS, ZEROS, ZEROS)
    made = updates_of(models, first_pass=first_pass)
    made.resume(Position())
    made.step(MINIBATCH, Position(), trains_actor=True)
    assert models.losses[0] == ("actor", pytest.approx(-1.2))


def test_the_statistics_of_a_ppo_step_begin_anew(models):
    made, position = updates_of(models), Position()
    made.step(MINIBATCH, position, trains_actor=True)
    made.begin_ppo_step()
    assert made.statistics.state_dict() == {}
