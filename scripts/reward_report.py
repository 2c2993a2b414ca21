"""Whether a reward model can be trusted: how it orders held-out pairs, beside the rule of length and chance.

    python scripts/reward_report.py output/step2_reward
    python scripts/reward_report.py MODEL --data pairs.jsonl other.jsonl

Without --data the pairs are those that the model's run held out. Writes reward_report.html and
reward_report.json into --output-dir: accuracy with its interval, by data set, length and margin, calibration,
correlation with length, an estimate of wrong labels, and the surest mistakes. Step 2 writes the same about
what it evaluates on. The verdict is the last line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dschat.data.held_out import SplitText
    from dschat.data.rows import Rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.errors import UserError
from dschat.program import readable_errors


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="Folder or hub id of a reward model.")
    add("--data", nargs="+", default=[], help="Data sets of pairs, as --data_path of the steps takes them.")
    add("--num-pairs", type=int, default=0, help="Pairs that are scored, chosen at random; 0: all.")
    add("--max-seq-len", type=int, default=512, help="Longest prompt and answer in tokens (default 512).")
    add("--batch-size", type=int, default=16, help="Pairs that are scored at once (default 16).")
    add(
        "--output-dir", type=Path, help="Folder of the report; default: the model's, or of a hub id this one."
    )
    args = parser.parse_args(argv)
    for name, minimum in {"num_pairs": 0, "max_seq_len": 4, "batch_size": 1}.items():
        if getattr(args, name) < minimum:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {minimum}, got {getattr(args, name)}."
            )
    if args.output_dir is None:
        args.output_dir = Path(args.model) if Path(args.model).is_dir() else Path()
    if not args.output_dir.is_dir():
        raise UserError(f"--output-dir {args.output_dir} is no folder; name one that is there.")
    return args


def held_out_text(args: argparse.Namespace) -> tuple[SplitText, str]:
    """The text of the pairs, and which they are in words. Raises `UserError`."""
    from dschat.data.held_out import RecordedData, SplitText

    if args.data:
        return SplitText.of_entries(args.data, "--data"), f"all pairs of {', '.join(args.data)}"
    recorded = RecordedData.of(args.model)
    if recorded is None:
        raise UserError(f"{args.model} has no arguments.json that says what its run held out; give --data.")
    return SplitText.of_run(recorded), f"the pairs that the run of {recorded.place} held out"


def tokenized(text: SplitText, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Rows:
    """The pairs as step 2 reads them. Raises `UserError` where there are none."""
    import numpy as np

    from dschat.data import splits
    from dschat.data.rows import Rows
    from dschat.data.tokenization import tokenize_pairs

    numbers = text.held_out()
    numbers = splits.first_of_each(text.index.row_keys, numbers[text.index.num_pairs[numbers] > 0])
    if args.num_pairs:
        numbers = numbers[splits.some_rows(text.index.row_keys[numbers], args.num_pairs, seed=0)]
    _, groups = np.unique(text.index.keys[numbers], return_inverse=True)
    found = tokenize_pairs(
        text.rows.select(numbers),
        tokenizer,
        max_seq_len=args.max_seq_len,
        groups=groups,
        sources=text.index.sources[numbers],
    )
    if not len(found.rows):
        why = "; ".join(f"{number} dropped: {reason}" for reason, number in found.dropped.items())
        raise UserError(f"there are no pairs to score{f' ({why})' if why else ''}; give other --data.")
    return Rows.of(found.rows)


def scores(args: argparse.Namespace, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[list[float]]:
    """Of each pair its row and both scores."""
    import torch

    from dschat.data.collate import collate_pairs
    from dschat.data.loaders import build_eval_loader
    from dschat.models.forward import ranking_of
    from dschat.rlhf.answering import load_reward_model

    model = load_reward_model(args.model, "MODEL")
    collate = partial(collate_pairs, pad_id=tokenizer.pad_token_id)
    loader = build_eval_loader(rows, collate, batch_size=args.batch_size, rank=0, world_size=1)
    table = []
    for numbers, batch in loader.indexed_batches():
        with torch.no_grad():
            ranked = ranking_of(model, batch.to(model.device), loss_fn="log_sig", denominator=1.0)
        both = (ranked[f"{name}_mean_scores"].tolist() for name in ("chosen", "rejected"))
        table += [list(row) for row in zip(numbers.tolist(), *both, strict=False)]  # without fillers
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Read, score, report."""
    args = parse(argv)
    import numpy as np

    from dschat.models.tokenizer import load_tokenizer
    from dschat.supervised.pair_report import announce_report, write_report

    text, which = held_out_text(args)
    tokenizer = load_tokenizer(args.model)
    rows = tokenized(text, tokenizer, args)
    print(f"{len(rows)} pairs: {which}", flush=True)
    table = np.array(scores(args, rows, tokenizer))
    if not np.isfinite(table).all():
        raise UserError(f"{args.model} gives {int((~np.isfinite(table)).sum())} scores that are not finite.")
    write_report(args.output_dir, f"Reward model {args.model}", table, rows, text.names, tokenizer)
    announce_report(args.output_dir)


if __name__ == "__main__":
    with readable_errors():
        main()
