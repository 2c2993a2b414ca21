"""Step 1: fine-tune a causal language model on prompts and their chosen answers.

python step1_sft/main.py --model_name_or_path MODEL --data_path pairs.jsonl --output_dir output/sft
On two ranks: `deepspeed --num_gpus 2` or `torchrun --nproc_per_node 2` in place of `python`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import SftArguments
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("sft", __file__)  # reads the flags, and only then imports the rest of this file

import functools
import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.data.collate import SftBatch, collate_sft
from dschat.data.loaders import EvalLoader
from dschat.data.preparation import SplitData, sft_data
from dschat.distributed.collectives import sum_across_ranks
from dschat.engines.step import DeepSpeedEngine
from dschat.export.upstream import verify_model
from dschat.models.config import check_positions
from dschat.models.forward import token_logprobs_of
from dschat.models.lora import check_adapters
from dschat.models.tokenizer import load_tokenizer
from dschat.supervised.exports import ModelExports
from dschat.supervised.loop import build_language_model, build_loaders, train_epochs


def main(args: SftArguments, context: RunContext) -> None:
    """The step from flags to the saved model."""
    base = verify_model(args.model.model_name_or_path, "--model_name_or_path", "language_model")
    check_adapters(language=args.model)
    context.claim_folder(args.model.model_name_or_path)
    tokenizer = load_tokenizer(args.model.model_name_or_path, args.tokenizer)
    data = load_data(args, tokenizer)
    loaders = build_loaders(data, functools.partial(collate_sft, pad_id=tokenizer.pad_token_id), args)
    check_positions(args.model.model_name_or_path, loaders.longest_row, "--max_seq_len", "the longest row")

    checkpoints = context.begin(data.key, [base])
    engine = build_language_model(args, tokenizer, loaders)
    base.check_outputs(engine)
    train_epochs(
        engine,
        loaders,
        args,
        description="SFT",
        loss_and_metrics=lambda batch: {"loss": answer_loss(engine, batch, denominator=batch.denominator)},
        evaluate=lambda loader: evaluate(engine, loader),
        checkpoints=checkpoints,
        exports=ModelExports(args, engine, tokenizer, data),
        print_loss=args.sft.print_loss,
    )


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


def evaluate(engine: DeepSpeedEngine, loader: EvalLoader) -> dict[str, float]:
    """Loss and perplexity per token over all ranks; nothing where there are no evaluation data."""
    sums = torch.zeros(2, device=engine.device, dtype=torch.float64)
    for batch in loader:
        batch = batch.to(engine.device)
        sums += torch.stack(
            [answer_loss(engine, batch, denominator=1.0).double(), batch.tokens.label_mask.sum().double()]
        )
    loss_sum, num_tokens = sum_across_ranks(sums, axis="data").tolist()
    if num_tokens == 0:
        return {}
    loss = loss_sum / num_tokens
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
