"""DPO: train a language model on pairs of a chosen and a rejected answer, in place of steps 2 and 3.

python step2_reward/dpo.py --model_name_or_path SFT_MODEL --data_path pairs.jsonl --output_dir output/dpo
On two ranks: `deepspeed --num_gpus 2` or `torchrun --nproc_per_node 2` in place of `python`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import DpoArguments
from dschat.console import messages
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("dpo", __file__)  # reads the flags, and only then imports the rest of this file

import functools

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.data.collate import PairBatch, collate_pairs
from dschat.data.loaders import EvalLoader
from dschat.data.preparation import SplitData, reward_data
from dschat.data.tokenization import column
from dschat.distributed import collectives
from dschat.distributed.statistics import MeanOverRanks
from dschat.engines.step import DeepSpeedEngine
from dschat.export.upstream import UpstreamModel, verify_model
from dschat.losses import dpo_metrics
from dschat.models.config import check_positions
from dschat.models.lora import check_adapters, will_train_adapters_only
from dschat.models.tokenizer import load_tokenizer
from dschat.supervised.exports import ModelExports
from dschat.supervised.loop import Loaders, build_language_model, build_loaders, train_epochs
from dschat.supervised.reference_logprobs import (
    ReferenceStore,
    answer_logprobs,
    reference_of_copy,
    reference_of_policy,
    with_reference,
)


def main(args: DpoArguments, context: RunContext) -> None:
    """The step from flags to the saved model."""
    base = verify_model(args.model.model_name_or_path, "--model_name_or_path", "language_model")
    check_adapters(language=args.model)
    context.claim_folder(args.model.model_name_or_path)
    tokenizer = load_tokenizer(args.model.model_name_or_path, args.tokenizer)
    base.check_template(tokenizer)
    data = reward_data(args.data, tokenizer, max_seq_len=args.batch.max_seq_len, seed=args.run.seed)
    collate = functools.partial(collate_pairs, pad_id=tokenizer.pad_token_id)
    loaders = build_loaders(data, collate, args)
    check_positions(args.model.model_name_or_path, loaders.longest_row, "--max_seq_len", "the longest row")
    store = ReferenceStore.open(args, base, data)

    checkpoints = context.begin(data.key, [base])
    if column(data.train, "margin").any():
        messages.note("the data has margins, which DPO does not use.")
    engine, data = build_policy(args, tokenizer, base, store, data, loaders)
    base.check_outputs(engine)
    train_epochs(
        engine,
        build_loaders(data, collate, args),
        args,
        description="DPO",
        loss_and_metrics=lambda batch: loss_and_metrics(engine, batch, args),
        evaluate=lambda loader: evaluate(engine, loader, args),
        checkpoints=checkpoints,
        exports=ModelExports(args, engine, tokenizer, data),
        print_loss=args.dpo.print_loss,
    )


def build_policy(
    args: DpoArguments,
    tokenizer: PreTrainedTokenizerBase,
    base: UpstreamModel,
    store: ReferenceStore,
    data: SplitData,
    loaders: Loaders,
) -> tuple[DeepSpeedEngine, SplitData]:
    """The model in its engine, and the pairs with what the reference model says of them."""
    if will_train_adapters_only(args.model, only_optimize_lora=args.optimizer.only_optimize_lora):
        engine = build_language_model(args, tokenizer, loaders)
        return engine, with_reference(data, store, lambda: reference_of_policy(args, engine, loaders))
    # The copy is gone before the policy and its optimiser come.
    data = with_reference(data, store, lambda: reference_of_copy(args, tokenizer, base, loaders))
    return build_language_model(args, tokenizer, loaders), data


def judge(engine: DeepSpeedEngine, batch: PairBatch, args: DpoArguments) -> dict[str, Tensor]:
    """Loss, implicit rewards and log-probabilities of each pair, [B]; with ipo the latter are a token's."""
    is_mean = args.dpo.loss_type == "ipo"
    num_tokens = batch.tokens.label_mask.sum(dim=1).clamp(min=1) if is_mean else 1
    return dpo_metrics(
        answer_logprobs(engine, batch) / num_tokens,
        batch.ref_logprobs / num_tokens,
        beta=args.dpo.beta,
        label_smoothing=args.dpo.label_smoothing,
        kind=args.dpo.loss_type,
    )


def loss_and_metrics(engine: DeepSpeedEngine, batch: PairBatch, args: DpoArguments) -> dict[str, Tensor]:
    """A micro-batch's shares of the optimiser step's metrics; the pairs of a prompt weigh 1 together."""
    judged = judge(engine, batch, args)
    return {name: (values * batch.weights).sum() / batch.denominator for name, values in judged.items()}


def evaluate(engine: DeepSpeedEngine, loader: EvalLoader, args: DpoArguments) -> dict[str, float]:
    """The loss, weighted as in training, and the other figures over all pairs of all ranks."""
    accuracy = MeanOverRanks()
    sums = torch.zeros(9, device=engine.device, dtype=torch.float64)
    for batch in loader:
        batch = batch.to(engine.device)
        judged = judge(engine, batch, args)
        sums[:2] += torch.stack([(judged.pop("loss") * batch.weights).sum(), batch.weights.sum()])
        accuracy.add(judged["accuracy"], groups=batch.groups, mask=batch.pair_mask)
        columns = [batch.pair_mask, *judged.values()]
        sums[2:] += (torch.stack(columns).double() * batch.pair_mask).sum(dim=1)
    loss, weight, num_pairs, *totals = collectives.sum_across_ranks(sums, axis="data").tolist()
    if num_pairs == 0:
        return {}
    means = {f"eval_{name}": total / num_pairs for name, total in zip(judged, totals, strict=True)}
    return {"eval_loss": loss / weight, **means, "eval_accuracy_stderr": accuracy.standard_error()}
