"""Step 1: fine-tune a causal language model on prompts and their chosen answers.

python step1_sft/main.py --model_name_or_path MODEL --data_path pairs.jsonl --output_dir output/sft
2 ranks: torchrun --nproc_per_node 2 step1_sft/main.py ..., deepspeed --num_gpus 2 step1_sft/main.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import SftArguments
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("sft", __file__)  # reads the flags, and only then imports the rest of this file

import math

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.data.collate import SftBatch, collate_sft
from dschat.data.preparation import SplitData, sft_data
from dschat.models.forward import token_logprobs_of
from dschat.supervised.evaluations import DeepSpeedEngine, EvalLoader, sum_over_batches
from dschat.supervised.run import Objective, SupervisedRun


def main(args: SftArguments, context: RunContext) -> None:
    """From flags to a fine-tuned model."""
    run = SupervisedRun.open(args, context, head="language_model")
    loaders = run.build_loaders(load_data(args, run.tokenizer), collate_sft)
    checkpoints, loaders = run.begin(loaders)
    engine = run.build_language_model(loaders)
    objective = Objective("SFT", loss_and_metrics, evaluate, print_loss=args.sft.print_loss)
    run.train(engine, loaders, checkpoints, objective)


def load_data(args: SftArguments, tokenizer: PreTrainedTokenizerBase) -> SplitData:
    """Prompts and chosen answers as token ids."""
    return sft_data(
        args.data,
        tokenizer,
        max_seq_len=args.batch.max_seq_len,
        seed=args.run.seed,
        train_on_prompt=args.sft.train_on_prompt,
        sft_only_data_path=args.sft.sft_only_data_path,
    )


def answer_loss(engine: DeepSpeedEngine, batch: SftBatch, *, denominator: float) -> Tensor:
    """Negative log-likelihood of the tokens to be learned, summed and divided by `denominator`. -> scalar."""
    return batch.tokens.in_rows(-token_logprobs_of(engine, batch.tokens)).sum() / denominator


def loss_and_metrics(engine: DeepSpeedEngine, batch: SftBatch) -> dict[str, Tensor]:
    """A micro-batch's share of the optimiser step's mean loss per token."""
    return {"loss": answer_loss(engine, batch, denominator=batch.denominator)}


def evaluation_sums(engine: DeepSpeedEngine, batch: SftBatch) -> dict[str, Tensor]:
    """The summed loss of a batch, and its number of tokens to be learned."""
    return {"loss": answer_loss(engine, batch, denominator=1.0), "tokens": batch.tokens.label_mask.sum()}


def evaluate(engine: DeepSpeedEngine, loader: EvalLoader) -> dict[str, float]:
    """Loss and perplexity per token over all ranks; nothing where there are no evaluation data."""
    sums = sum_over_batches(engine, loader, evaluation_sums)
    if not sums.get("tokens"):
        return {}
    loss = sums["loss"] / sums["tokens"]
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
