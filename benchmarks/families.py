"""The three steps on real preferences, for five model families, process counts and ZeRO stages; one table.

python benchmarks/families.py --data-path hh/test.jsonl.gz --ranks 1 2 --zero 0 3
On one GPU: add --ranks 1 --zero 0 2 3 --dtype bf16 --hidden-size 1024 --num-layers 12.

The models have random weights: the table shows that every combination trains and that its numbers agree, not
what a trained model would score. It is written to OUTPUT/families.json as well.
"""

import argparse
import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "opt", "qwen3", "gpt2", "gpt_neox")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="JSON lines of preferences, gzip or not.")
    add("--output-dir", type=Path, default=Path("output/families"), help="Folder of all runs.")
    add("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="Architectures.")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="Numbers of processes.")
    add("--zero", type=int, nargs="+", choices=range(4), default=[0, 3], help="ZeRO stages.")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="Precision.")
    add("--hidden-size", type=int, default=128, help="Width of the models.")
    add("--num-layers", type=int, default=2, help="Depth of the models.")
    add("--vocab-size", type=int, default=4096, help="Entries of the tokenizer trained on the data.")
    add("--global-batch", type=int, default=8, help="Rows of an optimiser step over all processes.")
    add("--ppo-steps", type=int, default=4, help="PPO steps of a run.")
    return parser.parse_args()


if __name__ == "__main__":
    parse()  # before torch is imported, so that --help and a mistyped flag answer at once

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

POSITIONS = 512


def main() -> None:
    """Run every combination and print the table."""
    args = parse()
    tokenizer = train_tokenizer(args.data_path, args.vocab_size)
    rows = []
    for family in args.families:
        base = args.output_dir / "base" / family
        num_parameters = save_base(base, family, tokenizer, args)
        for ranks in args.ranks:
            for stage in args.zero:
                rows.append({"family": family, "parameters": num_parameters, "ranks": ranks, "zero": stage})
                rows[-1] |= run(base, ranks, stage, args)
                print(json.dumps(rows[-1]), flush=True)
    (args.output_dir / "families.json").write_text(json.dumps(rows, indent=2) + "\n")
    print_table(rows)


def texts_of(path: Path) -> Iterator[str]:
    """The text of every row."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row.get("prompt", "") + row["chosen"]


def train_tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the data, with end and padding tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts_of(path), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


def config_of(family: str, tokenizer: PreTrainedTokenizerFast, width: int, depth: int) -> PretrainedConfig:
    """A configuration of the family, of equal width and depth for all."""
    heads = max(1, width // 64)
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, **ids}
    gated = {**shape, "intermediate_size": 3 * width, "num_key_value_heads": heads}
    positions: dict[str, Any] = {"max_position_embeddings": POSITIONS}
    if family == "llama":
        return LlamaConfig(**gated, **positions)
    if family == "qwen3":
        return Qwen3Config(**gated, **positions, head_dim=64, tie_word_embeddings=True)
    if family == "opt":
        return OPTConfig(**shape, **positions, ffn_dim=4 * width, word_embed_proj_dim=width)
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=depth, n_head=heads, n_positions=POSITIONS, **ids)
    return GPTNeoXConfig(**shape, **positions, intermediate_size=4 * width)


def save_base(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> int:
    """Write a model of random weights and its tokenizer. -> number of parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, tokenizer, args.hidden_size, args.num_layers))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def run(base: Path, ranks: int, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """The three steps through the end-to-end runner, and what came of them."""
    output = args.output_dir / f"{base.name}_{ranks}_ranks_zero{stage}"
    rows = args.global_batch // ranks
    train = (
        f"--num_train_epochs 1 --learning_rate 1e-3 --max_seq_len 256 --per_device_train_batch_size {rows}"
    )
    ppo = (
        "--max_prompt_seq_len 128 --max_answer_seq_len 48 "
        f"--enable_test_mode --test_stop_step {args.ppo_steps} "
        f"--per_device_generation_batch_size {2 * rows} --per_device_training_batch_size {rows} "
        "--actor_learning_rate 1e-4 --critic_learning_rate 1e-4 --num_warmup_steps 0"
    )
    deployment = ["single_gpu"] if ranks == 1 else ["single_node", "--num-gpus", str(ranks)]
    command = [sys.executable, str(ROOT / "scripts" / "e2e_rlhf.py"), "--data-path", str(args.data_path)]
    command += ["--actor-model", str(base), "--reward-model", str(base), "--output-dir", str(output)]
    command += ["--actor-zero-stage", str(stage), "--reward-zero-stage", str(stage)]
    command += ["--deployment-type", *deployment, "--common-args", f"--dtype {args.dtype}"]
    command += ["--overwrite-output-dir", "--sft-args", train, "--reward-args", train, "--ppo-args", ppo]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{output} failed:\n{result.stderr}")
    return figures(output)


def figures(output: Path) -> dict[str, Any]:
    """What a finished run shows. Raises ValueError where a metric is not finite."""
    sft, reward, ppo = (
        json.loads((output / name / "summary.json").read_text())
        for name in ("step1_sft", "step2_reward", "step3_ppo")
    )
    steps = [json.loads(line) for line in (output / "step3_ppo" / "metrics.jsonl").read_text().splitlines()]
    broken = [name for step in steps for name, value in step.items() if not math.isfinite(value or 0.0)]
    broken += [name for step in steps for name, value in step.items() if value is None]
    if broken:
        raise ValueError(f"{output}: {sorted(set(broken))} not finite")
    steps = [step for step in steps if "score" in step]  # an evaluation stands before the first
    return {
        "perplexity_before": sft["initial_eval_perplexity"],
        "perplexity_after": sft["eval_perplexity"],
        "reward_accuracy": reward["eval_accuracy"],
        "reward_accuracy_stderr": reward["eval_accuracy_stderr"],
        "first_ratio_error": steps[0]["first_minibatch_ratio_error"],
        "first_kl": steps[0]["kl"],
        "last_kl": steps[-1]["kl"],
        "last_score": steps[-1]["score"],
        "answer": sample(output / "step3_ppo" / "actor"),
        "seconds": sft["seconds"] + reward["seconds"] + ppo["seconds"],
        "ppo_tokens_per_second": steps[-1]["tokens_per_second"],
        "peak_memory_gib": max(step["peak_memory_gib"] for step in steps),
    }


def sample(folder: Path) -> str:
    """What the saved actor answers with its own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokens = tokenizer("\n\nHuman: How are you?\n\nAssistant:", return_tensors="pt")
    ids = model.generate(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=8
    )
    return str(tokenizer.decode(ids[0, tokens["input_ids"].shape[1] :]))


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a run."""
    table = Table()
    headings = ("family", "ranks", "ZeRO", "perplexity", "reward accuracy", "first |ratio - 1|", "first KL")
    for heading in (*headings, "last score", "last KL", "seconds", "PPO tokens/s", "GiB"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["family"],
            str(row["ranks"]),
            str(row["zero"]),
            f"{row['perplexity_before']:.0f} -> {row['perplexity_after']:.0f}",
            f"{row['reward_accuracy']:.3f} ± {row['reward_accuracy_stderr']:.3f}",
            f"{row['first_ratio_error']:g}",
            f"{row['first_kl']:g}",
            f"{row['last_score']:.3f}",
            f"{row['last_kl']:.4f}",
            f"{row['seconds']:.0f}",
            f"{row['ppo_tokens_per_second']:.0f}",
            f"{row['peak_memory_gib']:.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
