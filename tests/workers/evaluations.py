"""Evaluations around a PPO step for each of several settings, on as many ranks as it is started with.

python evaluations.py MODELS_FOLDER OUTPUT_FILE '[{"num_eval_prompts": 7, ...}, ...]'
MODELS_FOLDER holds an actor and the reward models reward/ and other_reward/. The JSON has for each setting
the figures before the step, after it, and after it again.
"""

from pathlib import Path

from ppo_steps import build_engine, prompts, run_all
from tiny import comparison_rows

from dschat.arguments import parse_arguments
from dschat.data.comparisons import Comparison
from dschat.data.rows import Rows
from dschat.data.tokenization import tokenize_prompts
from dschat.rlhf.monitoring.evaluation import build_evaluator
from dschat.rlhf.ppo_trainer import build_trainer
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate

QUESTIONS = [f"\n\nHuman: Name {n} colours{', please' * (n % 4)}.\n\nAssistant:" for n in range(9)]


def run(models: Path, flags: dict) -> list[dict[str, float]]:
    """The figures of the three evaluations."""
    argv = [
        f"--actor_model_name_or_path={models / 'actor'}",
        f"--critic_model_name_or_path={models / 'reward'}",
        f"--guard_reward_model_name_or_path={models / 'other_reward'}",
        *("--num_warmup_steps=0", "--actor_learning_rate=1e-3", "--max_answer_seq_len=12", "--dtype=fp32"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    args = parse_arguments("rlhf", argv)
    engine, tokenizers = build_engine(args)
    held_out = Rows.of(
        tokenize_prompts(
            comparison_rows(*map(Comparison, QUESTIONS)), tokenizers.actor, max_prompt_seq_len=99
        ).rows
    )
    backend = HuggingFaceGenerate(engine.actor, tokenizers.actor)
    trainer = build_trainer(args, engine, tokenizers, backend)
    evaluator = build_evaluator(args, engine, tokenizers, backend, held_out)
    before = evaluator.evaluate()
    kl_coef = trainer.step(prompts(tokenizers.actor, 0, 1, 1), ppo_step=0)["kl_coef"]
    return [before, evaluator.evaluate(kl_coef=kl_coef), evaluator.evaluate(kl_coef=kl_coef)]


if __name__ == "__main__":
    run_all(run)
