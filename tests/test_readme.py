"""The commands of README and docs: their flags exist, and those that need no hub run in an empty folder."""

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from processes import environment, python

from dschat.__main__ import COMMANDS as PROGRAMS
from dschat.arguments import TrainRmCall, flags_of, parse_arguments
from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError
from dschat.runs.output_folder import check_free
from scripts import compare, convert_checkpoint, e2e_rlhf, merge_adapter, report, reward_report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("steps", "reports", "dpo", "lora", "coming_from")),
]
"""The pages with commands that are run, in the order in which one reads what another wrote."""
STEPS = {
    "step1_sft/main.py": "sft",
    "step2_reward/main.py": "reward",
    "step2_reward/dpo.py": "dpo",
    "step3_ppo/main.py": "rlhf",
    "scripts/inspect_data.py": "inspect",
}


def commands() -> list[list[str]]:
    """Every command of the pages' bash blocks, in words."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


COMMANDS = commands()


def flags_after(program: str) -> list[list[str]]:
    return [command[command.index(program) + 1 :] for command in COMMANDS if program in command]


def test_a_mistyped_flag_would_be_found():
    flags = flags_after("step3_ppo/main.py")[0]
    with pytest.raises(UserError, match="unknown flag --kl_coeff"):
        parse_arguments("rlhf", [*flags, "--kl_coeff", "1"])


def test_the_flags_of_the_scripts_exist():
    for flags in flags_after("scripts/compare.py"):
        compare.parse(flags)
    sources = [
        convert_checkpoint.parse(flags).source for flags in flags_after("scripts/convert_checkpoint.py")
    ]
    assert {*sources, "trl-valuehead"} == set(convert_checkpoint.FORMATS)  # no command here writes one of TRL
    calls = flags_after("scripts/e2e_rlhf.py")
    assert calls
    for flags in calls:
        e2e_rlhf.check(args := e2e_rlhf.parse(flags), e2e_rlhf.commands(args))


def test_every_program_named_in_a_command_exists():
    programs = {word for command in COMMANDS for word in command if re.fullmatch(r"[\w/]+\.(sh|py)", word)}
    assert "scripts/quickstart.sh" in programs
    assert [program for program in sorted(programs) if not (ROOT / program).is_file()] == []


def test_a_step_reads_what_an_earlier_command_wrote():
    written = {"output/hand/base_model", "output/hand/data"}  # by scripts/demo_task.py output/hand
    for command in COMMANDS:
        words = dict(itertools.pairwise(command))
        inputs = [value for flag, value in words.items() if flag.endswith("model_name_or_path")]
        assert set(inputs) <= written
        if "--output_dir" in words:
            written.add(words["--output_dir"])


def test_ci_runs_the_command_that_the_readme_gives():
    assert ["bash", "scripts/test.sh"] in COMMANDS
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_flag_that_the_text_names_exists(capsys):
    for step in STEPS.values():
        with pytest.raises(SystemExit):
            parse_arguments(step, ["--help"])
    for program in (compare, convert_checkpoint, e2e_rlhf, merge_adapter, report, reward_report):
        with pytest.raises(SystemExit):
            program.parse(["--help"])
    flag = r"--[a-z]\w+(?:-\w+)*"
    known = set(re.findall(flag, capsys.readouterr().out))
    launchers = {"--num_gpus", "--nproc_per_node", "--module", "--hostfile"}
    named: set[str] = set()
    for page in (*PAGES, ROOT / "docs" / "ppo_settings.md"):
        text = page.read_text(encoding="utf-8").partition("## Tests")[0]
        fences = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
        named |= set(re.findall(flag, fences.sub(lambda block: block[2] if block[1] else "", text)))
    assert named - launchers <= known
    assert len(named & known) > 80


COMMAND = re.compile(
    r"(?:\S+=\S+ )*(?:.* \| )?(?:python|torchrun|deepspeed|dschat|bash|sbatch) .*", re.DOTALL
)
"""A command line, after variables or a pipe."""


def shown_commands(page: Path) -> list[list[str]]:
    """Every command that a page shows: in bash blocks, indented, or in a line of text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE))]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [shlex.split(line, comments=True) for line in lines if COMMAND.fullmatch(line)]


def program_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """The program that a command starts, and the words behind it; "" for what is none of ours."""
    for place, word in enumerate(words):
        if word == "dschat" and words[place + 1 : place + 2]:
            name = words[place + 1]
            return PROGRAMS[name].file if re.match(r"[a-z]", name) else "", words[place + 2 :]
        if word.endswith(".py") and word != "scripts/launch.py":
            return word, words[place + 1 :]
    return "", []


def flag_names(words: list[str]) -> set[str]:
    return {match[0].replace("-", "_") for word in words if (match := re.match(r"--\w[\w-]*(?!.* )", word))}


