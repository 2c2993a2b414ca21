"""Make a whole model of an adapter's folder (PEFT's adapter_config.json) and the model it was trained on.

    python scripts/merge_adapter.py output/lora output/merged

The steps take whole models. The base is the one that adapter_config.json names, unless --base_model names
another place for it. The tokenizer is the adapter's where its folder (or, for adapter/ in a folder of ours,
the one above it) has one, else the base's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.errors import UserError
from dschat.program import readable_errors


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="Folder with adapter_config.json.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="Folder to write.")
    parser.add_argument("--base_model", help="Folder or hub id of the base, if not where the adapter says.")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that the base model's folder brings."
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Read, merge and write. Raises `UserError`."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"OUTPUT {args.output} is there already; give a new folder.")
    from dschat.models.adapter_folder import merged_model
    from dschat.models.remote_code import set_consent

    set_consent(args.trust_remote_code)
    model, tokenizer = merged_model(args.adapter, args.base_model)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.adapter} on {model.name_or_path} -> {args.output}")


if __name__ == "__main__":
    with readable_errors():
        main(parse())
