"""A run of step 3, and replays of its steps, in one process.

[torchrun --nproc_per_node N] replays.py FILE, a JSON file of {"run": flags, "replays": [arguments, ...]}.
"""

import hashlib
import json
import sys
from pathlib import Path

from interrupted_runs import program
from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.console import messages
from dschat.distributed import process_group
from dschat.distributed.collectives import barrier
from dschat.program import prepare
from scripts import replay


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Checksum and time of change of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = hashlib.sha256(content).hexdigest(), path.stat().st_mtime_ns
    return found


def main(asked: dict) -> None:
    """Run and replay; the run's folder must stay as it is."""
    step3 = program("rlhf", ROOT / "step3_ppo" / "main.py")
    args = parse_arguments("rlhf", asked["run"])
    step3.main(args, prepare(args))
    barrier(axis="world")
    before = contents(Path(args.run.output_dir))
    for words in asked["replays"]:
        messages.info(f"== {replay.main(words)}")
        assert contents(Path(args.run.output_dir)) == before


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    process_group.destroy_process_group()
