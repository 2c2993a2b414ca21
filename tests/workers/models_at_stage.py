"""Build, train and export small models at one ZeRO stage; rank 0 writes what it saw as JSON.

Usage: [torchrun --nproc_per_node N] models_at_stage.py MODEL_FOLDER OUTPUT_FOLDER STAGE DTYPE
The model's folder holds a tokenizer without padding token, so that the vocabulary has to grow.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from tiny import TEXTS
from transformers import AutoModelForCausalLM

from dschat.distributed import collectives, deepspeed_private, process_group, random_state, zero3
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.export.provenance import Provenance
from dschat.export.upstream import UpstreamModel, verify_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.reward_model import RewardModel
from dschat.models.tokenizer import load_tokenizer


def ds_config(stage: int, dtype: str) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "optimizer": optimizer,
        "steps_per_print": 1000,
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }


def batch(tokenizer) -> dict[str, torch.Tensor]:
    """This rank's pairs, chosen rows first; over all ranks two pairs, whatever their number."""
    tokens = tokenizer(list(TEXTS), padding=True, return_tensors="pt", padding_side="right")
    pairs = range(mesh().world.rank, 2, mesh().world.size)
    rows = [*pairs, *(pair + 2 for pair in pairs)]
    return {name: tokens[name][rows] for name in ("input_ids", "attention_mask")}


def train(model: RewardModel, tokenizer, config: dict) -> tuple[deepspeed.DeepSpeedEngine, list[float]]:
    """Two steps on the ranking loss, two on the values, the gradients through the engine each time."""
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    losses = []
    for step in range(4):
        if step < 2:
            loss = engine(**batch(tokenizer))["loss"]
        elif step == 2:
            loss = engine(**batch(tokenizer), return_values=True).pow(2).mean()
        else:
            loss = engine.module.forward_value(**batch(tokenizer), return_value_only=True).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(collectives.sum_across_ranks(loss, axis="data").item() / mesh().world.size)
    return engine, losses


def refuses(handover: UpstreamModel, model: RewardModel) -> bool:
    """Whether this rank notices that the head is another one."""
    head = model.v_head.weight
    with zero3.gathered([head], modifier_rank=0), torch.no_grad():
        head.zero_()
    try:
        handover.check_outputs(model)
    except UserError:
        return True
    return False


def main(model_folder: str, output: Path, stage: int, dtype: str) -> None:
    process_group.init_process_group()
    random_state.seed_everything(7)
    tokenizer, config = load_tokenizer(model_folder), ds_config(stage, dtype)
    critic = create_critic_model(model_folder, tokenizer, config, dropout=0.0)
    critic.gradient_checkpointing_enable()
    sharded = sum(deepspeed_private.is_sharded(p) for p in critic.parameters())
    engine, losses = train(critic, tokenizer, config)
    rows = [tokenizer(text)["input_ids"][:24] for text in TEXTS]
    provenance = Provenance(step="reward", base_model=model_folder, golden_inputs=rows)
    export_model(engine, tokenizer, output / "critic", provenance=provenance)
    handover = verify_model(str(output / "critic"), "critic", "score")
    handover.check_outputs(engine)
    with torch.no_grad():
        engine.eval()
        scores = engine.module.forward_value(**batch(tokenizer))["chosen_end_scores"]
    again = create_critic_model(str(output / "critic"), tokenizer, config, rlhf_training=True)
    handover.check_outputs(
        deepspeed.initialize(model=again, config=config, model_parameters=again.parameters())[0]
    )
    with torch.no_grad():
        reloaded = again.eval().forward_value(**batch(tokenizer))["chosen_end_scores"]
    actor = create_hf_model(AutoModelForCausalLM, model_folder, tokenizer, config)
    export_model(actor, tokenizer, output / "actor", provenance=provenance)
    engine = deepspeed.initialize(model=actor, config=config, model_parameters=actor.parameters())[0]
    verify_model(str(output / "actor"), "actor", "language_model").check_outputs(engine)
    if stage == 3:  # ranks whose answers end sooner make fewer passes
        with zero3.weights_gathered_for_generation(engine), torch.no_grad():
            for _ in range(1 + 2 * mesh().world.rank):
                engine.module(**batch(tokenizer))
    plain = create_hf_model(AutoModelForCausalLM, str(output / "actor"), tokenizer)
    seen = {
        "sharded": sharded,
        "losses": losses,
        "scores": collectives.gather_rows(scores, axis="data").tolist(),
        "reload_error": (scores - reloaded).abs().max().item(),
        "plain_is_whole": all(p.numel() > 0 and not hasattr(p, "ds_id") for p in plain.parameters()),
        "refusals": collectives.sum_across_ranks(torch.tensor(refuses(handover, again)), axis="data").item(),
        "vocabulary": [len(tokenizer), plain.config.vocab_size, plain.get_input_embeddings().weight.shape[0]],
    }
    if mesh().is_main_process:
        (output / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    process_group.destroy_process_group()
