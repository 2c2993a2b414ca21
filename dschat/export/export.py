"""Export: models on disk, in the form that transformers loads anywhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dschat.console import messages
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.distributed.collectives import first_error_across_ranks, in_first_stage
from dschat.distributed.deepspeed_private import whole_over_tensor_ranks
from dschat.distributed.device import PRECISIONS, give_back_memory
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.zero3 import gathered
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.pipeline import is_counted
from dschat.errors import STORAGE_REMEDY, UserError
from dschat.export.golden_outputs import golden_outputs, head_of
from dschat.export.manifest import Head, Manifest, template_fingerprint, weight_checksums
from dschat.export.model_card import CARD, model_card
from dschat.export.provenance import Provenance
from dschat.models.end_tokens import end_token_ids
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import lora_config, merge_lora, save_adapter, trains_more_than_adapters
from dschat.models.quantization import unpacked
from dschat.models.remote_code import loading_consent
from dschat.models.reward_model import RewardModel
from dschat.models.tokenizer import load_tokenizer
from dschat.runs.export_files import ADAPTER_FOLDER, link_export, remove_export, replacing_export


@phase(PhaseKind.EXPORTING)
def export_model(
    engine_or_module: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path | str,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    write_report: Callable[[Path], None] | None = None,
) -> None:
    """Write model, configuration and tokenizer into `output_dir`, from any ZeRO stage. Every rank calls it.

    A language model then loads with AutoModelForCausalLM, and a `RewardModel` loads with equal scores with
    AutoModelForSequenceClassification. `parameters` of rank 0 replace the model's by name: whole tensors in
    any precision, which are written in the model's. LoRA's adapters are merged into copies of the weights and
    also written alone, into adapter/. With a `provenance` the folder gets a manifest and a model card, and on
    rank 0 `write_report` is given the folder to add what it writes of the model. Files
    of an older export are replaced, other files stay. config.json is written last, so that a folder with one
    is complete. Raises `UserError` on all ranks where the disk is full or broken.
    """
    module = getattr(engine_or_module, "module", engine_or_module)
    state = _whole_state(module, parameters or {})

    def write() -> None:
        with replacing_export(Path(output_dir)) as folder:
            _save(module, state, folder)
            state.clear()  # the manifest reads the model back: one copy of the weights at a time
            give_back_memory()
            tokenizer.save_pretrained(folder)
            if provenance is not None:
                manifest = _manifest(folder, provenance)
                manifest.write(folder)
                _write_card(folder, provenance, manifest.head, str(output_dir), tokenizer)
            if write_report is not None:
                write_report(folder)

    problem = first_error_across_ranks(lambda: write() if is_main_process() else None, axis="world")
    if problem:
        raise UserError(f"the model could not be written to {output_dir}: {problem}. {STORAGE_REMEDY}")


def move_export(source: Path, target: Path, provenance: Provenance) -> None:
    """Move the exported model in `source` to `target`, in place of an older one. Every rank must call it.

    The card is written anew, as it names the folder. `source` is removed when `target` is whole. Raises
    `UserError` where the disk is full or broken.
    """

    def move() -> None:
        with replacing_export(target) as folder:
            link_export(source, folder)
            (folder / CARD).unlink(missing_ok=True)  # a link to that in `source`
            head = provenance.head or _promised_head(source)
            _write_card(folder, provenance, head, str(target), load_tokenizer(str(source)))
        remove_export(source)

    problem = first_error_across_ranks(lambda: move() if is_main_process() else None, axis="world")
    if problem:
        raise UserError(f"{source} could not be moved to {target}: {problem}. {STORAGE_REMEDY}")


def _write_card(
    place: Path, provenance: Provenance, head: Head, folder: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the card of the model whose files are in `place` and which will be in `folder`."""
    has_adapter = (place / ADAPTER_FOLDER).is_dir()
    card = model_card(provenance, head, folder, tokenizer, has_adapter=has_adapter)
    (place / CARD).write_text(card, encoding="utf-8")


