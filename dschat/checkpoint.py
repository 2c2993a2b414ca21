"""Models on disk, in the form that transformers loads anywhere."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dschat.distributed import barrier, gathered, is_main_process, print_once
from dschat.models.factory import HEAD
from dschat.models.lora import lora_config, merge_lora, save_adapter, trains_more_than_adapters
from dschat.models.quantization import unpacked
from dschat.models.reward_model import RewardModel

ADAPTER_FOLDER = "adapter"
"""Where an export keeps LoRA's adapters, in PEFT's format; the weights beside it have them merged in."""


def export_model(
    engine_or_module: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path | str,
    *,
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model, configuration and tokenizer into `output_dir` from any ZeRO stage; every rank calls it.

    A language model then loads with AutoModelForCausalLM, a `RewardModel` with equal scores with
    AutoModelForSequenceClassification. `parameters` (rank 0's count) replace the model's own by name, whole
    and in any precision; the files are in the model's. LoRA's adapters are merged into copies of the weights
    and also written by themselves, into `adapter/`. Files of an older export are replaced, others in the
    folder stay; config.json comes last, so that a folder which has one is complete.
    """
    module = getattr(engine_or_module, "module", engine_or_module)
    state = _whole_state(module, parameters or {})
    if is_main_process():
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=output_dir))
        try:
            _save(module, state, temporary)
            tokenizer.save_pretrained(temporary)
            _move_into_place(temporary, output_dir)
        finally:
            shutil.rmtree(temporary)
    barrier()


def _whole_state(module: nn.Module, replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all weights in CPU memory on rank 0, gathered one by one; nothing on other ranks."""
    state = {}
    persistent = module.state_dict(keep_vars=True).keys()
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        with gathered([tensor]):
            if is_main_process():
                whole = unpacked(tensor)
                source = replacements.get(name, whole)
                state[name] = source.detach().to(device="cpu", dtype=whole.dtype, copy=True)
    unknown = sorted(set(replacements) - {name for name, _ in tensors})
    assert not unknown, f"the model has no {unknown}"
    return state


def _save(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    model = module
    if isinstance(module, RewardModel):
        model, state = _as_classifier(module, state)
    lora = lora_config(module)
    if lora is not None:
        if trains_more_than_adapters(module):
            print_once("note: adapter/ holds the adapters alone, the weights beside it all that was trained.")
        save_adapter(state, lora, folder / ADAPTER_FOLDER)
        state = merge_lora(state, lora)
    _save_with_cache(model, state, folder)


def _as_classifier(model: RewardModel, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Transformers' classifier of the same architecture, without weights, and `state` under its names."""
    backbone = model.rwtransformer
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(model.config, dtype=backbone.dtype)
    prefix = f"{backbone.base_model_prefix}."
    renamed = {
        HEAD if name == "v_head.weight" else prefix + name.removeprefix("rwtransformer."): tensor
        for name, tensor in state.items()
    }
    return classifier, renamed


def _save_with_cache(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """`save_pretrained`, the cache switched on in the file though it is off while training."""
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.use_cache = use_cache


def _move_into_place(temporary: Path, output_dir: Path) -> None:
    (output_dir / "config.json").unlink(missing_ok=True)
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        for old in output_dir.glob(pattern):
            old.unlink()
    shutil.rmtree(output_dir / ADAPTER_FOLDER, ignore_errors=True)
    for new in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        new.replace(output_dir / new.name)
