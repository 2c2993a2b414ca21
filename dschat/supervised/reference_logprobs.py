"""What DPO's reference model says of the answers: computed once by all ranks, kept on disk, then read.

Rank 0 alone looks after the file, so ranks that share no file system know the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dschat.console import messages
from dschat.console.progress import Progress
from dschat.data.cache import cache_folder, cached, lookup
from dschat.data.collate import REFERENCE_COLUMNS, PairBatch
from dschat.data.loaders import EvalLoader, TrainLoader
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.distributed.collectives import sum_across_ranks
from dschat.distributed.device import current_device
from dschat.distributed.mesh import Axis, is_main_process, mesh, stage
from dschat.engines.at_rest import in_use
from dschat.engines.build import build_frozen_engine, free_frozen_engine, frozen_config
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.pipeline import results_of
from dschat.engines.step import DeepSpeedEngine
from dschat.errors import UserError
from dschat.export.upstream import UpstreamModel
from dschat.fingerprint import fingerprint
from dschat.models.forward import token_logprobs_of
from dschat.models.loading import create_hf_model
from dschat.models.lora import adapters_off
from dschat.runs.measured_choices import machine
from dschat.supervised.batches import Loaders
from dschat.supervised.settings import SupervisedSettings

FORMAT = 2
"""Raise it when code changes what the same model says of the same rows, by more than rounding."""

BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_batch")
"""Flags that decide which rows meet in a batch."""

FILE = "logprobs.npy"
"""float32 [training and then evaluation pairs, 2]: nats of the chosen and of the rejected answer."""


def answer_logprobs(engine: DeepSpeedEngine, batch: PairBatch) -> Tensor:
    """log p(answer | prompt), in nats: the sum over an answer's tokens, its end token included. -> [2B]."""
    return batch.tokens.in_rows(token_logprobs_of(engine, batch.tokens)).sum(dim=1)


@dataclass(frozen=True)
class ReferenceStore:
    """Where the log-probabilities of one model and the pairs of one run are kept, and what is there."""

    root: Path
    key: str
    """A fingerprint of the pairs, the weights and what rounding depends on; empty on ranks other than 0."""
    num_pairs: int
    """Training and evaluation pairs."""
    found: np.ndarray | None
    """What an earlier run kept; None on ranks other than 0."""

    @staticmethod
    def open(
        settings: SupervisedSettings, base: UpstreamModel, data: SplitData, choices: Mapping[str, str]
    ) -> "ReferenceStore":
        """Look for what was kept; `choices` are those between ways to compute. Raises `UserError` for a
        spoilt file.

        Rows that meet in other batches or on other ranks have another rounding, and numbers of their own:
        what the policy says before it is trained is equal to them to the last bit. ZeRO stages share them.
        """
        root = cache_folder(settings.description.data.data_output_path)
        num_pairs = len(data.train) + len(data.evaluation)
        if not is_main_process():
            return ReferenceStore(root, "", num_pairs, None)
        key = fingerprint(
            {
                "reference": FORMAT,
                "data": data.key,
                "model": base.fingerprint(),
                "dtype": settings.run.dtype,
                "load_in_4bit": settings.model.load_in_4bit,
                "torch_compile": settings.run.torch_compile,
                "attention": settings.model.attn_implementation,
                "widths": asdict(settings.widths),
                "batches": {name: getattr(settings.batch, name) for name in BATCHES},
                "accumulation": settings.optimizer.gradient_accumulation_steps,
                "seed": settings.run.seed,
                "ranks": asdict(replace(mesh(), machine=Axis())),
                "machine": machine(),
                "choices": dict(choices),
            }
        )
        folder = lookup(root, key)
        found = None if folder is None else _read(folder / FILE, num_pairs)
        return ReferenceStore(root, key, num_pairs, found)

    def read(self) -> Tensor | None:
        """What rank 0 found, fp32 [pairs, 2] on every rank. Every rank must call it."""
        is_found = torch.tensor(self.found is not None, device=current_device())
        if not sum_across_ranks(is_found, axis="world"):
            return None
        table = torch.zeros(self.num_pairs, len(REFERENCE_COLUMNS), device=current_device())
        if self.found is not None:
            table += torch.from_numpy(self.found).to(table.device)
        return sum_across_ranks(table, axis="world").float().cpu()

    def write(self, table: Tensor) -> None:
        """Keep the table for later runs (rank 0)."""
        if is_main_process():
            folder = cached(self.root, self.key, lambda place: np.save(place / FILE, table.numpy()))
            messages.info(f"the reference model's log-probabilities are kept in {folder}")


