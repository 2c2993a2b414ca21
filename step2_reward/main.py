"""Step 2: train a reward model on pairs of a chosen and a rejected answer.

python step2_reward/main.py --model_name_or_path MODEL --data_path pairs.jsonl --output_dir output/reward
On two ranks: `deepspeed --num_gpus 2` or `torchrun --nproc_per_node 2` in place of `python`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import RewardArguments
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("reward", __file__)  # reads the flags, and only then imports the rest of this file

import functools
import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.data.collate import PairBatch, collate_pairs
from dschat.data.loaders import EvalLoader
from dschat.data.preparation import reward_data
from dschat.distributed import collectives
from dschat.distributed.statistics import MeanOverRanks
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.export.upstream import verify_model
from dschat.export.verdict import reward_verdict
from dschat.losses import pair_accuracy
from dschat.models.config import check_positions
from dschat.models.forward import ranking_of
from dschat.models.loading import create_critic_model
from dschat.models.lora import check_adapters
from dschat.models.tokenizer import load_tokenizer
from dschat.supervised.exports import ModelExports
from dschat.supervised.loop import Loaders, build_loaders, train_epochs


def main(args: RewardArguments, context: RunContext) -> None:
    """The step from flags to the saved model."""
    base = verify_model(args.model.model_name_or_path, "--model_name_or_path")
    check_adapters(reward=args.model)
    context.claim_folder(args.model.model_name_or_path)
    tokenizer = load_tokenizer(args.model.model_name_or_path, args.tokenizer)
    base.check_template(tokenizer)
    data = reward_data(args.data, tokenizer, max_seq_len=args.batch.max_seq_len, seed=args.run.seed)
    loaders = build_loaders(data, functools.partial(collate_pairs, pad_id=tokenizer.pad_token_id), args)
    check_positions(args.model.model_name_or_path, loaders.longest_row, "--max_seq_len", "the longest row")

    checkpoints = context.begin(data.key, [base])
    engine = build_engine(args, tokenizer, loaders)
    train_epochs(
        engine,
        loaders,
        args,
        description="reward",
        loss_and_metrics=lambda batch: loss_and_metrics(engine, batch, args),
        evaluate=lambda loader: evaluate(engine, loader, args),
        checkpoints=checkpoints,
        exports=ModelExports(args, engine, tokenizer, data, verdict_of=reward_verdict),
    )


@phase(PhaseKind.LOADING, "model")
def build_engine(
    args: RewardArguments, tokenizer: PreTrainedTokenizerBase, loaders: Loaders
) -> DeepSpeedEngine:
    """The backbone with a fresh head in its engine."""
    config = train_config(
        args.model, args.optimizer, args.run, per_device_batch_size=args.batch.per_device_train_batch_size
    )
    model = create_critic_model(
        args.model.model_name_or_path, tokenizer, config, **args.model.loading_options
    )
    num_steps = loaders.train.num_steps_of(args.optimizer.num_train_epochs)
    return build_trained_engine(
        model, args.model, args.optimizer, args.run, config=config, num_training_steps=num_steps
    )


def judge(
    engine: DeepSpeedEngine, batch: PairBatch, args: RewardArguments, *, denominator: float
) -> dict[str, Tensor]:
    """The ranking loss, summed over pairs and divided by `denominator`, and both answers' scores [B]."""
    return ranking_of(engine, batch, loss_fn=args.reward.loss_fn, denominator=denominator)


def loss_and_metrics(engine: DeepSpeedEngine, batch: PairBatch, args: RewardArguments) -> dict[str, Tensor]:
    """A micro-batch's shares of the optimiser step's loss and accuracy."""
    judged = judge(engine, batch, args, denominator=batch.denominator)
    accuracy = pair_accuracy(judged["chosen_mean_scores"], judged["rejected_mean_scores"]) * batch.weights
    return {"loss": judged["loss"], "accuracy": accuracy.sum() / batch.denominator}


def evaluate(engine: DeepSpeedEngine, loader: EvalLoader, args: RewardArguments) -> dict[str, float]:
    """Loss, accuracy with its standard error, and the scores' statistics, over all pairs of all ranks."""
    sums, accuracies = torch.zeros(7, device=engine.device, dtype=torch.float64), MeanOverRanks()
    for batch in loader:
        batch = batch.to(engine.device)
        judged = judge(engine, batch, args, denominator=1.0)
        chosen, rejected = judged["chosen_mean_scores"].double(), judged["rejected_mean_scores"].double()
        right = pair_accuracy(chosen, rejected)
        columns = (torch.ones_like(chosen), right, chosen, rejected, chosen**2 + rejected**2)
        sums[:5] += torch.stack([(column * batch.pair_mask).sum() for column in columns])
        sums[5:] += torch.stack([judged["loss"], batch.weights.sum()])
        accuracies.add(right, groups=batch.groups, mask=batch.pair_mask)
    totals = collectives.sum_across_ranks(sums, axis="data").tolist()
    num_pairs, num_right, chosen, rejected, squares, loss, weight = totals
    if num_pairs == 0:
        return {}
    stderr, eval_pairs, eval_prompts = accuracies.error_and_counts()
    accuracy, mean = num_right / num_pairs, (chosen + rejected) / (2 * num_pairs)
    return {
        "eval_loss": loss / weight,
        "eval_accuracy": accuracy,
        "eval_accuracy_stderr": stderr,
        "eval_pairs": eval_pairs,
        "eval_prompts": eval_prompts,
        "chosen_mean_score": chosen / num_pairs,
        "rejected_mean_score": rejected / num_pairs,
        "score_mean": mean,
        "score_std": math.sqrt(max(squares / (2 * num_pairs) - mean**2, 0.0)),
    }
