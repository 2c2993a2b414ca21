"""A model's folder on disk: whether it holds a whole model, as far as its file names tell."""

import json
from pathlib import Path

from dschat.data.files import is_local
from dschat.errors import UserError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_INDEXES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)

OTHER_FORMATS = {
    "*.gguf": "GGUF files, which llama.cpp runs",
    "*.onnx": "ONNX files, which only run a model",
    "onnx/*.onnx": "ONNX files, which only run a model",
    "tf_model*.h5": "TensorFlow's weights",
    "flax_model*.msgpack": "Flax's weights",
    "consolidated*.*": "weights in the form of the model's makers (consolidated)",
    "*.distcp": "a distributed checkpoint of torch (.distcp)",
    "global_step*": "a checkpoint of DeepSpeed (global_step)",
}
"""Files by which a folder is known to hold a model in a form that is not read."""

SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")

ADAPTER_CONFIG = "adapter_config.json"

POINTER = b"version https://git-lfs"
"""How a file begins that stands for another, which git-lfs has not fetched."""


def check_model_path(model_name_or_path: str, flag: str) -> None:
    """Raise `UserError` if a local folder holds no complete model; the message names `flag`.

    Reads file names and a shard index only. What does not look like a path is left to the hub.
    """
    folder = Path(model_name_or_path)
    if not is_local(folder):
        if _is_path(model_name_or_path):
            raise UserError(
                f"{flag} {model_name_or_path!r}: there is no such folder, seen from {Path.cwd()}; "
                "give a model's folder or hub id."
            )
        return
    if folder.is_file():
        raise UserError(f"{flag} {model_name_or_path!r} is a file; give the folder of a saved model.")
    whole = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    indexes = [folder / name for name in WEIGHT_INDEXES if (folder / name).is_file()]
    has_config = (folder / "config.json").is_file()
    if not (has_config and (whole or indexes)):
        _check_is_no_adapter(folder, flag)
        lacking = f"no weights ({', '.join(WEIGHT_FILES)}, whole or in shards)"
        lacking = lacking if has_config else "no config.json, so it is not the folder of a saved model"
        problem = f"{flag} {model_name_or_path!r} has {lacking}"
        raise UserError(f"{problem}; {_what_is_there(folder, has_config=has_config)}")
    if whole:
        _check_fetched(whole, flag)
        return
    shards = _shards(indexes[0], flag)
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"{flag} {model_name_or_path!r} lacks {len(missing)} of the {len(shards)} weight files that "
            f"{indexes[0].name} names: {', '.join(missing)}. Copy or download them again."
        )
    _check_fetched([folder / name for name in sorted(shards)], flag)


def _check_is_no_adapter(folder: Path, flag: str) -> None:
    """Raise `UserError` for an adapter without the model that it changes."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    above = folder.resolve().parent
    if folder.resolve().name == "adapter" and (above / "config.json").is_file():
        raise UserError(
            f"{flag} {folder} is an adapter; {above} holds the model with it merged in: give that."
        )
    raise UserError(
        f"{flag} {folder} is an adapter and no whole model. Merge it into the model that it was trained on, "
        f"and give the result: dschat merge-adapter {folder} OUTPUT"
    )


def _what_is_there(folder: Path, *, has_config: bool) -> str:
    """What a folder that is no whole model holds instead, and what to do."""
    for pattern, kind in OTHER_FORMATS.items():
        if next(folder.glob(pattern), None) is not None:
            return (
                f"it holds {kind}. Give the model as transformers saves it: config.json and "
                "model.safetensors, in full precision."
            )
    if any(next(folder.glob(pattern), None) for pattern in SHARDS):
        return "it holds shards without their index (*.index.json); copy or download that too."
    if has_config:
        return "if the step that writes them did not finish, run it again."
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        return f"give the folder inside that has one: {', '.join(inside[:5])}."
    return "give the folder that holds config.json beside the weights."


def _check_fetched(files: list[Path], flag: str) -> None:
    for path in files:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{flag}: {path} is a pointer of git-lfs, not the weights; fetch them with git lfs pull."
                )


def _shards(index: Path, flag: str) -> set[str]:
    """The names of the weight files in a shard index."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {str(Path(name)) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{flag}: {index} is no index of weight files ({type(error).__name__}: {error}); "
            "copy or download it again."
        ) from error


def _is_path(model_name_or_path: str) -> bool:
    """Whether it cannot be meant as a hub id, which is "name" or "owner/name"."""
    first, *rest = Path(model_name_or_path).parts
    is_below_a_folder_here = bool(rest) and Path(first).is_dir()
    return model_name_or_path.startswith((".", "/", "~")) or len(rest) > 1 or is_below_a_folder_here
