"""Step 2: train a reward model on pairs of a chosen and a rejected answer.

python step2_reward/main.py --model_name_or_path MODEL --data_path pairs.jsonl --output_dir output/reward
2 ranks: torchrun --nproc_per_node 2 step2_reward/main.py ..., deepspeed --num_gpus 2 step2_reward/main.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import RewardArguments, RewardOptions
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("reward", __file__)  # reads the flags, and only then imports the rest of this file

import math
from functools import partial

import torch
from torch import Tensor

from dschat.data.collate import PairBatch, collate_pairs
from dschat.data.preparation import reward_data
from dschat.distributed.statistics import MeanOverRanks
from dschat.export.verdict import reward_verdict
from dschat.losses import pair_accuracy
from dschat.models.forward import ranking_of
from dschat.models.loading import create_critic_model
from dschat.supervised.evaluations import DeepSpeedEngine, EvalLoader, sum_over_batches
from dschat.supervised.pair_report import PairReport
from dschat.supervised.run import Objective, SupervisedRun


def main(args: RewardArguments, context: RunContext) -> None:
    """From flags to a reward model."""
    run = SupervisedRun.open(args, context, head="reward_model")
    run.base.check_template(run.tokenizer)
    data = reward_data(args.data, run.tokenizer, max_seq_len=args.batch.max_seq_len, seed=args.run.seed)
    loaders = run.build_loaders(data, collate_pairs)
    checkpoints, loaders = run.begin(loaders)
    engine = run.build_engine(create_critic_model, loaders)  # the backbone with a fresh head
    report = PairReport(data, run.tokenizer, f"Reward model {args.run.output_dir}")
    objective = Objective(
        "reward",
        partial(loss_and_metrics, options=args.reward),
        partial(evaluate, options=args.reward, report=report),
        verdict_of=reward_verdict,
        report=report,
    )
    run.train(engine, loaders, checkpoints, objective)


def rank_answers(
    engine: DeepSpeedEngine, batch: PairBatch, options: RewardOptions, *, denominator: float
) -> dict[str, Tensor]:
    """The ranking loss, summed over pairs and divided by `denominator`, and both answers' scores [B]."""
    return ranking_of(engine, batch, loss_fn=options.loss_fn, denominator=denominator)


def loss_and_metrics(
    engine: DeepSpeedEngine, batch: PairBatch, *, options: RewardOptions
) -> dict[str, Tensor]:
    """A micro-batch's shares of the optimiser step's loss and accuracy."""
    ranked = rank_answers(engine, batch, options, denominator=batch.denominator)
    accuracy = pair_accuracy(ranked["chosen_mean_scores"], ranked["rejected_mean_scores"]) * batch.weights
    return {"loss": ranked["loss"], "accuracy": accuracy.sum() / batch.denominator}


def evaluation_sums(
    engine: DeepSpeedEngine,
    batch: PairBatch,
    *,
    options: RewardOptions,
    accuracies: MeanOverRanks,
    report: PairReport,
) -> dict[str, Tensor]:
    """The sums that `evaluate` needs of a batch; `accuracies` and `report` take in each pair's."""
    ranked = rank_answers(engine, batch, options, denominator=1.0)
    chosen, rejected = ranked["chosen_mean_scores"].double(), ranked["rejected_mean_scores"].double()
    right = pair_accuracy(chosen, rejected)
    report.add(chosen, rejected)
    accuracies.add(right, groups=batch.groups, mask=batch.pair_mask)
    columns = {
        "pairs": torch.ones_like(chosen),
        "right": right,
        "chosen": chosen,
        "rejected": rejected,
        "squares": chosen**2 + rejected**2,
    }
    sums = {name: (column * batch.pair_mask).sum() for name, column in columns.items()}
    return {**sums, "loss": ranked["loss"], "weight": batch.weights.sum()}


def evaluate(
    engine: DeepSpeedEngine, loader: EvalLoader, *, options: RewardOptions, report: PairReport
) -> dict[str, float]:
    """Loss, accuracy with its standard error, and the scores' statistics, over all pairs of all ranks."""
    accuracies = MeanOverRanks()
    report.begin()
    sums_of = partial(evaluation_sums, options=options, accuracies=accuracies, report=report)
    if not (totals := sum_over_batches(engine, loader, sums_of)):
        return {}
    report.end(loader)
    num_pairs, chosen, rejected = totals["pairs"], totals["chosen"], totals["rejected"]
    stderr, eval_pairs, eval_prompts = accuracies.error_and_counts()
    mean = (chosen + rejected) / (2 * num_pairs)
    return {
        "eval_loss": totals["loss"] / totals["weight"],
        "eval_accuracy": totals["right"] / num_pairs,
        "eval_accuracy_stderr": stderr,
        "eval_pairs": eval_pairs,
        "eval_prompts": eval_prompts,
        **report.figures(),
        "chosen_mean_score": chosen / num_pairs,
        "rejected_mean_score": rejected / num_pairs,
        "score_mean": mean,
        "score_std": math.sqrt(max(totals["squares"] / (2 * num_pairs) - mean**2, 0.0)),
    }
