import pytest

from dschat.arguments import parse_arguments
from dschat.rlhf.monitoring.guard import Guard
from dschat.rlhf.monitoring.monitor import TrainingMonitor, evaluation_line


class Recorded:
    """An evaluator of prepared figures and an exporter that remembers."""

    def __init__(self) -> None:
        self.num_evaluations, self.offered, self.betas = 0, [], []

    def evaluate(self, *, kl_coef: float | None) -> dict[str, float]:
        self.num_evaluations += 1
        self.betas.append(kl_coef)
        names = ("score", "score_stderr", "kl", "objective", "answer_length", "eos_share")
        return {f"eval_{name}": 1.0 for name in names}

    answers = None

    def offer(self, step: int, evaluation: dict[str, float], answers: None, *, is_warned_of: bool) -> None:
        if not is_warned_of:
            self.offered.append(step)


def watched(
    kls: list[float], *, interval: int, patience: int = 2
) -> tuple[Recorded, TrainingMonitor, list[bool]]:
    """What a watch does over PPO steps of these KLs, and in which there was an evaluation."""
    recorded = Recorded()
    args = parse_arguments("rlhf", ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b",
                                    f"--patience={patience}", "--max_kl=1"])  # fmt: skip
    watch = TrainingMonitor(recorded, Guard(args.guard), recorded, interval)
    figures = [watch.after_step(0, {})[0]]
    for step, kl in enumerate(kls, 1):
        figures.append(watch.after_step(step, {"kl": kl}, is_last=step == len(kls))[0])
        if watch.guard.stopped_by:
            break
    return recorded, watch, ["eval_score" in values for values in figures]


def test_evaluations_stand_at_the_ends_and_at_the_interval():
    _, _, evaluated = watched([0.1] * 5, interval=2)
    assert evaluated == [True, False, True, False, True, True]


def test_what_the_guard_warns_of_is_no_best_actor():
    recorded, _, _ = watched([0.1, 5.0, 0.1, 0.1], interval=1)
    assert recorded.offered == [0, 1, 3, 4]


def test_a_stopped_run_ends_with_an_evaluation():
    recorded, watch, evaluated = watched([0.1, 5.0, 5.0, 5.0], interval=10)
    assert watch.guard.stopped_by == "kl"
    assert evaluated == [True, False, False, True]
    assert recorded.offered == [0]


def test_an_evaluation_has_the_beta_of_its_ppo_step_and_before_the_first_none():
    recorded = Recorded()
    args = parse_arguments("rlhf", ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b"])
    monitor = TrainingMonitor(recorded, Guard(args.guard), recorded, 1)
    monitor.after_step(0, {})
    metrics, lines = monitor.after_step(1, {"kl": 0.1, "kl_coef": 0.3})
    assert recorded.betas == [None, 0.3]
    assert (metrics["kl_coef"], metrics["eval_score"]) == (0.3, 1.0)
    assert lines[0].startswith("evaluation after PPO step 1: score 1 +- 1, KL 1,")


def test_without_an_evaluator_the_metrics_pass_through():
    args = parse_arguments("rlhf", ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b"])
    monitor = TrainingMonitor(None, Guard(args.guard), Recorded(), 1)
    assert monitor.after_step(0, {}) == ({}, [])
    assert monitor.after_step(1, {"kl": 0.1})[0] == {"kl": 0.1}


class Part:
    """A part with a state."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state_dict: dict) -> None:
        self.state = state_dict


def test_an_evaluator_that_is_new_at_resume_begins_anew():
    saved = TrainingMonitor(None, Part({"g": 1}), Part({"e": 2}), 1).state_dict()
    assert saved == {"guard": {"g": 1}, "exports": {"e": 2}}
    resumed = TrainingMonitor(Part({"new": 3}), Part({}), Part({}), 1)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == {"evaluator": {"new": 3}, **saved}


@pytest.mark.parametrize(("step", "when"), [(0, "before training"), (4, "after PPO step 4")])
def test_an_evaluation_is_one_line(step, when):
    names = ("score", "score_stderr", "kl", "objective", "answer_length", "eos_share")
    metrics = {f"eval_{name}": 0.5 for name in names}
    assert evaluation_line(step, metrics) == (
        f"evaluation {when}: score 0.5 +- 0.5, KL 0.5, score - beta KL 0.5 (eval_objective), "
        "answers of 0.5 tokens, 50% ended"
    )
