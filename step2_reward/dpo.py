"""DPO: train a language model on pairs of a chosen and a rejected answer, in place of steps 2 and 3.

python step2_reward/dpo.py --model_name_or_path SFT_MODEL --data_path pairs.jsonl --output_dir output/dpo
2 ranks: torchrun --nproc_per_node 2 step2_reward/dpo.py ..., deepspeed --num_gpus 2 step2_reward/dpo.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import DpoArguments, DpoOptions
from dschat.console import messages
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("dpo", __file__)  # reads the flags, and only then imports the rest of this file

from functools import partial

import torch
from torch import Tensor

from dschat.data.collate import PairBatch, collate_pairs
from dschat.data.preparation import reward_data
from dschat.distributed.statistics import MeanOverRanks
from dschat.losses import dpo_metrics
from dschat.models.lora import will_train_adapters_only
from dschat.supervised.batches import Loaders
from dschat.supervised.evaluations import DeepSpeedEngine, EvalLoader, sum_over_batches
from dschat.supervised.reference_logprobs import (
    ReferenceStore,
    answer_logprobs,
    reference_of_copy,
    reference_of_policy,
    with_reference,
)
from dschat.supervised.run import Objective, SupervisedRun


def main(args: DpoArguments, context: RunContext) -> None:
    """From flags to a language model that prefers the chosen answers."""
    run = SupervisedRun.open(args, context, head="language_model")
    run.base.check_template(run.tokenizer)
    length, seed, own = args.batch.max_seq_len, args.run.seed, args.dpo.sft_only_data_path
    pairs = reward_data(args.data, run.tokenizer, max_seq_len=length, seed=seed, sft_only_data_path=own)
    loaders = run.build_loaders(pairs, collate_pairs)
    checkpoints, loaders = run.begin(loaders)
    store = ReferenceStore.open(run.settings, run.base, pairs, checkpoints.choices.made)
    if pairs.train.column("margin").any():
        messages.note("the data has margins, which DPO does not use.")
    engine, loaders = build_policy(run, loaders, store, offload=args.dpo.offload_reference_model)
    minimised = partial(loss_and_metrics, options=args.dpo)
    measured = partial(evaluate, options=args.dpo)
    run.train(
        engine, loaders, checkpoints, Objective("DPO", minimised, measured, print_loss=args.dpo.print_loss)
    )


def build_policy(
    run: SupervisedRun, loaders: Loaders, store: ReferenceStore, *, offload: bool
) -> tuple[DeepSpeedEngine, Loaders]:
    """The model in its engine, and the pairs with what the reference model says of them."""
    adapters_alone = will_train_adapters_only(
        run.settings.model, only_optimize_lora=run.settings.optimizer.only_optimize_lora
    )
    if adapters_alone:
        engine = run.build_language_model(loaders)
        compute = partial(reference_of_policy, engine, loaders, offload=offload)
        return engine, loaders.over(with_reference(loaders.data, store, compute))
    # The copy is gone before the policy and its optimiser come.
    compute = partial(reference_of_copy, run.settings, run.tokenizer, run.base, loaders, offload=offload)
    data = with_reference(loaders.data, store, compute)
    return run.build_language_model(loaders), loaders.over(data)


def pair_metrics(engine: DeepSpeedEngine, batch: PairBatch, options: DpoOptions) -> dict[str, Tensor]:
    """Loss, implicit rewards and log-probabilities of each pair, [B]; with ipo the latter are a token's."""
    is_mean = options.loss_type == "ipo"
    num_tokens = batch.tokens.label_mask.sum(dim=1).clamp(min=1) if is_mean else 1
    return dpo_metrics(
        answer_logprobs(engine, batch) / num_tokens,
        batch.ref_logprobs / num_tokens,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        kind=options.loss_type,
    )


def loss_and_metrics(engine: DeepSpeedEngine, batch: PairBatch, *, options: DpoOptions) -> dict[str, Tensor]:
    """A micro-batch's shares of the optimiser step's metrics; the pairs of a prompt weigh 1 together."""
    metrics = pair_metrics(engine, batch, options)
    return {name: (values * batch.weights).sum() / batch.denominator for name, values in metrics.items()}


def evaluation_sums(
    engine: DeepSpeedEngine, batch: PairBatch, *, options: DpoOptions, accuracies: MeanOverRanks
) -> dict[str, Tensor]:
    """The sums over a batch's pairs; "loss" is weighted as in training. `accuracies` take in each pair's."""
    metrics = pair_metrics(engine, batch, options)
    loss = (metrics.pop("loss") * batch.weights).sum()
    accuracies.add(metrics["accuracy"], groups=batch.groups, mask=batch.pair_mask)
    columns = {"pairs": batch.pair_mask, **metrics}
    sums = (torch.stack(list(columns.values())).double() * batch.pair_mask).sum(dim=1)
    return {"loss": loss, "weight": batch.weights.sum(), **dict(zip(columns, sums, strict=True))}


def evaluate(engine: DeepSpeedEngine, loader: EvalLoader, *, options: DpoOptions) -> dict[str, float]:
    """The loss, weighted as in training, and the other metrics over all pairs of all ranks."""
    accuracies = MeanOverRanks()
    sums_of = partial(evaluation_sums, options=options, accuracies=accuracies)
    totals = sum_over_batches(engine, loader, sums_of)
    if not totals:
        return {}
    loss, weight, num_pairs = (totals.pop(name) for name in ("loss", "weight", "pairs"))
    means = {f"eval_{name}": total / num_pairs for name, total in totals.items()}
    return {"eval_loss": loss / weight, **means, "eval_accuracy_stderr": accuracies.standard_error()}
