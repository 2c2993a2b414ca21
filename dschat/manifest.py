"""What a step promises about the model it hands on: manifest.json beside the weights, and the proof of it.

A step calls `receive_model` before it loads anything and `Handover.check_outputs` before it trains.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dschat.data.cache import files_fingerprint, fingerprint
from dschat.data.files import is_local
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.distributed import current_device, is_main_process, max_across_ranks, print_once
from dschat.errors import UserError
from dschat.losses import masked_mean, token_logprobs
from dschat.models.end_tokens import written_ids
from dschat.models.factory import check_backbone, check_language_model, check_reward_model
from dschat.models.quantization import is_packed
from dschat.models.reward_model import RewardModel
from dschat.models.tokenizer import load_tokenizer
from dschat.verdict import is_good

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
STANDARD_DEVIATIONS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}
"""The same for a score, in standard deviations; measured likewise: 1e-6, 0.05, 0.34.

Scores of two random heads are about the root of 2 of them apart. Half of one is wide, but the farthest of 8
rows decides, and all 8 are that near by chance once in some 30,000 heads.
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
    """On a reward model, as dschat/verdict.py words it; None where step 2 made none."""
    data: dict[str, Any] | None = None
    """What decides which prompts it was trained on (dschat/shared_prompts.py); None where not known."""

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


def head_of(model: Any) -> Head:
    """The kind of an engine's or a module's head, as far as the model tells: a critic looks like "score"."""
    return "score" if isinstance(getattr(model, "module", model), RewardModel) else "language_model"


@torch.no_grad()
def golden_outputs(
    model: Any, rows: Sequence[Sequence[int]], *, num_tokens: int, device: torch.device | str
) -> Tensor:
    """Mean log-probability of a token after the first, or the score at the last one: [N] fp64, on the CPU.

    `model` is an engine or a module, which is left in its mode. Under ZeRO-3 every rank must call it.
    """
    if not rows:  # data of which every row has one token
        return torch.zeros(0, dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)
    ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
    ids[mask] = torch.tensor([token for row in rows for token in row], device=device)
    module = getattr(model, "module", model)  # an engine does not know its own mode
    was_training = module.training
    module.eval()
    try:
        if head_of(model) == "score":
            values = model(ids, mask.long(), return_values=True)
            outputs = values.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
        else:
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            logprobs = token_logprobs(logits[:, :-1, :num_tokens], ids[:, 1:])
            pairs = zip(logprobs, mask[:, 1:], strict=True)
            outputs = torch.stack([masked_mean(row, row_mask) for row, row_mask in pairs])
    finally:
        module.train(was_training)
    return outputs.double().cpu()


