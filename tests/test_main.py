"""The command dschat, from the checkout and from an installed wheel."""

import ast
import re
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import pytest
from processes import ROOT, environment, python
from safetensors.torch import load_file
from tiny import save_counting_pairs, save_tiny_model

from dschat import __main__ as main_module
from dschat.__main__ import COMMANDS, overview, programs_root
from dschat.arguments import ReadableParser, as_typed
from dschat.runs import started


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


def test_help_tells_how_the_program_was_started_and_takes_less_than_a_second_of_a_processor():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = dschat("reward", "--help").stdout
    assert told.startswith("usage: dschat reward --model_name_or_path PATH ")
    assert "\ndschat reward --model_name_or_path MODEL --data_path pairs.jsonl" in told
    assert "2 --module dschat reward ..., deepspeed --num_gpus 2 --module dschat reward ...\n" in told
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    told = python("step2_reward/main.py", "--help", cwd=ROOT).stdout
    assert "\npython step2_reward/main.py --model_name_or_path MODEL" in told
    assert "Turn --enable_tensorboard off." in told
    assert told.startswith("usage: step2_reward/main.py --model_name_or_path PATH ")


def test_a_python_without_the_packages_is_told_which_environment_has_them():
    for program in ("scripts/doctor.py", "scripts/e2e_rlhf.py", "step1_sft/main.py"):
        done = subprocess.run(
            [sys.executable, "-S", ROOT / program], capture_output=True, text=True
        )  # -S: no site-packages
        told = f"error: {sys.executable} has no torch, deepspeed, transformers, datasets, psutil, rich. Run "
        assert (done.returncode, done.stderr.startswith(told), done.stderr.count("\n")) == (1, True, 1), (
            done.stderr
        )


def test_no_help_of_the_command_names_a_file_that_a_wheel_keeps_to_itself(monkeypatch):
    monkeypatch.setattr(ReadableParser, "commands", {p.file: name for name, p in COMMANDS.items()})
    for program in COMMANDS.values():
        if program.file.endswith(".py"):
            told = as_typed(ast.get_docstring(ast.parse((ROOT / program.file).read_text())))
            assert not re.search(r"python \S+\.py|(?:torchrun|deepspeed) [^\n]*\S+\.py", told), program.file


def completed(line: str, folder: Path) -> list[str]:
    """What a shell is told that may come next, by the protocol of argcomplete."""
    told = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    answer = folder / "answer"
    env = told | {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    python(ROOT / "dschat" / "__main__.py", cwd=folder, env=env)
    return answer.read_text().split() if answer.exists() else []


@pytest.mark.slow
def test_a_shell_completes_commands_flags_and_values_and_starts_nothing(tmp_path):
    pytest.importorskip("argcomplete", reason="pip install 'dschat[completion]' brings argcomplete")
    assert completed("dschat rewar", tmp_path) == ["reward", "reward-report"]
    assert completed("dschat ppo --seed 1 --dtype ", tmp_path) == ["bf16", "fp16", "fp32"]
    (tmp_path / "pairs.jsonl").touch()
    assert completed("dschat sft --data_path pai", tmp_path) == ["pairs.jsonl"]
    for name, program in COMMANDS.items():
        (tmp_path / name).mkdir()
        flags = completed(f"dschat {name} --", tmp_path / name)
        assert program.completes == ("--help" in flags)
        assert not [flag for flag in flags if flag.replace("-", "_") in flags]  # one spelling of each
        assert [path.name for path in (tmp_path / name).iterdir()] == (["answer"] if flags else [])


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


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch, capsys):
    monkeypatch.setattr(started, "version", Mock(side_effect=PackageNotFoundError))
    with pytest.raises(SystemExit):
        main_module.chosen("--version")
    assert capsys.readouterr().out == "dschat, a checkout that is not installed\n"
