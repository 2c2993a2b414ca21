"""manifest.json: what a step promises about the model that it exports, and how the file is read and written.

`export.upstream` verifies the promises, and `export.golden_outputs` computes those about outputs.
"""

import dataclasses
import json
import math
import reprlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from transformers import PreTrainedTokenizerBase

from dschat.data.files import is_local
from dschat.distributed.device import DTYPES
from dschat.errors import UserError
from dschat.fingerprint import files_fingerprint

MANIFEST = "manifest.json"
"""The name of the file in a model's folder."""

FORMAT = 2
"""The version of the format; raise it when the fields of `Manifest` or their meaning change."""

READABLE = (1, FORMAT)
"""The versions that can be read; fields that an older one lacks have defaults."""

WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*")
"""The names of weight files and of their indexes."""

Head = Literal["language_model", "score", "value"]

HEADS = {
    "language_model": "a language model",
    "score": "a reward model",
    "value": "a critic, as step 3 trains",
}
"""The kinds of models in the words of messages."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The promises of one model. Fingerprints and checksums are xxh3_128, 32 hex digits."""

    step: str
    """The step that made the model: sft, reward, dpo, rlhf, or deepspeed-chat for a converted model."""
    head: Head
    tokenizer: str
    """Fingerprint of the tokenizer, independent of the version of the tokenizers library."""
    tokenizers_version: str
    """Version of the tokenizers library that wrote the tokenizer, for messages."""
    chat_template: str | None
    """Fingerprint of the chat template; None where the tokenizer has none."""
    eos_token_id: int
    pad_token_id: int
    num_tokens: int
    """Tokens of the tokenizer, over which log-probabilities are normalised."""
    dtype: str
    """Precision of the weights and of the golden outputs: fp32, bf16 or fp16."""
    score_mean: float | None
    """Mean of a reward model's scores of all answers of its evaluation data; None for other models."""
    score_std: float | None
    """Standard deviation of the same scores; None for other models."""
    files: dict[str, str]
    """Checksums of the weight files and of their index, by name."""
    golden_inputs: list[list[int]]
    """Rows of token ids on which outputs are promised, N in number."""
    golden_outputs: list[float]
    """The output [N] per row: its mean log-probability per token, or its score; see `golden_outputs`."""
    end_token_ids: list[int] | None = None
    """Every token that ends an answer, `eos_token_id` first; None in format 1."""
    verdict: str | None = None
    """The verdict of step 2 on a reward model, see `export.verdict`; None for other models."""
    data: dict[str, Any] | None = None
    """The settings that decide which prompts the model was trained on, see `export.shared_prompts`."""

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, flag: str = "") -> "Manifest | None":
        """The manifest in `folder`, None where there is none.

        Raises `UserError` for a file that is no manifest or of another version. The message begins with
        `flag`, the flag that named the folder, if it is given.
        """
        path = folder / MANIFEST
        if not is_local(path):
            return None
        by_flag = f"{flag}: " if flag else ""
        remedy = "copy the model's folder again, or delete the file to do without its promises"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = _version(values)
            if version in READABLE:
                return _checked_types(cls(**values))
        except (OSError, ValueError, RecursionError) as error:  # the last: JSON that is nested too deep
            raise UserError(f"{by_flag}{path} is no manifest of this program ({error}); {remedy}.") from error
        raise UserError(
            f"{by_flag}{path} has format {version!r} and this version of dschat reads {FORMAT}: use the "
            f"version that wrote it, or {remedy}."
        )


def _version(values: Any) -> Any:
    """Remove the format from the values of a manifest and return it.

    Raises `ValueError` where the values cannot be those of a manifest.
    """
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError('it is no JSON object with a "format"')
    version = values.pop("format")
    if version in READABLE:
        fields = dataclasses.fields(Manifest)
        names = {f.name for f in fields}
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        for problem, found in (("lacks", needed - values.keys()), ("has an unknown", values.keys() - names)):
            if found:
                raise ValueError(f"it {problem} {', '.join(sorted(found))}")
    return version


def _is_count(value: Any, below: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_number(value: Any) -> bool:
    """Whether `value` is a number that a tensor can hold. NaN is one, and no output is near it."""
    return isinstance(value, float) or (_is_count(abs(value), 2**63) if isinstance(value, int) else False)


def _are_tokens(ids: Any, num_tokens: int) -> bool:
    return isinstance(ids, list) and bool(ids) and all(_is_count(token, num_tokens) for token in ids)


def _are_golden_inputs(rows: Any, num_tokens: int) -> bool:
    if not isinstance(rows, list):
        return False
    return all(_are_tokens(row, num_tokens) for row in rows)


def _checked_types(manifest: Manifest) -> Manifest:
    """`manifest`, unchanged. Raises `ValueError` for a field with which later checks could not work."""
    texts = ("step", "head", "tokenizer", "tokenizers_version", "dtype")
    for name in texts:
        _check_holds(manifest, name, isinstance(getattr(manifest, name), str))
    for name in ("num_tokens", "eos_token_id", "pad_token_id"):
        _check_holds(manifest, name, _is_count(getattr(manifest, name)))
    for name in ("score_mean", "score_std"):
        value = getattr(manifest, name)
        _check_holds(manifest, name, value is None or (_is_number(value) and math.isfinite(value)))
    verdict = manifest.verdict
    _check_holds(manifest, "verdict", verdict is None or isinstance(verdict, str))
    data = manifest.data
    names = data.get("data_path") if isinstance(data, dict) else None
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _check_holds(manifest, "data", data is None or are_names)
    ends = manifest.end_token_ids
    _check_holds(manifest, "end_token_ids", ends is None or _are_tokens(ends, manifest.num_tokens))
    files, outputs = manifest.files, manifest.golden_outputs
    _check_holds(manifest, "head", manifest.head in HEADS)
    _check_holds(manifest, "dtype", manifest.dtype in DTYPES)
    _check_holds(manifest, "files", isinstance(files, dict) and len(files) > 0)
    _check_holds(manifest, "golden_inputs", _are_golden_inputs(manifest.golden_inputs, manifest.num_tokens))
    are_numbers = isinstance(outputs, list) and all(map(_is_number, outputs))
    _check_holds(manifest, "golden_outputs", are_numbers and len(outputs) == len(manifest.golden_inputs))
    return manifest


def _check_holds(manifest: Manifest, name: str, is_good: bool) -> None:
    if not is_good:
        raise ValueError(f"{name} does not hold what it should, but {reprlib.repr(getattr(manifest, name))}")


def weight_checksums(folder: Path) -> dict[str, str]:
    """The checksums of all weight files and indexes in `folder`, by name."""
    paths = sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda path: files_fingerprint([path]), paths)
    return {path.name: checksum for path, checksum in zip(paths, sums, strict=True)}


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The fingerprint of the chat template, 32 hex digits; None where the tokenizer has none."""
    template = tokenizer.chat_template
    return None if template is None else xxhash.xxh3_128_hexdigest(str(template).encode())


def changed_files(manifest: Manifest, folder: Path) -> str:
    """The first difference between the weight files in `folder` and the promised ones, in words; often ""."""
    found = weight_checksums(folder)
    for name, checksum in manifest.files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != checksum:
            return (
                f"{name} is not the file that step {manifest.step!r} wrote: it is corrupted or was replaced"
            )
    added = sorted(set(found) - set(manifest.files))
    return f"{added[0]} was added, so other weights may be loaded" if added else ""
