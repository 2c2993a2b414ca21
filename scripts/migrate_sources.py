"""Launch scripts, YAML files and Python programs of other projects, read for what they set."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dschat.errors import UserError

WORD = re.compile(r"""(?:\$\([^)]*\)|"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+""")
"""A word of a shell's command line; quotes and variables stay as they are."""
FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
PROJECTS = {
    "DeepSpeed-Chat": re.compile(
        r"step[123]_\w+|data_split|num_padding_at_beginning|actor_model_name_or_path"
    ),
    "LLaMA-Factory": re.compile(r"llamafactory-cli|finetuning_type|cutoff_len"),
    "ms-swift": re.compile(r"\bswift (?:sft|rlhf|pt)\b|rlhf_type|train_type|tuner_type"),
    "ColossalChat": re.compile(r"colossalai run|--pretrain\b|--plugin\b|train_(?:rm|ppo|sft|dpo)\.py"),
    "TRL": re.compile(r"\btrl\b|--dataset_name|SFTConfig|DPOConfig|RewardConfig|PPOConfig"),
}
"""What tells a project, in the order in which it is looked for."""
STEPS = {
    "rlhf": re.compile(r"step3|actor_model_name_or_path|\bppo\b|rlhf_type ppo|stage: ppo|PPO|train_ppo"),
    "dpo": re.compile(r"\bdpo\b|step2_dpo|DPO|train_dpo"),
    "reward": re.compile(
        r"step2|\brm\b|\breward(?:_modeling)?\b|Reward(?:Config|Trainer)|train_rm|num_padding"
    ),
    "sft": re.compile(r"step1|\bsft\b|SFT|train_sft|\bpt\b|sft_only_data_path"),
}
"""What tells a step, in the order in which it is looked for."""
PROGRAM = re.compile(
    r"^(?:.*/)?(?:main|sft|dpo|ppo\w*|reward_modeling|train_\w+|run_\w+)\.py$|^(?:trl|swift|llamafactory-cli)$"
)
"""The word of a command line that starts the training program of another project."""
CONFIGS = re.compile(
    r"(?:SFT|DPO|Reward|PPO|Lora|Model|BitsAndBytes)Config|TrainingArguments|ScriptArguments"
)


@dataclass
class Source:
    """What a file sets, as text; `project` and `step` are told by its words."""

    project: str
    step: str | None
    settings: dict[str, str] = field(default_factory=dict)
    """Values by the name of their flag, as a shell would have them; "" for a flag without a value."""
    launcher: list[str] = field(default_factory=list)
    """The words before the program: variables, and the launcher with its flags."""
    before: str = ""
    """The lines of a script before its command."""
    after: str = ""
    """The end of the command, such as where its output goes, and the lines after it."""


def read(path: Path) -> Source:
    """Read a file by its suffix. Raises `UserError` where it starts no training that is known."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if path.suffix in (".yaml", ".yml", ".json"):
        source = _of_mapping(path, text)
    elif path.suffix == ".py":
        source = _of_python(path, text)
    else:
        source = of_shell(text, path)
    told = f"{path.parent} {path.name} {text}"
    source.project = source.project or _first(PROJECTS, told) or "transformers"
    source.step = source.step or _first(STEPS, f"{path.name} {text}") or _first(STEPS, told)
    return source


def _first(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(text)), None)


def of_shell(text: str, path: Path) -> Source:
    """A script, or one command line. Raises `UserError` where no command starts a program that is known."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        first = number
        command = lines[number]
        while command.rstrip().endswith("\\") and number + 1 < len(lines):
            number += 1
            command = f"{command.rstrip()[:-1]} {lines[number]}"
        number += 1
        words = [] if command.lstrip().startswith("#") else WORD.findall(command)
        place = next((i for i, word in enumerate(words) if PROGRAM.match(word)), None)
        if place is not None:
            return _of_command(words, place, path, "\n".join(lines[:first]), "\n".join(lines[number:]))
    raise UserError(
        f"{path} has no command that starts a training program of DeepSpeed-Chat, TRL, ColossalChat, "
        "LLaMA-Factory or ms-swift; give the file that has it."
    )


