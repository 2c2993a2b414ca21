"""Does PPO learn, which choices matter, what do its rivals do? Tables and plots, on a CPU in under an hour.

    python benchmarks/learning.py --output output/learning [--trl-python PYTHON] [--hh-data harmless.jsonl.gz]

Parts: a PPO, RLOO, GRPO, REINFORCE++ and DPO on the quickstart task, whose answers a program checks; b
important choices on and off; c real preferences (needs --hh-data); d the same task in TRL (needs
--trl-python, a Python that has trl==1.12.0); e a reward model made weak on purpose. Each seed has its own SFT
model, reward models and split of the prompts. A finished run is not run again; a killed one is made anew.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "scripts")]
for variable, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(variable, value)  # two runs share two cores

from learning_recipes import (
    RECIPES,
    ROWS,
    TRL_SETTINGS,
    WEAK_SHARE,
    Recipe,
    Row,
    demo_flags,
    recipes_of,
    step_flags,
    trl_rows,
)

from dschat.arguments import ReadableParser
from dschat.errors import UserError
from dschat.program import readable_errors

PARTS = ("a", "b", "c", "d", "e")
QUICK_STEPS, QUICK_ROWS = 6, 320
COMMAND, FIGURES = "command.json", "measured.json"
Item = TypeVar("Item")
Result = TypeVar("Result")


def main() -> None:
    """Prepare, run, measure, report."""
    args = parse()
    start = time.perf_counter()
    bench = Benchmark(args)
    bench.prepare()
    results = {"seeds": args.seeds, "skipped": skipped(args), **bench.run()}
    results["minutes"] = (time.perf_counter() - start) / 60
    from learning_report import write_report

    write_report(results, args.output)
    print(f"{results['minutes']:.1f} minutes; the table is {args.output / 'learning.md'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "output" / "learning", help="Folder of runs and results.")
    add("--parts", default=",".join(PARTS), help="Which parts, such as a,d (default: all).")
    add("--seeds", default="1,2,3", help="Seeds, separated by commas (default 1,2,3).")
    add("--jobs", type=int, default=2, help="Runs at a time, each on one core (default 2).")
    add("--trl-python", type=Path, help="A Python that has trl==1.12.0; without it part d has no rival.")
    add("--hh-data", type=Path, help="Anthropic's HH preferences, JSON lines; without it part c is left out.")
    add(
        "--quick",
        action="store_true",
        help="Few rows and steps: does everything run? The figures mean nothing.",
    )
    add("--only-finished", action="store_true", help="Start nothing: report the runs that have finished.")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"--parts {part} is none of {', '.join(PARTS)}.")
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        raise UserError(f"--seeds {args.seeds} is not of the form 1,2,3.")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}.")
    for name in ("trl_python", "hh_data"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise UserError(f"--{name.replace('_', '-')} {path} does not exist.")
    args.output = args.output.resolve()
    return args


def skipped(args: argparse.Namespace) -> dict[str, str]:
    """The parts asked for that lack what they need, and why; the report says so."""
    missing = {}
    if "c" in args.parts and args.hh_data is None:
        missing["c"] = "left out: no --hh-data was given."
    if "d" in args.parts and args.trl_python is None:
        missing["d"] = "TRL was left out: no --trl-python was given."
    return missing


class NotRun(Exception):
    """The run has not finished, and --only-finished starts none."""


class Benchmark:
    """The runs of one output folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._data = args.output / "demo" / "data"
        self._measuring = threading.Lock()

    def home(self, seed: int) -> Path:
        """Where the models lie that this seed's runs start from."""
        return self._args.output / "models" / f"seed{seed}"

    def prepare(self) -> None:
        """Data, and for each seed the SFT model, both reward models and the prompts of step 3 in tokens."""
        demo = self._args.output / "demo"
        if not (self._data / "test.jsonl").exists():
            self.program("scripts/demo_task.py", demo / "log", [str(demo)], python=sys.executable)
        if set(self._args.parts) != {"c"}:
            self.parallel(self._prepare_sft, self._args.seeds)
            self.parallel(lambda seed: self._prepare_reward(seed, weak=False), self._args.seeds)
        if "e" in self._args.parts:
            self.parallel(lambda seed: self._prepare_reward(seed, weak=True), self._args.seeds)
        if "c" in self._args.parts and self._args.hh_data:
            from learning_preferences import prepare

            prepare(self._args.hh_data, self._args.output / "preferences")
        if "d" in self._args.parts and self._args.trl_python:
            for seed in self._args.seeds:
                write_prompts(self.home(seed), self.common(seed))

    def common(self, seed: int) -> list[str]:
        """The flags of data and seed."""
        cache = str(self._args.output / "cache")
        return ["--data_path", str(self._data), "--seed", str(seed), "--data_output_path", cache]

    def _prepare_sft(self, seed: int) -> None:
        base = str(self._args.output / "demo" / "base_model")
        flags = ["--model_name_or_path", base, *self.common(seed), *demo_flags("sft"), *self._short("sft")]
        self.step("step1_sft/main.py", self.home(seed) / "sft", flags)

    def _prepare_reward(self, seed: int, *, weak: bool) -> None:
        sft = str(self.home(seed) / "sft")
        flags = ["--model_name_or_path", sft, *self.common(seed), *demo_flags("reward")]
        flags += self._short("reward")
        if weak:
            pairs = json.loads((self.home(seed) / "reward" / "summary.json").read_text())["num_train_rows"]
            flags += ["--max_train_samples", str(pairs // WEAK_SHARE)]
        self.step("step2_reward/main.py", self.home(seed) / reward_name(weak), flags)

    def run(self) -> dict[str, Any]:
        """All runs. -> `rows` of the tables, `sft` and `rewards` of each seed, `preferences` of part c."""
        parts, seeds = self._args.parts, self._args.seeds
        with_trl = "d" in parts and self._args.trl_python is not None
        sweep = [row for method in TRL_SETTINGS for row in trl_rows(method)] if with_trl else []
        jobs: list[Callable[[], Any]] = []
        if "c" in parts and self._args.hh_data:
            jobs += [lambda seed=seed: self._preferences(seed) for seed in seeds]
        names = recipes_of(parts)
        pairs = [(row.recipe, seeds[0]) for row in sweep] + [(name, s) for name in names for s in seeds]
        jobs += [lambda pair=pair: (pair, self.recipe(*pair)) for pair in pairs]
        done = self.parallel(lambda job: job(), jobs)
        preferences = [result for result in done if isinstance(result, dict)]
        figures = {pair: found for pair, found in filter(is_recipe, done) if found}
        shown = [row for row in ROWS if row.part in parts] + sweep
        if with_trl:
            # The best of each trainer on the first seed, by the truth, which is generous, runs on the others.
            best = [row for method in TRL_SETTINGS for row in self._best(figures, method, seeds[0])]
            again = [(row.recipe, seed) for row in best for seed in seeds[1:]]
            more = self.parallel(lambda pair: (pair, self.recipe(*pair)), again)
            figures |= {pair: found for pair, found in more if found}
            shown = [row for row in shown if row not in best] + [best_of(row) for row in best]
        rows = [
            {"part": row.part, "label": row.label, "recipe": row.recipe, "seed": seed, **figures[pair]}
            for row in shown
            for seed in seeds
            if (pair := (row.recipe, seed)) in figures
        ]
        starts = [] if parts == ["c"] else [self._start(seed) for seed in seeds]
        return {"rows": rows, "sft": starts, "preferences": preferences}

    @staticmethod
    def _best(figures: dict[tuple[str, int], dict[str, Any]], method: str, seed: int) -> list[Row]:
        """The best setting of those that have run, if one has."""
        tried = [row for row in trl_rows(method) if (row.recipe, seed) in figures]
        return [max(tried, key=lambda row: figures[row.recipe, seed]["success"])] if tried else []

    def _start(self, seed: int) -> dict[str, Any]:
        """What the runs of a seed start from: the SFT model's figures and the reward models' accuracies."""
        home, found = self.home(seed), {"seed": seed}
        for weak in (False, True):
            summary = home / reward_name(weak) / "summary.json"
            if summary.exists():
                found[f"{reward_name(weak)}_accuracy"] = json.loads(summary.read_text())["eval_accuracy"]
                with self._measuring:
                    figures = self._measured(home / "sft", home / f"sft_by_{reward_name(weak)}", seed, weak)
                found |= {"weak_score": figures["score"]} if weak else figures
        return found

    def _preferences(self, seed: int) -> dict[str, Any] | None:
        from learning_preferences import run_seed

        folder = self._args.output / "preferences"
        try:
            return run_seed(self.step, self._args.hh_data, folder, seed, short=self._short)
        except NotRun:
            return None

    def recipe(self, name: str, seed: int) -> dict[str, Any] | None:
        """Run a recipe unless it has been run. -> its held-out figures, `seconds` and `curve`.

        None where it has not, and --only-finished starts none.
        """
        from learning_preferences import read_curve

        recipe, folder = RECIPES[name], self._args.output / "runs" / name / f"seed{seed}"
        try:
            summary = self._train(recipe, folder, seed)
        except NotRun:
            return None
        actor = folder if recipe.trainer == "dpo" else folder / "actor"
        with self._measuring:
            figures = self._measured(actor, folder, seed, recipe.weak_reward)
        figures["seconds"] = summary["seconds"]
        figures["curve"] = [] if recipe.trainer == "dpo" else read_curve(folder)
        print(
            f"{name} seed {seed}: success {figures['success']:.1%}, KL {figures['kl']:.2f}, score "
            f"{figures['score']:.2f}, {figures['seconds']:.0f} s",
            flush=True,
        )
        return figures

    def _train(self, recipe: Recipe, folder: Path, seed: int) -> dict[str, Any]:
        home = self.home(seed)
        sft, reward = str(home / "sft"), str(home / reward_name(recipe.weak_reward))
        if recipe.trainer == "trl":
            flags = ["--sft", sft, "--reward", reward, "--prompts", str(home / "prompts.jsonl")]
            flags += ["--seed", str(seed), "--output", str(folder), *recipe.flags]
            flags += self._short("trl")
            return self.program("benchmarks/learning_trl.py", folder, flags, python=self._args.trl_python)
        if recipe.trainer == "dpo":
            flags = [
                "--model_name_or_path",
                sft,
                *self.common(seed),
                *step_flags(recipe),
                *self._short("dpo"),
            ]
            return self.step("step2_reward/dpo.py", folder, flags)
        flags = ["--actor_model_name_or_path", sft, "--critic_model_name_or_path", reward]
        flags += [*self.common(seed), *step_flags(recipe), *self._short("ppo")]
        return self.step("benchmarks/learning_watch.py", folder, flags)

    def _short(self, trainer: str) -> list[str]:
        """The flags by which --quick shortens a run."""
        if not self._args.quick:
            return []
        if trainer == "trl":
            return ["--steps", str(QUICK_STEPS)]
        if trainer == "ppo":
            return ["--enable_test_mode", "--test_stop_step", str(QUICK_STEPS)]
        return ["--max_train_samples", str(QUICK_ROWS), "--num_train_epochs", "1"]

    def _measured(self, actor: Path, folder: Path, seed: int, weak: bool) -> dict[str, Any]:
        """The actor's held-out figures, kept in the folder."""
        kept = folder / FIGURES
        if not kept.exists():
            from learning_measure import measure

            home = self.home(seed)
            figures = measure(actor, home / "sft", home / reward_name(weak), self._data / "test.jsonl")
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(figures) + "\n")
        return json.loads(kept.read_text())

    def step(self, program: str, folder: Path, flags: list[str]) -> dict[str, Any]:
        """Run a program of this project's that takes --output_dir. -> its summary.

        What a killed run left in the folder is replaced, a checkpoint too: the figures are of whole runs.
        """
        flags = [*flags, "--output_dir", str(folder)]
        return self.program(program, folder, flags, python=sys.executable, anew=["--overwrite_output_dir"])

    def program(
        self, name: str, folder: Path, flags: list[str], *, python: str | Path, anew: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run it unless it finished before with the same flags. -> its summary, empty where it writes none.

        `anew` are flags that let it write into the folder of a run that did not finish. Exits with the end of
        its log where it fails.
        """
        summary, kept = folder / "summary.json", folder / COMMAND
        command = [str(python), str(ROOT / name), *flags]
        if summary.exists() and kept.exists() and json.loads(kept.read_text()) == command:
            return json.loads(summary.read_text())
        if self._args.only_finished:
            raise NotRun
        folder.mkdir(parents=True, exist_ok=True)
        for old in (summary, folder / FIGURES):
            old.unlink(missing_ok=True)
        kept.write_text(json.dumps(command))
        log = folder / "console.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} if python == sys.executable else None
        with log.open("w") as console:
            done = subprocess.run(
                [*command, *anew], stdout=console, stderr=console, check=False, env=environment
            )
        if done.returncode != 0:
            end = "\n".join(log.read_text().splitlines()[-10:])
            raise UserError(f"a run failed:\n{shlex.join(command)}\n{end}")
        return json.loads(summary.read_text()) if summary.exists() else {}

    def parallel(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`work` on all items, --jobs at a time; the first failure ends what has not begun."""
        with ThreadPoolExecutor(self._args.jobs) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def is_recipe(result: Any) -> bool:
    """Whether a job's result is a recipe's, with its name and seed, and not that of part c."""
    return isinstance(result, tuple)


def reward_name(weak: bool) -> str:
    """The folder of a reward model beside its SFT model."""
    return "weak_reward" if weak else "reward"


def best_of(row: Row) -> Row:
    """The row of a trainer's best setting."""
    return Row(row.part, f"{row.label} (its best)", row.recipe)


def write_prompts(home: Path, common: list[str]) -> None:
    """Step 3's prompts as tokens and text, one JSON object a line, for TRL."""
    from dschat.arguments import parse_arguments
    from dschat.data.preparation import prompt_data
    from dschat.models.tokenizer import load_tokenizer

    models = ["--actor_model_name_or_path", str(home / "sft")]
    models += ["--critic_model_name_or_path", str(home / "reward")]
    args = parse_arguments("rlhf", [*models, *common, *demo_flags("ppo")])
    tokenizer = load_tokenizer(str(home / "sft"))
    data = prompt_data(
        args.data, tokenizer, max_prompt_seq_len=args.rollout.max_prompt_seq_len, seed=args.run.seed
    )
    prompts = data.train.table["input_ids"].to_pylist()
    rows = [{"input_ids": ids, "prompt": tokenizer.decode(ids)} for ids in prompts]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    with readable_errors():
        main()
