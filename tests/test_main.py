"""The command dschat, from the checkout and from an installed wheel."""

import shutil
import subprocess
import sys

import pytest
from processes import ROOT, environment
from safetensors.torch import load_file
from tiny import save_counting_pairs, save_tiny_model

from dschat.__main__ import COMMANDS, overview, programs_root


def dschat(*words: object, cwd=None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dschat", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**env), cwd=cwd, check=False
    )


def test_every_command_is_a_file_of_the_tree_and_is_listed():
    assert programs_root() == ROOT
    for name, program in COMMANDS.items():
        assert (ROOT / program.file).is_file()
        assert f"  {name} " in overview()


def test_the_command_alone_prints_the_pipeline_and_an_unknown_one_the_nearest():
    assert dschat().stdout.strip() == overview()
    assert dschat("--version").stdout.startswith("dschat ")
    wrong = dschat("revard")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        wrong.stderr
        == "error: dschat has no command 'revard' (did you mean reward?); dschat --help lists them.\n"
    )
    assert "bash scripts/demo.sh [FOLDER]" in dschat("demo", "--help").stdout
    # The deepspeed launcher puts its flag before the command.
    assert dschat("--local_rank=0", "sft", "--sed", "1").stderr.startswith(
        "error: unknown flag --sed (did you mean"
    )


@pytest.mark.slow
def test_a_wheel_holds_the_programs_and_a_run_repeats_by_its_arguments(tmp_path):
    """The wheel stands alone: nothing of the checkout is on the path."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("dschat", "step1_sft", "step2_reward", "step3_ppo", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)

    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / "base")
    flags = [
        "--model_name_or_path",
        "base",
        "--data_path",
        "pairs.jsonl",
        "--dtype",
        "fp32",
        "--max_seq_len",
        64,
    ]
    first = dschat("sft", *flags, "--output_dir", "first", "--seed", 5, cwd=tmp_path, PYTHONPATH=str(site))
    assert first.returncode == 0, first.stderr
    again = ["sft", "--config", "first/arguments.json", "--output_dir", "again"]
    assert dschat(*again, cwd=tmp_path, PYTHONPATH=str(site)).returncode == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
