"""Does the forecast of scripts/forecast.py hold? Beside real PPO, with a good and a weak reward model.

    python benchmarks/forecast.py --output output/forecast [--seeds 1,2,3] [--only-finished]

Per seed, with the models and recipes of benchmarks/learning.py: a forecast from best-of-64, with the demo
task's rules as gold; the quickstart's PPO against the good reward model; and PPO against the weak one with
little to hold it back (recipe weak_loose), which runs into the KL where gold turns; and both again with the
--kl_target and --max_kl that the forecast recommends. The answers of every PPO step are checked by the same
rules, so one run shows gold along its KL. A finished run is not run again.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "scripts")]

import learning
from learning_preferences import read_curve
from learning_recipes import LOOSE_KL, Recipe, demo_flags
from learning_report import smoothed, table

from dschat.program import readable_errors

RECIPE_OF = {"good": "ppo", "weak": "weak_loose"}
ADVISED = {"good": (), "weak": LOOSE_KL}
"""What the runs as recommended change beside; their guard and evaluations are those of the quickstart."""
OFTEN = ("--eval_interval", "2", "--patience", "1")
"""So that evaluations fall below --max_kl, and the run ends with the first step above it."""
NUM_ANSWERS, NUM_PROMPTS = 64, 128
NOISE = 2 * 0.02
"""Two standard errors of a share of 600 answers, or of SMOOTHING PPO steps of 128 answers."""


def right(prompts: list[str], answers: list[str]) -> list[float]:
    """Gold: 1 for an answer without a fault."""
    from demo_task import check_answer

    return [float(not check_answer(*pair)) for pair in zip(prompts, answers, strict=True)]


class Forecasts(learning.Benchmark):
    """The runs of one output folder, and the forecasts beside them."""

    def forecast(self, seed: int, *, weak: bool) -> dict[str, Any]:
        """The content of forecast.json, with the `wall_seconds` of the whole program."""
        home = self.home(seed)
        folder = home / f"forecast_{learning.reward_name(weak)}"
        path, clock = folder / "forecast.json", folder / "seconds.json"
        if not clock.is_file():
            if self._args.only_finished:
                raise learning.NotRun
            command = [sys.executable, str(ROOT / "scripts" / "forecast.py"), "--output", str(folder)]
            command += ["--gold_function", f"{Path(__file__).resolve()}:right", "--force"]
            command += ["--num_answers", str(NUM_ANSWERS), "--num_prompts", str(NUM_PROMPTS)]
            command += ["--actor_model_name_or_path", str(home / "sft")]
            command += ["--critic_model_name_or_path", str(home / learning.reward_name(weak))]
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            with (folder / "console.log").open("w") as log:
                subprocess.run(
                    [*command, *self.common(seed), *demo_flags("ppo")],
                    stdout=log,
                    stderr=log,
                    check=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
            clock.write_text(json.dumps(time.perf_counter() - start))
        return {**json.loads(path.read_text()), "wall_seconds": json.loads(clock.read_text())}

    def advised(self, seed: int, kind: str, *, often: bool) -> dict[str, Any] | None:
        """PPO at the recommended settings: what its exported actor is worth, and its last answers.

        None where --only-finished lacks it.
        """
        weak = kind == "weak"
        told = self.forecast(seed, weak=weak)
        flags = list(ADVISED[kind])
        flags += (word for name in ("kl_target", "max_kl") for word in (f"--{name}", f"{told[name]:.2g}"))
        recipe = Recipe("ppo", (*flags, *(OFTEN if often else ())), weak_reward=weak)
        folder = self._args.output / "runs" / f"advised_{kind}{'_often' * often}" / f"seed{seed}"
        try:
            summary = self._train(recipe, folder, seed)
        except learning.NotRun:
            return None
        with self._measuring:
            exported = self._measured(folder / "actor", folder, seed, weak)
        curve = read_curve(folder)
        return {
            "flags": flags,
            "exported": {"kl": exported["kl"], "success": exported["success"]},
            "last": {"kl": curve[-1]["kl"], "success": smoothed(curve)[-1]["checked_success"]},
            "steps": summary["ppo_steps"],
            "seconds": summary["seconds"],
        }

    def case(self, seed: int, kind: str) -> dict[str, Any] | None:
        """A forecast and the PPO run that it is about; None where --only-finished lacks one."""
        try:
            told = self.forecast(seed, weak=kind == "weak")
            run = self.recipe(RECIPE_OF[kind], seed)
            start = self._start(seed)["success"]
        except learning.NotRun:
            return None
        if run is None:
            return None
        advised = {often: self.advised(seed, kind, often=often) for often in (False, True)}
        more = {"seed": seed, "reward_model": kind, "start": start, "advised": advised}
        return compared(told, run, start) | more


def at(points: list[dict[str, Any]], kl: float, name: str) -> float:
    """A number of the forecast's gain between its points, by a straight line; the last one beyond them."""
    for before, after in itertools.pairwise(points):
        if kl <= after["kl"]:
            share = max(kl - before["kl"], 0.0) / (after["kl"] - before["kl"])
            return before["gain"][name] + share * (after["gain"][name] - before["gain"][name])
    return points[-1]["gain"][name]


