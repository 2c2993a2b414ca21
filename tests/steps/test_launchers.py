"""Every recipe is run, with a stand-in for what it starts that writes down its flags."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dschat.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "rlhf"}
LAUNCHERS = sorted(path for step in STEPS for path in (ROOT / step).glob("run_*.sh"))
STUB = """#!/bin/bash
printf '%s\\0' "$@" >"$STUB_LOG"
"""


HUB_MODEL = "run_gsm8k_demo.sh"
"""Starts from a model of the hub, and from no step of ours."""


def is_dpo(path: Path) -> bool:
    return path.name.startswith("run_dpo_")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def run(path: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run a launcher from another directory; deepspeed, torchrun and python are stand-ins."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for program in ("deepspeed", "torchrun", "python"):
        (commands / program).write_text(STUB)
        (commands / program).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": str(commands / "python"),
        "OUTPUT": str(folder / "out put"),
        "STUB_LOG": str(folder / "log"),
    }
    return subprocess.run(["bash", path, *flags], cwd=folder, env=environment, capture_output=True, text=True)


def started(folder: Path) -> list[str]:
    return (folder / "log").read_text().split("\0")[:-1]


@pytest.fixture
def finished(tmp_path):
    """A folder in which the earlier steps have finished."""
    for step in ("step1_sft", "step2_reward"):
        (tmp_path / "out put" / step).mkdir(parents=True)
        (tmp_path / "out put" / step / "summary.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_a_launcher_starts_its_step_with_flags_that_exist(path, finished):
    result = run(path, finished, "--seed", "77")
    assert result.returncode == 0, result.stderr
    argv = started(finished)
    program, step, folder = "main.py", STEPS[path.parent.name], path.parent.name
    if is_dpo(path):
        program, step, folder = "dpo.py", "dpo", "step2_dpo"
    main = argv.index(str(path.parent / program))
    arguments = parse_arguments(step, argv[main + 1 :])
    assert arguments.run.seed == 77, "flags given to the launcher come last and win"
    assert arguments.run.output_dir == str(finished / "out put" / folder)


@pytest.mark.parametrize("path", LAUNCHERS, ids=name)
def test_a_launcher_is_strict_and_says_how_to_run_it(path):
    text = path.read_text()
    assert "set -euo pipefail" in text
    assert f"bash {name(path)}" in text
    assert text.rstrip().endswith('"$@"')
    assert os.access(path, os.X_OK)


LATER_DEMOS = [p for p in LAUNCHERS if p.name.endswith("demo.sh") and p.name != HUB_MODEL][1:]


@pytest.mark.parametrize("path", LATER_DEMOS, ids=name)
def test_a_demo_step_without_its_predecessor_says_what_to_run_first(path, tmp_path):
    result = run(path, tmp_path)
    assert result.returncode == 2
    assert "run bash step1_sft/run_demo.sh first" in result.stderr


def test_the_gsm8k_recipe_takes_its_rule_from_beside_it_and_the_data_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "my gsm8k.jsonl")
    assert run(ROOT / "step3_ppo" / HUB_MODEL, tmp_path).returncode == 0
    argv = started(tmp_path)
    arguments = parse_arguments("rlhf", argv[argv.index(str(ROOT / "step3_ppo" / "main.py")) + 1 :])
    assert arguments.data.data_path == ["my gsm8k.jsonl"]
    assert arguments.reward_path is None
    file, _, function = arguments.rewards.reward_function[0].rpartition(":")
    assert f"def {function}(" in Path(file).read_text()


def test_dpo_starts_from_what_step_1_writes_on_the_pairs_of_step_2(tmp_path):
    recipe = "llama_8b_single_node_lora.sh"
    shared = []
    for program, file in (("main.py", f"run_{recipe}"), ("dpo.py", f"run_dpo_{recipe}")):
        assert run(ROOT / "step2_reward" / file, tmp_path).returncode == 0
        argv = started(tmp_path)
        step = {"main.py": "reward", "dpo.py": "dpo"}[program]
        flags = argv[argv.index(str(ROOT / "step2_reward" / program)) + 1 :]
        arguments = parse_arguments(step, flags)
        shared.append([arguments.data, arguments.run.seed, arguments.batch.max_seq_len])
    assert shared[0] == shared[1]
    assert arguments.model.model_name_or_path == str(tmp_path / "out put" / "step1_sft")


@pytest.mark.slow
def test_the_steps_of_a_recipe_fit_together(tmp_path):
    """What one step writes the next one reads, and the data are shared alike."""
    recipes = {path.name for path in LAUNCHERS if path.parent.name == "step3_ppo"}
    recipes -= {"run_demo.sh", HUB_MODEL}
    for recipe in recipes:
        shared = set()
        for step in ("step1_sft", "step2_reward", "step3_ppo"):
            # The reward model of OPT-1.3b is an OPT-350m.
            file = recipe.replace("1.3b", "350m") if step == "step2_reward" else recipe
            assert run(ROOT / step / file, tmp_path).returncode == 0
            argv = started(tmp_path)
            arguments = parse_arguments(STEPS[step], argv[argv.index(str(ROOT / step / "main.py")) + 1 :])
            data = arguments.data
            shared.add(json.dumps([data.data_path, data.data_split, data.eval_fraction, arguments.run.seed]))
        assert len(shared) == 1, recipe
        assert arguments.actor.model_name_or_path == str(tmp_path / "out put" / "step1_sft")
        assert arguments.critic.model_name_or_path == str(tmp_path / "out put" / "step2_reward")
