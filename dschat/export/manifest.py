"""What a step promises about the model it hands on: manifest.json beside the weights, and the proof of it.

A step calls `verify_model` before it loads anything and `UpstreamModel.check_outputs` before it trains.
"""

import dataclasses
import json
import math
import reprlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from dschat.data.files import is_local
from dschat.errors import UserError
from dschat.fingerprint import files_fingerprint

MANIFEST = "manifest.json"


FORMAT = 2
"""Raise it when the fields of `Manifest` or their meaning change."""


READABLE = (1, FORMAT)
"""An older format lacks fields, which have defaults."""


WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*")


Head = Literal["language_model", "score", "value"]


HEADS = {
    "language_model": "a language model",
    "score": "a reward model",
    "value": "a critic, as step 3 trains",
}


PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


NATS = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.1}
"""How far a golden log-probability (nats a token) may be from the promised one.

Another device, kernel, batch shape or ZeRO stage rounds differently. Measured on Llamas of 8 and 24 layers
with random weights against fp32: up to 0.004 in fp16 and 0.025 in bf16; in fp32, between batch shapes, 1e-6.
A random output layer is nats away.
"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The promises. Fingerprints and checksums are xxh3_128, 32 hex digits."""

    step: str
    """What made the model: sft, reward, dpo, rlhf, or deepspeed-chat for a converted one."""
    head: Head
    tokenizer: str
    tokenizers_version: str
    """Of the library that wrote the tokenizer, for the message where its fingerprint differs."""
    chat_template: str | None
    eos_token_id: int
    pad_token_id: int
    num_tokens: int
    """Entries of the vocabulary, over which log-probabilities are taken."""
    dtype: str
    """Precision of the weights, in which golden outputs were computed: fp32, bf16 or fp16."""
    score_mean: float | None
    score_std: float | None
    """Of a reward model's scores of all answers of its evaluation data; None where there are none."""
    files: dict[str, str]
    """Checksums of the weight files (and of their index) by name."""
    golden_inputs: list[list[int]]
    """Rows of token ids,"""
    golden_outputs: list[float]
    """and for each the mean log-probability of a token after the first, or the score at the last one."""
    end_token_ids: list[int] | None = None
    """All that end an answer, `eos_token_id` first; None in format 1."""
    verdict: str | None = None
    """On a reward model, as dschat/export/verdict.py words it; None where step 2 made none."""
    data: dict[str, Any] | None = None
    """What decides which prompts it was trained on (`shared_prompts.py`); None where not known."""

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, flag: str = "") -> "Manifest | None":
        """The folder's manifest, None where it has none. Raises `UserError` for one it cannot use.

        `flag` says who named the folder, where someone did.
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
    """Take the format out of a manifest's values. Raises `ValueError` where they cannot be a manifest's."""
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError('it is no JSON object with a "format"')
    version = values.pop("format")
    if version in READABLE:
        fields = dataclasses.fields(Manifest)
        names, needed = (
            {f.name for f in fields},
            {f.name for f in fields if f.default is dataclasses.MISSING},
        )
        for problem, found in (("lacks", needed - values.keys()), ("has an unknown", values.keys() - names)):
            if found:
                raise ValueError(f"it {problem} {', '.join(sorted(found))}")
    return version


def _is_count(value: Any, below: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_number(value: Any) -> bool:
    """Whether it is a number that a tensor can hold; NaN is one, and no output is near it."""
    return isinstance(value, float) or (_is_count(abs(value), 2**63) if isinstance(value, int) else False)


def _are_tokens(ids: Any, num_tokens: int) -> bool:
    return isinstance(ids, list) and bool(ids) and all(_is_count(token, num_tokens) for token in ids)


def _are_golden_inputs(rows: Any, num_tokens: int) -> bool:
    if not isinstance(rows, list):
        return False
    return all(_are_tokens(row, num_tokens) for row in rows)


def _checked_types(manifest: Manifest) -> Manifest:
    """The manifest itself. Raises `ValueError` for what later checks could not work with."""
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
    _check_holds(manifest, "dtype", manifest.dtype in NATS)
    _check_holds(manifest, "files", isinstance(files, dict) and len(files) > 0)
    _check_holds(manifest, "golden_inputs", _are_golden_inputs(manifest.golden_inputs, manifest.num_tokens))
    are_numbers = isinstance(outputs, list) and all(map(_is_number, outputs))
    _check_holds(manifest, "golden_outputs", are_numbers and len(outputs) == len(manifest.golden_inputs))
    return manifest


def _check_holds(manifest: Manifest, name: str, is_good: bool) -> None:
    if not is_good:
        raise ValueError(f"{name} does not hold what it should, but {reprlib.repr(getattr(manifest, name))}")


def weight_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every weight file (and index of shards) in the folder, by name."""
    paths = sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda path: files_fingerprint([path]), paths)
    return {path.name: checksum for path, checksum in zip(paths, sums, strict=True)}


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """32 hex digits of the chat template, None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else xxhash.xxh3_128_hexdigest(str(template).encode())


def changed_files(manifest: Manifest, folder: Path) -> str:
    """What sets the weight files apart from those promised, as the beginning of a sentence; often nothing."""
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