def compared(told: dict[str, Any], run: dict[str, Any], start: float) -> dict[str, Any]:
    """What was told and what PPO did, and which of it was a hit.

    "within noise" asks for the KLs at which PPO is within `NOISE` of its peak, and not for that of the peak.
    PPO's `success` after training is measured on 600 test prompts, `start` that of the SFT model; its peak is
    that of the checked success of its own answers. Of both a difference within `NOISE` counts as none.
    """
    curve = smoothed(run["curve"])
    peak = max(curve, key=lambda row: row["checked_success"])
    gain, kl = run["success"] - start, run["kl"]
    low, high = at(told["points"], kl, "low") - NOISE, at(told["points"], kl, "high") + NOISE
    turned = peak["checked_success"] - curve[-1]["checked_success"] > NOISE
    reached = max(row["kl"] for row in curve)
    turning, peak_gain = told["turning_kl"], peak["checked_success"] - start
    near = [row["kl"] for row in curve if peak["checked_success"] - row["checked_success"] <= NOISE]
    both_turn = turned and told["turns"]
    hits = {
        "worth": told["is_worth_it"] == (peak_gain > NOISE),
        "turns": (told["turns"] and reached >= turning["low"]) == turned,
        "turning KL": turning["low"] <= peak["kl"] <= turning["high"] if both_turn else None,
        "within noise": turning["low"] <= max(near) and min(near) <= turning["high"] if both_turn else None,
        "gain": low <= gain <= high,
    }
    return {
        "verdict": told["verdict"],
        "turning_kl": turning,
        "kl_target": told["kl_target"],
        "peak_gain": told["peak"]["gain"],
        "told_gain": [low, at(told["points"], kl, "value"), high],
        "ppo": {"kl": kl, "gain": gain, "peak_kl": peak["kl"], "peak_gain": peak_gain, "turned": turned}
        | {"near": [min(near), max(near)]},
        "hits": hits,
        "seconds": {"forecast": told["wall_seconds"], "ppo": run["seconds"]},
    }


def markdown(cases: list[dict[str, Any]]) -> str:
    """The tables."""

    def share(value: float) -> str:
        return f"{100 * value:+.1f}"

    def told(case: dict[str, Any]) -> str:
        turning = case["turning_kl"]
        return f"{turning['value']:.2f} ({turning['low']:.2f} to {turning['high']:.2f})"

    def hit(value: bool | None) -> str:
        return "not tested" if value is None else "hit" if value else "miss"

    lines = [
        (
            str(case["seed"]),
            case["reward_model"],
            told(case),
            f"{case['ppo']['peak_kl']:.2f}{'' if case['ppo']['turned'] else ', not turned'}",
            "{:.2f} to {:.2f}".format(*case["ppo"]["near"]),
            f"{share(case['told_gain'][1])} ({share(case['told_gain'][0])} to {share(case['told_gain'][2])})",
            f"{share(case['ppo']['gain'])} at {case['ppo']['kl']:.2f}",
            *(hit(case["hits"][name]) for name in ("worth", "turns", "turning KL", "within noise", "gain")),
            f"{case['seconds']['forecast']:.0f} / {case['seconds']['ppo']:.0f}",
        )
        for case in cases
    ]
    header = (
        "seed",
        "reward model",
        "told: KL of the peak",
        "PPO: KL of the peak",
        "PPO: within noise of it",
    )
    header += ("told: gain at PPO's KL", "PPO: gain, at its KL", "worth it", "turns", "turning KL")
    header += ("turning KL within noise", "gain", "seconds, forecast / PPO")
    verdicts = [f"- seed {case['seed']}, {case['reward_model']}: {case['verdict']}" for case in cases]
    return "\n\n".join([table(header, lines), "\n".join(verdicts), advice_taken(cases)]) + "\n"


def advice_taken(cases: list[dict[str, Any]]) -> str:
    """The table of PPO at the recommended settings: gains over the SFT model, each at its KL."""

    def gains(case: dict[str, Any], often: bool) -> list[str]:
        run = case["advised"][often]
        if run is None:
            return ["not run"] * 3
        ends = (run[name] for name in ("exported", "last"))
        shown = [f"{100 * (end['success'] - case['start']):+.1f} at {end['kl']:.2f}" for end in ends]
        return [*shown, str(run["steps"])]

    lines = [
        (
            str(case["seed"]),
            case["reward_model"],
            " ".join(next(run["flags"] for run in case["advised"].values() if run)),
            f"{100 * case['ppo']['gain']:+.1f} at {case['ppo']['kl']:.2f}",
            *gains(case, False),
            *gains(case, True),
        )
        for case in cases
        if any(case["advised"].values())
    ]
    header = ("seed", "reward model", "recommended", "plain PPO")
    header += ("as told: actor/", "its last answers", "PPO steps")
    return table(header + ("evaluated often: actor/", "its last answers", "PPO steps"), lines)


def main() -> None:
    """Prepare, forecast, run, compare."""
    args = learning.parse([*sys.argv[1:], "--parts", "a,e"])
    bench = Forecasts(args)
    bench.prepare()
    pairs = [(seed, kind) for seed in args.seeds for kind in RECIPE_OF]
    found = [case for case in bench.parallel(lambda pair: bench.case(*pair), pairs) if case]
    (args.output / "forecast.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "forecast.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    with readable_errors():
        main()