def _of_command(words: list[str], place: int, path: Path, before: str, after: str) -> Source:
    end = next((i for i, word in enumerate(words) if re.match(r"(&>|\d?>|\||&$|;)", word)), len(words))
    launcher, program, rest = words[:place], words[place], words[place + 1 : end]
    name = Path(program).name
    project = {"trl": "TRL", "swift": "ms-swift", "llamafactory-cli": "LLaMA-Factory"}.get(name, "")
    step = None
    if project and rest and not rest[0].startswith("-"):
        step, rest = {"sft": "sft", "dpo": "dpo", "reward": "reward", "rm": "reward"}.get(rest[0]), rest[1:]
    if project == "LLaMA-Factory" and rest and not rest[0].startswith("-"):
        file = path.parent / rest[0]
        if not file.is_file():
            raise UserError(f"{path} trains with {rest[0]}; give that file.")
        return read(file)
    settings = _flags(rest)
    kind = settings.get("rlhf_type", settings.get("stage", ""))
    step = {"ppo": "rlhf", "dpo": "dpo", "rm": "reward", "sft": "sft"}.get(kind, step)
    step = step or _first(STEPS, f"{program} {' '.join(settings)}")
    tail = " ".join(words[end:])
    return Source(project, step, settings, launcher, before, f"{tail}\n{after}".rstrip() if tail else after)


def _flags(words: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        match = FLAG.fullmatch(word)
        if match and not re.fullmatch(r"-\d.*", word):
            current = found.setdefault(match[1].replace("-", "_"), [])
            current[:] = [match[2]] if match[2] is not None else []
        else:
            current.append(word)
    return {name: " ".join(values) for name, values in found.items()}


def _of_mapping(path: Path, text: str) -> Source:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of flags to values.")
    stage = str(values.get("stage", values.get("rlhf_type", "")))
    step = {"ppo": "rlhf", "dpo": "dpo", "rm": "reward", "sft": "sft"}.get(stage)
    settings = {str(name): as_text(value) for name, value in values.items() if value is not None}
    return Source("LLaMA-Factory" if "stage" in values else "", step, settings)


def as_text(value: Any) -> str:
    """A value as a shell's words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | set):
        return " ".join(map(as_text, value))
    return shlex.quote(str(value))


def _of_python(path: Path, text: str) -> Source:
    """The keyword arguments of configurations and trainers, and the names of models and data sets."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: it is no Python ({error.msg}).") from error
    settings: dict[str, str] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        first = call.args[0] if call.args else None
        if CONFIGS.fullmatch(name.rpartition(".")[2]):
            settings |= {word.arg: _value(word.value) for word in call.keywords if word.arg}
        elif name.endswith("load_dataset") and first is not None:
            split = next(
                (f":split={_value(word.value)}" for word in call.keywords if word.arg == "split"), ""
            )
            settings.setdefault("dataset_name", _value(first) + split)
        elif name.endswith("Trainer"):
            models = {word.arg: word.value for word in call.keywords if word.arg in ("model", "reward_model")}
            literal = {arg: value for arg, value in models.items() if isinstance(value, ast.Constant)}
            settings |= {str(arg): _value(value) for arg, value in literal.items()}
        elif name.endswith("SequenceClassification.from_pretrained") and first is not None:
            settings.setdefault("reward_model_path" if "PPO" in text else "model_name_or_path", _value(first))
        elif name.endswith("CausalLM.from_pretrained") and first is not None:
            settings.setdefault("model_name_or_path", _value(first))
    if not settings:
        raise UserError(f"{path} makes no configuration of TRL that can be read, such as PPOConfig(...).")
    return Source("TRL", _first(STEPS, " ".join(re.findall(r"\w+(?:Config|Trainer)\b", text))), settings)


def _value(node: ast.expr) -> str:
    """A literal as a shell's words; any other expression between angle brackets."""
    try:
        return as_text(ast.literal_eval(node))
    except ValueError:
        return f"<{ast.unparse(node)}>"
