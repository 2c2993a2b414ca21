"""The pure parts of benchmarks/learning.py: its command lines, its arithmetic, its report."""

import json
import subprocess
import sys

import learning
import learning_preferences as preferences
import learning_recipes as recipes
import learning_report as report
import learning_watch as watch
import pytest

from dschat.arguments import parse_arguments
from dschat.errors import UserError


def flat(step: int, kl: float, success: float) -> dict[str, float]:
    return {"step": step, "kl": kl, "score": 2 * success, "checked_success": success}


def run(part: str, label: str, recipe: str, seed: int, success: float, kl: float = 1.0) -> dict:
    return {
        "part": part,
        "label": label,
        "recipe": recipe,
        "seed": seed,
        "success": success,
        "kl": kl,
        "score": 3.0,
        "seconds": 60.0,
        "curve": [flat(step, kl * step / 10, success) for step in range(1, 11)],
    }


def results() -> dict:
    successes = {"ppo": (0.6, 0.7), "four_epochs": (0.6, 0.5), "one_epoch": (0.5, 0.5), "weak": (0.1, 0.4)}
    parts = {"ppo": "a", "four_epochs": "b", "one_epoch": "b", "weak": "e"}
    rows = [
        run(parts[name], name, name, seed, success)
        for name, values in successes.items()
        for seed, success in enumerate(values, start=1)
    ]
    rows += [run("d", "TRL PPO, rate 1e-4 (its best)", "trl", seed, 0.55, kl=2.0) for seed in (1, 2)]
    start = {"success": 0.3, "score": 1.0, "weak_score": 0.5, "reward_accuracy": 0.9}
    return {
        "seeds": [1, 2],
        "minutes": 3.0,
        "skipped": {"c": "left out: no --hh-data was given."},
        "rows": rows,
        "sft": [{"seed": 1, **start}, {"seed": 2, **start}],
        "preferences": [],
    }


@pytest.mark.parametrize("name", [n for n, recipe in recipes.RECIPES.items() if recipe.trainer != "trl"])
def test_every_recipe_is_a_command_line_that_its_step_accepts(name):
    recipe = recipes.RECIPES[name]
    flags, _ = watch.take_dropout(recipes.step_flags(recipe))
    models = ["--actor_model_name_or_path", "sft", "--critic_model_name_or_path", "reward"]
    if recipe.trainer == "dpo":
        models = ["--model_name_or_path", "sft"]
    parsed = parse_arguments(
        "dpo" if recipe.trainer == "dpo" else "rlhf", [*models, "--data_path", "d", *flags]
    )
    assert parsed.run.dtype == "fp32"  # of the demo's common flags


def test_preferences_are_command_lines_that_the_steps_accept():
    one, two = (
        ["--model_name_or_path", "m"],
        ["--actor_model_name_or_path", "m", "--critic_model_name_or_path", "m"],
    )
    for step, models in (("sft", one), ("reward", one), ("rlhf", two)):
        flags = {"sft": preferences.SFT, "reward": preferences.REWARD, "rlhf": preferences.PPO}[step]
        parse_arguments(step, [*models, "--data_path", "d", *flags])


def test_a_changed_flag_comes_after_the_quickstarts_own():
    flags = recipes.step_flags(recipes.RECIPES["four_epochs"])
    assert flags[-2:] == ["--ppo_epochs", "4"]
    assert flags.index("--ppo_epochs") < len(flags) - 2


def test_every_row_names_a_recipe_and_shared_ones_run_once():
    rows = [*recipes.ROWS, *recipes.trl_rows("ppo"), *recipes.trl_rows("rloo")]
    assert all(row.recipe in recipes.RECIPES for row in rows)
    assert recipes.recipes_of(["a", "b"]).count("ppo") == 1
    assert recipes.recipes_of(["e"])[:4] == ["weak", "weak_target", "weak_guard", "weak_guard_target"]


def test_part_e_compares_guard_and_kl_target_on_and_off():
    flags = [recipes.RECIPES[name].flags for name in recipes.recipes_of(["e"])]
    assert len(set(flags)) == 6


def test_spread_is_the_sample_standard_deviation():
    # Mean 2; squares 1 + 0 + 1 over n - 1 = 2.
    assert report.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert report.mean_and_spread([5.0]) == (5.0, 0.0)


