"""Step 3 with the truth beside its metrics: the share of right answers of each rollout, `checked_success`.

    python benchmarks/learning_watch.py [--watch-dropout P] FLAGS_OF_STEP_3...

The answers a PPO step samples are checked by the rules of the demo task: the figure costs no more sampling.
`--watch-dropout` puts dropout into the actor where it learns, which step 3 refuses: the benchmark shows why.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from demo_task import check_answer

DROPOUT_FLAG = "--watch-dropout"


def main() -> None:
    """Patch the trainer, then run step 3 as it is."""
    flags, dropout = take_dropout(sys.argv[1:])
    watch(dropout)
    sys.argv = [str(ROOT / "step3_ppo" / "main.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def take_dropout(argv: list[str]) -> tuple[list[str], float]:
    """The flags of step 3, and the probability of dropout, 0 where none is asked for."""
    if DROPOUT_FLAG not in argv:
        return argv, 0.0
    place = argv.index(DROPOUT_FLAG)
    return argv[:place] + argv[place + 2 :], float(argv[place + 1])


def watch(dropout: float) -> None:
    """Make the trainer report `checked_success`, and its actor drop out attention weights as it learns."""
    from dschat.rlhf import ppo_trainer
    from dschat.rlhf.ppo_trainer import PPOTrainer
    from dschat.runs import registry

    truth = registry.Metric("checked_success", "rollout", "share", "answers without a fault")
    registry.METRICS = (*registry.METRICS, truth)
    build, step = ppo_trainer.build_trainer, PPOTrainer.step
    tokenizers_of_actors: list[Any] = []

    def build_and_watch(args: Any, engine: Any, tokenizers: Any, *more: Any, **options: Any) -> PPOTrainer:
        if dropout and not set_attention_dropout(engine.actor.module, dropout):
            raise ValueError(f"{DROPOUT_FLAG}: no layer of the actor has attention dropout.")
        trainer = build(args, engine, tokenizers, *more, **options)
        tokenizers_of_actors.append(tokenizers.actor)
        return trainer

    def step_and_truth(self: PPOTrainer, *args: Any, **options: Any) -> dict[str, float]:
        metrics = step(self, *args, **options)
        rollout = self.experience.rollout
        decode = tokenizers_of_actors[-1].batch_decode
        prompts = decode(rollout.input_ids[:, : rollout.prompt_length], skip_special_tokens=True)
        answers = decode(rollout.answers, skip_special_tokens=True)
        return {**metrics, "checked_success": share_right(prompts, answers)}

    ppo_trainer.build_trainer, PPOTrainer.step = build_and_watch, step_and_truth


def set_attention_dropout(model: Any, probability: float) -> int:
    """Set it wherever a layer has it. -> number of layers."""
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    for layer in layers:
        layer.attention_dropout = probability
    return len(layers)


def share_right(prompts: list[str], answers: list[str]) -> float:
    """The share of answers without a fault."""
    return sum(not check_answer(p, a) for p, a in zip(prompts, answers, strict=True)) / len(answers)


if __name__ == "__main__":
    main()
