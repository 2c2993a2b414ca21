"""Whether a finished step is what a command would make: its flags, and the age of its data and models."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dschat.arguments import STARTING, StepArguments, saved_settings
from dschat.data.entries import parse_entry
from dschat.data.files import user_path
from dschat.runs.output_folder import ARGUMENTS, SUMMARY

WITHOUT_EFFECT = (
    *STARTING,
    *("output_dir", "debug", "data_output_path", "preprocessing_num_workers", "trust_remote_code"),
    *("enable_tensorboard", "tensorboard_path", "print_loss", "print_answers", "print_answers_interval"),
    *("save_interval", "save_minutes", "save_total_limit", "deepspeed", "compute_fp32_loss"),
    *("num_padding_at_beginning", "auto_micro_batch", "forecast", "force"),
)
"""Flags that change nothing of what a step makes."""

DATA_FLAGS = ("data_path", "eval_data_path", "sft_only_data_path")
MODEL_FILES = ("config.json", "*.safetensors", "*.bin")


def differences(arguments: StepArguments, folder: Path) -> list[str]:
    """What sets the finished step in `folder` apart from one that `arguments` would make, in words."""
    try:
        saved = json.loads((folder / ARGUMENTS).read_text(encoding="utf-8"))
        before = saved_settings(type(arguments), saved)
    except (OSError, ValueError, AttributeError) as error:
        return [f"what it was made with is not known ({error})"]
    finished = (folder / SUMMARY).stat().st_mtime
    return [*_other_flags(arguments, before), *_later_inputs(arguments, finished)]


def _other_flags(arguments: StepArguments, before: dict[str, Any]) -> Iterator[str]:
    divides = before.get("auto_micro_batch")  # which finds other numbers than were given
    for name, setting in arguments.description.settings.items():
        if name in WITHOUT_EFFECT or (divides and setting.at_resume == "divided"):
            continue
        value = json.loads(json.dumps(setting.value))
        if before[name] != value:
            yield f"--{name} was {_shown(before[name])} and is {_shown(value)}"


def _later_inputs(arguments: StepArguments, finished: float) -> Iterator[str]:
    """Data and models on this machine that were written after the step had finished."""
    for name, setting in arguments.description.settings.items():
        places: list[Path] = []
        if name in DATA_FLAGS:
            places = [path for entry in setting.value for path in _local_files(entry)]
        elif name.endswith("model_name_or_path") and setting.value:
            places = [path for kind in MODEL_FILES for path in user_path(setting.value).glob(kind)]
        later = [path for path in places if path.stat().st_mtime > finished]
        if later:
            yield f"{later[0]} (--{name}) was written after it"


def _local_files(entry: str) -> list[Path]:
    """The files of an entry of --data_path; none of one that is on the hub."""
    place = user_path(parse_entry(entry).name)
    paths = [place] if place.exists() else map(Path, glob.glob(str(place), recursive=True))  # noqa: PTH207
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return [file for file in files if file.is_file()]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