def test_at_kl_reads_a_smoothed_curve_between_its_points():
    # Means over 5 steps: KL 2, 3, 4 and success .2, .3, .4; at KL 2.5 success is half-way, .25.
    curve = [flat(step, step - 1, (step - 1) / 10) for step in range(1, 8)]
    assert report.at_kl(curve, 2.5, "checked_success") == pytest.approx(0.25)
    assert report.at_kl(curve, 4.5, "checked_success") is None
    assert report.at_kl([], 1.0, "score") is None


def test_longer_is_better_counts_a_tie_half():
    # Right, wrong, tie: (1 + 0 + .5) / 3; variance (.25 + .25 + 0) / 3, over 3 pairs.
    found = preferences.longer_is_better([(5, 3), (2, 4), (6, 6)])
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["accuracy_stderr"] == pytest.approx((0.5 / 3 / 3) ** 0.5)


def test_the_report_keeps_losses_and_says_what_is_missing():
    text = report.markdown(results())
    assert "| ppo | 65.0 ± 7.1 | +35.0 | +30.0 | 1.00 ± 0.00 | 3.00 ± 0.00 | 60 ± 0 |" in text
    assert "| weak | 25.0 ± 21.2 | -5.0 | -20.0 |" in text
    assert "left out: no --hh-data was given." in text
    assert text.index("## a.") < text.index("## b.") < text.index("## d.") < text.index("## e.")


def test_verdicts_say_yes_and_no():
    said = "\n".join(report.verdicts(results()))
    assert "PPO gains 30.0 to 40.0 points over SFT at a KL of 1.00: at least 20 in every seed, yes." in said
    assert "TRL's PPO at its best reaches 55.0 ± 0.0 % at a KL of 2.00, ours 65.0 ± 7.1 % at 1.00" in said
    assert "the worst seed of four is +20.0 points from SFT" in said
    assert "the worst seed ends -20.0 points from SFT; never below it, no." in said


@pytest.mark.slow
def test_plots_are_written_for_the_parts_that_ran(tmp_path):
    plots = pytest.importorskip("learning_plots", reason="matplotlib is one of the development packages")
    found = results()
    found["preferences"] = [
        {"seed": 1, "accuracy": 0.6, "accuracy_stderr": 0.02, "longer_accuracy": 0.45,
         "longer_accuracy_stderr": 0.02, "curve": found["rows"][0]["curve"]}
    ]  # fmt: skip
    plots.plot_all(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"part_{part}.png" for part in "abcde"}


def test_dropout_is_taken_out_of_step_3s_flags():
    assert watch.take_dropout(["--seed", "1", "--watch-dropout", "0.1", "--x"]) == (
        ["--seed", "1", "--x"],
        0.1,
    )
    assert watch.take_dropout(["--seed", "1"]) == (["--seed", "1"], 0.0)


def test_watched_answers_are_checked_by_the_demos_rules():
    prompt = "\n\nHuman: Please name two fruits for Ben.\n\nAssistant:"
    assert watch.share_right([prompt] * 2, [" apple and pear.", " apple and brick."]) == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "a,z"], "--parts z"),
        (["--seeds", "1,x"], "--seeds 1,x"),
        (["--jobs", "0"], "--jobs"),
        (["--trl-python", "/nowhere/python"], "--trl-python /nowhere/python does not exist"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        learning.parse(argv)


def test_a_finished_run_is_reused_only_with_the_same_flags(tmp_path):
    bench = learning.Benchmark(learning.parse(["--output", str(tmp_path)]))
    writer = "import json, sys, time; open(sys.argv[1], 'w').write(json.dumps({'now': time.time_ns()}))"
    program = tmp_path / "writer.py"
    program.write_text(writer)
    target = tmp_path / "run"

    def once(*more: str) -> dict:
        return bench.program(program, target, [str(target / "summary.json"), *more], python=sys.executable)

    first = once()
    assert once() == first
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.subprocess, "run", lambda command, **_: started.append(command) or ended)
        ended = subprocess.CompletedProcess([], 0)
        (target / "summary.json").unlink()  # a run that was killed
        bench.step(program, target, [])
    assert started[0][-3:] == ["--output_dir", str(target), "--overwrite_output_dir"]
    assert json.loads((target / "command.json").read_text()) == started[0][:-1]
    assert once("--other") != first
    (target / "summary.json").unlink()
    program.write_text("raise SystemExit('it broke')")
    with pytest.raises(UserError, match="it broke"):
        once("--other")
    assert json.loads((target / "command.json").read_text())[-1] == "--other"
