"""The file behind --lora_config: a PEFT LoraConfig as JSON, and what of it this project supports."""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dschat.arguments import ModelArguments
from dschat.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_list_of(kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(kind, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _names_modules(value: Any) -> bool:
    return value is None or _is_name(value) or _is_list_of(_is_name, value)


SUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda v: _is_count(v) and v >= 1, "a whole number of at least 1"),
    "lora_alpha": (lambda v: _is_number(v) and v > 0, "a positive number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "target_modules": (_names_modules, "a list of names, a regular expression, 'all-linear' or null"),
    "exclude_modules": (_names_modules, "a list of names, a regular expression or null"),
    "layers_to_transform": (
        lambda v: v is None or _is_count(v) or _is_list_of(_is_count, v),
        "a layer's number, a list of them or null",
    ),
    "layers_pattern": (_names_modules, "a name, a list of names or null"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    # Other ways to begin change what the model computes before the first update.
    "init_lora_weights": (lambda v: v is True or v == "gaussian", "true or 'gaussian'"),
    "peft_type": (lambda v: v in (None, "LORA"), "'LORA': no other adapters are supported"),
    # A reward model's head is always trained and saved; no other layer is trained as a copy.
    "modules_to_save": (
        lambda v: v in (None, [], ["score"]),
        "left out, or ['score'], a reward model's head",
    ),
}

DECIDED_HERE = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("fan_in_fan_out", "peft_type", "modules_to_save"),
}
"""Keys that say where an adapter came from, or that follow from the model: read and not used."""


def read_lora_file(args: ModelArguments) -> "LoraConfig":
    """PEFT's configuration of the file `args.lora_config`, which must be given.

    Keys that the file leaves out have PEFT's defaults, but for target_modules, which is all layers.

    Raises `UserError` for a file that is not JSON, and for a key that is unknown, unsupported or has a value
    that cannot work. Keys that PEFT writes into every file pass where they ask for nothing.
    """
    from peft import LoraConfig

    assert args.lora_config is not None
    where = f"--{args.prefix}lora_config {args.lora_config}"
    values = _read_object(Path(args.lora_config), where)
    known = {f.name: f for f in dataclasses.fields(LoraConfig)}
    for key, value in values.items():
        _check_key(key, value, known, where)
    # Only step 3 gives its models a prefix.
    if args.prefix and values.get("lora_dropout"):
        raise UserError(
            f"{where}: lora_dropout must be 0: PPO compares the probabilities of one set of weights."
        )
    kept = {key: value for key, value in values.items() if key in SUPPORTED and key not in DECIDED_HERE}
    if kept.get("target_modules") is None:
        kept["target_modules"] = "all-linear"
    try:
        return LoraConfig(**kept)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); give a JSON file.") from error
    except (ValueError, RecursionError) as error:  # the second: nested too deep
        raise UserError(f"{where} is not JSON that can be read: {error}.") from error
    if not isinstance(values, dict):
        example = json.dumps({"r": 16, "lora_alpha": 16})
        raise UserError(f"{where} holds no JSON object; it must look like {example}.")
    return values


def _check_key(key: str, value: Any, known: dict[str, dataclasses.Field], where: str) -> None:
    """Raise `UserError` unless this key may have this value."""
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"{where}: {key!r} is no key of a LoRA configuration{hint}")
    if key in SUPPORTED:
        fits, expected = SUPPORTED[key]
        if not fits(value):
            raise UserError(f"{where}: {key} must be {expected}, got {value!r}.")
    elif key not in DECIDED_HERE and value not in (None, False, [], {}) and value != known[key].default:
        supported = ", ".join(sorted(SUPPORTED.keys() - DECIDED_HERE))
        raise UserError(f"{where}: {key} {value!r} is not supported; take it out. Supported are {supported}.")
