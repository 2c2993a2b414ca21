"""A model's folder on disk: whether it holds a whole model, as far as its file names tell."""

import json
from pathlib import Path

from dschat.data.files import is_local
from dschat.errors import UserError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_INDEXES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)


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
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{flag} {model_name_or_path!r} has no config.json, so it is not the folder of a saved model; "
            "give the folder that holds config.json beside the weights."
        )
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return
    indexes = [folder / name for name in WEIGHT_INDEXES if (folder / name).is_file()]
    if not indexes:
        raise UserError(
            f"{flag} {model_name_or_path!r} has no weights ({', '.join(WEIGHT_FILES)}, whole or in shards); "
            "if the step that writes them did not finish, run it again."
        )
    shards = _shards(indexes[0], flag)
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"{flag} {model_name_or_path!r} lacks {len(missing)} of the {len(shards)} weight files that "
            f"{indexes[0].name} names: {', '.join(missing)}. Copy or download them again."
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