def _promised_head(folder: Path) -> Head:
    """The kind of the model in `folder` by its manifest."""
    manifest = Manifest.read(folder)
    assert manifest is not None  # what is moved was exported with a provenance
    return manifest.head


def _manifest(folder: Path, provenance: Provenance) -> Manifest:
    """The manifest of the model in `folder`, which is read back as the next step will read it.

    So the golden outputs are those of the weights in the file, also where adapters were merged or an average
    replaced the weights. They are computed on the CPU, as the device is full of the model in training.
    """
    tokenizer = load_tokenizer(str(folder))
    model = _read_back(folder, tokenizer)
    head = provenance.head or head_of(model)
    with _more_threads():
        outputs = golden_outputs(model, provenance.golden_inputs, num_tokens=len(tokenizer), device="cpu")
    has_statistics = head == "score"
    return Manifest(
        step=provenance.step,
        head=head,
        tokenizer=tokenizer_fingerprint(tokenizer, versioned=False),
        tokenizers_version=tokenizers.__version__,
        chat_template=template_fingerprint(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        end_token_ids=list(end_token_ids(tokenizer, model)),
        pad_token_id=tokenizer.pad_token_id,
        num_tokens=len(tokenizer),
        dtype=PRECISIONS[next(model.parameters()).dtype],
        score_mean=provenance.metrics.get("score_mean") if has_statistics else None,
        score_std=provenance.metrics.get("score_std") if has_statistics else None,
        data=provenance.data,
        verdict=provenance.verdict if has_statistics else None,
        files=weight_checksums(folder),
        golden_inputs=provenance.golden_inputs,
        golden_outputs=outputs.tolist(),
    )


def _read_back(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | RewardModel:
    """The exported model in `folder` on the CPU, in the precision of its files."""
    config = AutoConfig.from_pretrained(folder, **loading_consent())
    precision = {PRECISIONS[config.dtype]: {"enabled": True}}  # in the form of a DeepSpeed configuration
    if config.architectures[0].endswith("ForSequenceClassification"):
        return create_critic_model(str(folder), tokenizer, precision, rlhf_training=True)
    return create_hf_model(AutoModelForCausalLM, str(folder), tokenizer, precision)


@contextmanager
def _more_threads() -> Iterator[None]:
    """More CPU threads for this process inside the block: the other ranks of the machine are waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, before * mesh().machine.size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _whole_state(module: nn.Module, replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all weights in CPU memory on rank 0, gathered one by one; nothing on other ranks.

    The stages of a pipeline send theirs to the first.
    """
    state = {}
    persistent = module.state_dict(keep_vars=True).keys()
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        with gathered([tensor]):
            whole = whole_over_tensor_ranks(tensor, unpacked(tensor))
            if mesh().data.rank == mesh().tensor.rank == 0 and is_counted(tensor):
                source = replacements.get(name, whole)
                state[name] = source.detach().to(device="cpu", dtype=whole.dtype, copy=True)
    unknown = sorted(set(replacements) - {name for name, _ in tensors})
    assert not unknown, f"the model has no {unknown}"
    return in_first_stage(state)


def _save(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write weights and configuration of `module` with the whole weights `state`, adapters merged."""
    model: Any = module
    if isinstance(module, RewardModel):
        model, state = module.as_classifier(state)
    lora = lora_config(module)
    if lora is not None:
        if trains_more_than_adapters(module):
            messages.note("adapter/ holds the adapters alone, the weights beside it all that was trained.")
        save_adapter(state, lora, folder / ADAPTER_FOLDER)
        state = merge_lora(state, lora)
    _save_with_cache(_whole(model), state, folder)


def _whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or where it is a stage of a pipeline, one without weights that has all layers."""
    if mesh().pipeline.size == 1 or model.device.type == "meta":
        return model
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    whole.generation_config = model.generation_config
    return whole


def _save_with_cache(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """`save_pretrained`, with the cache of keys and values on in config.json that is off in training."""
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.use_cache = use_cache
