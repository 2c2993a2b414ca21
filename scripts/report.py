"""What a run did, as one page: of a pipeline, or of a single step, also of one that goes on or has failed.

    python scripts/report.py output
    python scripts/report.py output/step3_ppo --html ppo.html

OUTPUT_DIR is the folder of the whole pipeline or the --output_dir of a step. The page has for each step the
command, data and versions, its curves with the bounds of what is healthy, time and memory beside the plan,
verdicts, warnings and samples. It needs no network and nothing beside it.
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
    """The command line."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="Folder of a pipeline or step.")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="The page (default: report.html in the folder)."
    )
    args = parser.parse_args(argv)
    args.html = args.html or args.output_dir / "report.html"
    return args


def write_report(output_dir: Path, html: Path) -> None:
    """Write the page. Raises `UserError` where the folder holds no run."""
    from dschat.reports.page import page, write_page
    from scripts.report_blocks import blocks_of
    from scripts.report_runs import find_runs

    runs = find_runs(output_dir)
    if not runs:
        raise UserError(
            f"{output_dir} holds no run: neither it nor a folder in it has an arguments.json or a "
            "training.log; "
            "name the --output_dir of a step, or the --output-dir of dschat e2e."
        )
    write_page(html, page(f"Run {output_dir}", blocks_of(output_dir, runs)), "--html")


def main(argv: Sequence[str] | None = None) -> None:
    """Read what there is, write the page."""
    args = parse(argv)
    write_report(args.output_dir, args.html)
    print(f"the report is in {args.html}", flush=True)


if __name__ == "__main__":
    with readable_errors():
        main()
