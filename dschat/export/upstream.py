"""Upstream models: what a step receives from an earlier one, verified against the promises of its manifest.

A step calls `verify_model` before it loads anything, and `UpstreamModel.check_outputs` before it trains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dschat.console import messages
from dschat.data.files import is_local
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.distributed.collectives import max_across_ranks
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process
from dschat.engines.at_rest import in_use
from dschat.errors import UserError
from dschat.export.golden_outputs import golden_outputs, tolerance
from dschat.export.manifest import (
    HEADS,
    MANIFEST,
    Head,
    Manifest,
    changed_files,
    template_fingerprint,
    weight_checksums,
)
from dschat.export.verdict import is_good
from dschat.fingerprint import files_fingerprint, fingerprint
from dschat.models.end_tokens import written_ids
from dschat.models.preflight import check_backbone, check_language_model, check_reward_model
from dschat.models.quantization import is_packed
from dschat.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class UpstreamModel:
    """A model that a step starts from."""

    path: str
    """Folder or hub id."""
    flag: str
    """The flag that names the model, for messages."""
    manifest: Manifest | None
    """None where the folder has none, or the model is on the hub: nothing is promised then."""

    def check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` where `tokenizer` has another chat template than the model was trained with."""
        if self.manifest and self.manifest.chat_template != template_fingerprint(tokenizer):
            raise self._broken(
                "its chat template",
                "this run uses another one than the model was trained with; give every step the same",
            )

    def fingerprint(self) -> str:
        """The fingerprint of weights and config.json, 32 hex digits, of a folder or in the cache of the hub.

        The checksums of a manifest are taken from there, as they have been verified.
        """
        config = cached_file(self.path, "config.json")
        assert config is not None  # without it the model would not have been accepted
        files = self.manifest.files if self.manifest else weight_checksums(Path(config).parent)
        return fingerprint({"files": files, "config": files_fingerprint([Path(config)])})

    def score_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of a reward model's scores of its evaluation data.

        Raises `UserError` where the manifest has none.
        """
        mean, std = (self.manifest.score_mean, self.manifest.score_std) if self.manifest else (None, None)
        if mean is None or not std:
            raise UserError(
                f"--normalize_scores needs the score statistics that step 2 writes to {MANIFEST}, and "
                f"{self.flag} {self.path} has none; leave the flag out."
            )
        return mean, std

    def warn_of_verdict(self) -> None:
        """Repeat on rank 0 a verdict of step 2 that the reward model is not good."""
        verdict = self.manifest.verdict if self.manifest else None
        if verdict and not is_good(verdict):
            messages.warning(
                f"{self.flag} {self.path}: the verdict of step 2 on this reward model is {verdict}. "
                "PPO learns what it rewards, right or wrong."
            )

    def check_outputs(self, *engines: Any) -> None:
        """Raise `UserError` where an engine does not compute the golden outputs. Every rank must call it.

        Engines with weights in 4 bits are not checked: packing rounds more than any tolerance allows.
        """
        if self.manifest is None or not self.manifest.golden_outputs:
            return
        for engine in engines:
            if is_packed(engine):
                continue
            expected = torch.tensor(self.manifest.golden_outputs, dtype=torch.float64)
            with in_use(engine):
                outputs = golden_outputs(
                    engine,
                    self.manifest.golden_inputs,
                    num_tokens=self.manifest.num_tokens,
                    device=current_device(),
                )
            allowed = tolerance(self.manifest, next(engine.parameters()).dtype)
            # The worst of all ranks, so that all decide alike; a NaN is not within any tolerance.
            error = (outputs - expected).abs().nan_to_num(nan=torch.inf).to(current_device())
            worst = max_across_ranks(error, axis="world").max().item()
            if worst > allowed:
                what = "score" if self.manifest.head != "language_model" else "log-probability a token"
                raise self._broken(
                    "its golden outputs",
                    f"a {what} is off by {worst:.3g} where rounding explains {allowed:.3g}; the weights, the "
                    "head or config.json are not those that were exported. Copy or train the model again",
                )

    def check_files(self, manifest: Manifest) -> None:
        """Raise `UserError` for the first promise of `manifest` that the files of the folder break.

        The order is that in which a message helps most: tokenizer, chat template, special tokens, weights.
        """
        folder = Path(self.path)
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
        self._check_ids(manifest, tokenizer)
        changed = changed_files(manifest, folder)
        if changed:
            raise self._broken("its checksums", f"{changed}. Copy or train the model again")

    def _check_ids(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` where the vocabulary or a special token is not as promised, in any file."""
        if len(tokenizer) != manifest.num_tokens:
            problem = f"num_tokens is {len(tokenizer)} in the tokenizer and {manifest.num_tokens} there"
            raise self._broken("its vocabulary", f"{problem}; restore the file")
        config = PretrainedConfig.get_config_dict(self.path)[0]
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


def verify_model(path: str, flag: str, *heads: Head) -> UpstreamModel:
    """The model at `path` after all checks of it that need no weights in memory.

    `heads` are the kinds of models that the step can use; without any it uses the backbone of a model of any
    kind. Every rank may call it, and rank 0 alone verifies checksums. A folder without a manifest or a hub id
    is accepted with a note. Raises `UserError` that names `flag` and the broken promise.
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
    model = UpstreamModel(path, flag, manifest)
    if manifest is None:
        messages.note(
            f"{path!r} has no {MANIFEST}, as no step wrote it: there is nothing to verify it against."
        )
        return model
    if is_main_process():
        model.check_files(manifest)
    return model


def _explained(error: UserError, manifest: Manifest | None, folder: Path) -> UserError:
    """`error`, and the weight file that has changed since the folder was whole, if the manifest shows one."""
    changed = changed_files(manifest, folder) if manifest else ""
    return UserError(f"{error} By its {MANIFEST} {changed}.") if changed else error


def _tokenizer_problem(manifest: Manifest) -> str:
    """The message for another tokenizer than the promised one, with the versions of the library."""
    problem = "the folder holds another tokenizer than the model was trained with; put its own files back"
    if tokenizers.__version__ != manifest.tokenizers_version:
        versions = f"{manifest.tokenizers_version} and this is {tokenizers.__version__}"
        problem += f" (or the library reads it differently: it was written with tokenizers {versions})"
    return problem
