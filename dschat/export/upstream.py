"""A model as a step receives it, and the checks that it is what its manifest promises."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dschat.console import messages
from dschat.data.files import is_local
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.distributed.collectives import max_across_ranks
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process
from dschat.errors import UserError
from dschat.export.golden_outputs import _tolerance, golden_outputs
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
            messages.warning(
                f"{self.flag} {self.path}: the verdict of step 2 on this reward model is {verdict}. "
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
            worst = max_across_ranks(error, axis="world").max().item()
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


def verify_model(path: str, flag: str, *heads: Head) -> UpstreamModel:
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
    handover = UpstreamModel(path, flag, manifest)
    if manifest is None:
        messages.note(
            f"{path!r} has no {MANIFEST}: nothing is promised about this model and nothing verified."
        )
        return handover
    if is_main_process():
        handover.check_promises()
    return handover


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