@dataclass(frozen=True)
class Handover:
    """A model as a step receives it: where it is, the flag that says so, and its manifest if it has one."""

    path: str
    flag: str
    manifest: Manifest | None

    def check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` where the run's tokenizer has another chat template than the model learned."""
        if self.manifest and self.manifest.chat_template != template_fingerprint(tokenizer):
            raise self._broken(
                "its chat template",
                "this run uses another one than the model was trained with; give every step the same",
            )

    def fingerprint(self) -> str:
        """32 hex digits of the weights and the configuration, of a folder or of what the hub's cache holds.

        Weights with a manifest have been verified, so that its checksums are not computed again.
        """
        config = cached_file(self.path, "config.json")
        files = self.manifest.files if self.manifest else weight_checksums(Path(config).parent)
        return fingerprint({"files": files, "config": files_fingerprint([Path(config)])})

    def score_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the reward model's scores of its evaluation data.

        Raises `UserError` where the manifest has none.
        """
        if self.manifest is None or not self.manifest.score_std:
            raise UserError(
                f"--normalize_scores needs the score statistics that step 2 writes to {MANIFEST}, and "
                f"{self.flag} {self.path} has none; leave the flag out."
            )
        return self.manifest.score_mean, self.manifest.score_std

    def warn_of_verdict(self) -> None:
        """Repeat on rank 0 what step 2 found wrong with the reward model."""
        verdict = self.manifest.verdict if self.manifest else None
        if verdict and not is_good(verdict):
            print_once(
                f"WARNING: {self.flag} {self.path}: the verdict of step 2 on this reward model is {verdict}. "
                "PPO learns what it rewards, right or wrong."
            )

    def check_outputs(self, *engines: Any) -> None:
        """Raise `UserError` where an engine does not compute the golden outputs. Every rank must call it.

        Weights packed into 4 bits are not those that were promised, and are left alone.
        """
        if self.manifest is None or not self.manifest.golden_outputs:
            return
        for engine in engines:
            if is_packed(engine):  # which rounds more than any tolerance allows
                continue
            expected = torch.tensor(self.manifest.golden_outputs, dtype=torch.float64)
            outputs = golden_outputs(
                engine,
                self.manifest.golden_inputs,
                num_tokens=self.manifest.num_tokens,
                device=current_device(),
            )
            allowed = _tolerance(self.manifest, next(engine.parameters()).dtype)
            # The worst of all ranks, so that all decide alike; a NaN is not within any tolerance.
            error = (outputs - expected).abs().nan_to_num(nan=torch.inf).to(current_device())
            worst = max_across_ranks(error).max().item()
            if worst > allowed:
                what = "score" if self.manifest.head != "language_model" else "log-probability a token"
                raise self._broken(
                    "its golden outputs",
                    f"a {what} is off by {worst:.3g} where rounding explains {allowed:.3g}; the weights, the "
                    "head or config.json are not those that were exported. Copy or train the model again",
                )

    def check_promises(self) -> None:
        """Raise `UserError` for the first promise that the folder breaks, as far as files tell."""
        manifest, folder = self.manifest, Path(self.path)
        try:
            tokenizer = load_tokenizer(self.path)
        except UserError as error:
            problem = f"its files have changed; put its own back. (Reading them fails: {error})"
            raise self._broken("its tokenizer and chat template", problem) from error
        if tokenizer_fingerprint(tokenizer, versioned=False) != manifest.tokenizer:
            raise self._broken("its tokenizer", _tokenizer_problem(manifest))
        if template_fingerprint(tokenizer) != manifest.chat_template:
            problem = "the chat template in the folder is not the one that the model was trained with"
            raise self._broken("its chat template", f"{problem}; restore the file")
        self._check_ids(tokenizer)
        changed = changed_files(manifest, folder)
        if changed:
            raise self._broken("its checksums", f"{changed}. Copy or train the model again")

    def _check_ids(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if len(tokenizer) != self.manifest.num_tokens:
            problem = f"num_tokens is {len(tokenizer)} in the tokenizer and {self.manifest.num_tokens} there"
            raise self._broken("its vocabulary", f"{problem}; restore the file")
        manifest, config = self.manifest, PretrainedConfig.get_config_dict(self.path)[0]
        ends = written_ids(manifest.end_token_ids or [manifest.eos_token_id])
        promises = [
            ("eos_token_id", "the tokenizer", tokenizer.eos_token_id, manifest.eos_token_id),
            ("eos_token_id", "config.json", config.get("eos_token_id"), ends),
            ("pad_token_id", "the tokenizer", tokenizer.pad_token_id, manifest.pad_token_id),
            ("pad_token_id", "config.json", config.get("pad_token_id"), manifest.pad_token_id),
        ]
        if manifest.end_token_ids and is_local(Path(self.path) / GENERATION_CONFIG_NAME):
            generation = GenerationConfig.from_pretrained(self.path)
            promises.append(("eos_token_id", GENERATION_CONFIG_NAME, generation.eos_token_id, ends))
        for name, where, found, promised in promises:
            if found != promised:
                problem = f"{name} is {found} in {where} and {promised} in the manifest"
                raise self._broken("its special tokens", f"{problem}; restore the file")

    def _broken(self, promise: str, problem: str) -> UserError:
        return UserError(
            f"{self.flag} {self.path!r} breaks a promise of its {MANIFEST}, {promise}: {problem}."
        )


def receive_model(path: str, flag: str, *heads: Head) -> Handover:
    """The model at `path`, complete and as its manifest promises, as far as that shows without loading it.

    `heads` are those that the step can use; without any it takes a model of any kind, of which it uses the
    backbone. Every rank may call it, rank 0 alone verifies. A folder without a manifest (or a hub id) is
    accepted with one line. Raises `UserError` that names `flag` and the broken promise.
    """
    checks: dict[tuple[Head, ...], Callable[[str, str], None]] = {
        (): check_backbone,
        ("language_model",): check_language_model,
    }
    manifest = Manifest.read(Path(path), flag)
    if manifest and heads and manifest.head not in heads:
        kinds = f"{HEADS[manifest.head]}, says its {MANIFEST}; give {HEADS[heads[0]]}"
        raise UserError(f"{flag} {path!r} is {kinds}.")
    try:
        checks.get(heads, check_reward_model)(path, flag)
    except UserError as error:
        raise _explained(error, manifest, Path(path)) from error
    handover = Handover(path, flag, manifest)
    if manifest is None:
        print_once(
            f"note: {path!r} has no {MANIFEST}: nothing is promised about this model and nothing verified."
        )
        return handover
    if is_main_process():
        handover.check_promises()
    return handover


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


def _explained(error: UserError, manifest: Manifest | None, folder: Path) -> UserError:
    """The error, and why a folder that was once whole is not: its files have changed."""
    changed = changed_files(manifest, folder) if manifest else ""
    return UserError(f"{error} By its {MANIFEST} {changed}.") if changed else error


def _tokenizer_problem(manifest: Manifest) -> str:
    import tokenizers

    problem = "the folder holds another tokenizer than the model was trained with; put its own files back"
    if tokenizers.__version__ != manifest.tokenizers_version:
        versions = f"{manifest.tokenizers_version} and this is {tokenizers.__version__}"
        problem += f" (or the library reads it differently: it was written with tokenizers {versions})"
    return problem


def _tolerance(manifest: Manifest, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains: of log-probabilities in nats, of scores as they are."""
    precisions = (manifest.dtype, PRECISIONS[dtype])
    if manifest.head == "language_model":
        return max(NATS[precision] for precision in precisions)
    expected = torch.tensor(manifest.golden_outputs, dtype=torch.float64)
    std = manifest.score_std or expected.std(correction=0).item()
    # Scores far from 0 are rounded in proportion to their size, which may be many standard deviations.
    epsilon = max(torch.finfo(kind).eps for kind, name in PRECISIONS.items() if name in precisions)
    share = max(STANDARD_DEVIATIONS[precision] for precision in precisions)
    return share * std + 4 * epsilon * expected.abs().max().item()