def with_reference(data: SplitData, store: ReferenceStore, compute: Callable[[], Tensor]) -> SplitData:
    """The pairs with REFERENCE_COLUMNS: kept ones, or what `compute` says, which is kept then.

    Raises `UserError` where a log-probability is not finite.
    """
    table = store.read()
    if table is None:
        table = compute()
        _check_finite(table)
        store.write(table)
    else:
        messages.info(f"the reference model's log-probabilities come from {store.root / store.key}")
    train, evaluation = table.split([len(data.train), len(data.evaluation)])
    return replace(
        data, train=_extended(data.train, train), evaluation=_extended(data.evaluation, evaluation)
    )


@phase(PhaseKind.LOADING, "reference model")
def reference_of_copy(
    settings: SupervisedSettings,
    tokenizer: PreTrainedTokenizerBase,
    base: UpstreamModel,
    loaders: Loaders,
    *,
    offload: bool,
) -> Tensor:
    """`logprob_table` of a copy of the model that training starts from; its memory is free after that."""
    messages.info("loading the reference model, a copy, for its log-probabilities")
    config = frozen_config(settings.model, settings.run, offload=offload)
    path, options = settings.model.model_name_or_path, settings.model.loading_options
    model = create_hf_model(AutoModelForCausalLM, path, tokenizer, config, stage=stage(), **options)
    engine = build_frozen_engine(model, settings.run, config=config, offload=offload)
    base.check_outputs(engine)
    with in_use(engine):
        table = logprob_table(engine, loaders)
    free_frozen_engine(engine)
    return table


def reference_of_policy(engine: DeepSpeedEngine, loaders: Loaders, *, offload: bool) -> Tensor:
    """`logprob_table` of a policy that trains adapters alone: without them it is its own reference."""
    messages.info("the reference model is the policy without its adapters: no copy is loaded")
    if offload:
        messages.note("--offload_reference_model has nothing to offload and is ignored.")
    with adapters_off(engine.module):
        return logprob_table(engine, loaders)


@phase(PhaseKind.EVALUATING, "reference model")
@torch.no_grad()
def logprob_table(engine: DeepSpeedEngine, loaders: Loaders) -> Tensor:
    """The model's log-probabilities of all training and evaluation pairs, fp32 [pairs, 2] on every rank.

    Rows meet as they will meet in the first epoch and in evaluations, so that the policy, whose matrix
    products then have the same shapes, starts from exactly these numbers. Every rank must call it.
    """
    engine.eval()
    parts = [_logprobs(engine, loader) for loader in (loaders.train, loaders.evaluation)]
    of_stage = sum_across_ranks(torch.cat(parts), axis="data")
    return sum_across_ranks(of_stage, axis="pipeline").float().cpu()  # 0 in all stages but the last


def _logprobs(engine: DeepSpeedEngine, loader: TrainLoader | EvalLoader) -> Tensor:
    """This rank's rows of the loader's data set, 0 in those of other ranks. -> fp32 [N, 2]."""
    table = torch.zeros(len(loader.dataset), len(REFERENCE_COLUMNS), device=engine.device)
    shown: dict[str, Any] = {"desc": "reference", "disable": not is_main_process()}
    found, taken = tee(Progress(loader.indexed_batches(), total=len(loader), **shown))
    batches = (batch.to(engine.device) for _, batch in taken)
    for logprobs in results_of(engine, batches, partial(answer_logprobs, engine)):
        indices, _ = next(found)
        table[torch.from_numpy(indices)] = logprobs.view(len(REFERENCE_COLUMNS), -1).T[: len(indices)]
    return table


def _extended(rows: Rows, table: Tensor) -> Rows:
    extended = rows.table
    for name, values in zip(REFERENCE_COLUMNS, table.unbind(dim=1), strict=True):
        extended = extended.append_column(name, [values.numpy()])
    return Rows(extended)


def _read(path: Path, num_pairs: int) -> np.ndarray:
    try:
        table = np.load(path)
        if table.shape == (num_pairs, len(REFERENCE_COLUMNS)) and table.dtype == np.float32:
            return table
        problem = f"it holds {table.dtype} of shape {table.shape}"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise UserError(f"the log-probabilities kept in {path} cannot be read ({problem}); remove {path.parent}.")


def _check_finite(table: Tensor) -> None:
    num_bad = int((~table.isfinite()).any(dim=1).sum())
    if num_bad:
        raise UserError(
            f"the reference model gives {num_bad} of {len(table)} pairs no finite log-probability: "
            "its weights are damaged, or --dtype is too narrow for it; try --dtype bf16 or fp32."
        )
