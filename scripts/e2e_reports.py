"""What e2e_rlhf.py writes at its end: the comparison of SFT and PPO, and the report on all steps."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from dschat.runs.output_folder import ARGUMENTS
from scripts.e2e_step import FOLDERS
from scripts.report import write_report
from scripts.report_runs import read_json

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = ("max_answer_seq_len", "temperature", "top_p", "top_k")
"""What the comparison takes from step 3."""


def compare_actors(output_dir: Path, num_prompts: int) -> None:
    """Compare what steps 1 and 3 wrote on held-out prompts, by the reward model, in a process of its own.

    Nothing where one of them is not there. A failure is said and ends nothing.
    """
    sft, reward, ppo = (output_dir / FOLDERS[step] for step in (1, 2, 3))
    arguments = read_json(ppo / ARGUMENTS)
    there = all((folder / "config.json").is_file() for folder in (sft, reward, ppo / "actor"))
    if not (there and isinstance(arguments, dict)):
        return
    flags = ["--model", f"SFT={sft}", "--model", f"PPO={ppo / 'actor'}", "--reward-model", str(reward)]
    flags += ["--num-prompts", str(num_prompts), "--num-shown", "1"]
    for name, value in arguments.get("rollout", {}).items():
        flags += [f"--{name.replace('_', '-')}", str(value)] if name in SAMPLING else []
    flags += [f"--html={output_dir / 'comparison.html'}", f"--output={output_dir / 'comparison.json'}"]
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *flags]
    print("== SFT and PPO on held-out prompts", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        print(f"the comparison ended with exit code {code}: {shlex.join(command)}", flush=True)


def report_on(output_dir: Path) -> None:
    """Write report.html about what there is. A failure is said and ends nothing."""
    page = output_dir / "report.html"
    try:
        write_report(output_dir, page)
    except Exception as error:  # no page is worth the pipeline's exit code
        print(f"no report on the steps: {error!r}", flush=True)
    else:
        print(f"the report on all steps is in {page}", flush=True)