def help_of(file: str, monkeypatch, capsys) -> str:
    parsers = {path: partial(parse_arguments, step) for path, step in STEPS.items()}
    parsers["step2_reward/train_rm.py"] = TrainRmCall.parse
    parse = parsers.get(file) or importlib.import_module(file.removesuffix(".py").replace("/", ".")).parse
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with pytest.raises(SystemExit):
        parse()
    return capsys.readouterr().out


def test_every_command_of_every_page_names_a_program_and_its_flags(monkeypatch, capsys):
    by_name = {path.name: str(path.relative_to(ROOT)) for path in ROOT.glob("s*/*.py")}
    shown: dict[str, set[str]] = {}
    parsed: set[str] = set()
    for page in [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for words in shown_commands(page):
            program, values = program_and_flags(words)
            program, flags = by_name.get(program, program), flag_names(values)
            assert (ROOT / program).exists(), f"{page.name}: {shlex.join(words)}"
            if program in STEPS and "..." not in values and any("model_name" in word for word in values):
                parse_arguments(STEPS[program], values)
                parsed.add(program)
            if flags:
                shown.setdefault(program, set()).update(flags)
    assert {"scripts/chat.py", "scripts/compare.py", "step1_sft/main.py"} <= shown.keys()
    assert parsed == STEPS.keys()
    for program in (
        "scripts/plan.py",
        "scripts/forecast.py",
    ):  # which take the flags of steps besides their own
        shown[program] -= {f"__{name}" for step in STEPS.values() for name in flags_of(step)}
    for program, flags in shown.items():
        known = {
            name.replace("-", "_")
            for name in re.findall(r"--\w[\w-]*", help_of(program, monkeypatch, capsys))
        }
        assert flags - known == set(), program


def test_the_errors_in_the_readme_are_what_the_programs_print(tmp_path, monkeypatch):
    """The three are caused here as a user would, and compared word by word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d", "chosen": "e"}\n'
    )
    finished = tmp_path / "output" / "sft"
    finished.mkdir(parents=True)
    (finished / "arguments.json").write_text('{"run": {}, "data": {}}')
    (finished / "summary.json").write_text("{}")
    at = datetime(2026, 11, 27, 3, 52).timestamp()
    os.utime(finished / "summary.json", (at, at))
    sft = ["--model_name_or_path", "m", "--output_dir", "output/sft"]
    causes = (
        lambda: parse_arguments("sft", ["--lr", "1e-5"]),
        lambda: list(
            read_comparisons(
                open_source("pairs.jsonl"), open_source("pairs.jsonl").training, Format(), Findings()
            )
        ),
        lambda: check_free(parse_arguments("sft", sft).run),
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.search(r"What a mistake looks like:\n\n```\n(.*?)```", readme, re.DOTALL)[1].splitlines()
    for cause, line in zip(causes, quoted, strict=True):
        with pytest.raises(UserError) as error:
            cause()
        assert f"error: {error.value}" == line


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", lines, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


WRITTEN = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/results/*.md")]
)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("https:", "http:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_the_readme_is_read_in_some_minutes():
    assert len((ROOT / "README.md").read_bytes()) < 8000


# Added to a command, so that the test shows that it works and not how well it learns.
SHORTER = {
    "step1_sft": ["--num_train_epochs", "1", "--max_train_samples", "320"],
    "sft_again": ["--num_train_epochs", "1", "--max_train_samples", "320"],
    "step2_reward": ["--num_train_epochs", "1", "--max_train_samples", "320"],
    "step3_ppo": ["--enable_test_mode", "--test_stop_step", "3"],
    "sft2": ["--max_train_samples", "96"],
    "sft3": ["--max_train_samples", "96"],
    "compare.py": ["--num-prompts", "20"],
}
SETTING_UP = ("setup.sh", "test.sh", "quickstart.sh", "activate")
"""They make an environment, and this test runs in one."""


def runnable() -> list[list[str]]:
    needs_hub = {"facebook/opt-1.3b"}
    return [
        command
        for command in COMMANDS
        if not needs_hub & set(command) and not any(word.endswith(SETTING_UP) for word in command)
    ]


@pytest.mark.slow
def test_the_commands_run_from_top_to_bottom_in_an_empty_folder(tmp_path):
    for name in ("scripts", "step1_sft", "step2_reward", "step3_ppo"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = Path(sys.executable).parent
    variables = environment(
        PATH=f"{programs}:{environment()['PATH']}", PYTHON=sys.executable, OUTPUT=str(tmp_path / "demo")
    )
    commands = runnable()
    assert len(commands) > 8
    for command in commands:
        shorter = [
            flag for name, flags in SHORTER.items() if any(name in word for word in command) for flag in flags
        ]
        words = [*command, *shorter]
        if command[0] == "python":  # forked, as imports are most of its time
            python(tmp_path / words[1], *words[2:], cwd=tmp_path, env=variables)
            continue
        result = subprocess.run(
            words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
        said = f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        assert result.returncode == 0, said
