"""The engines of step 3, built from flags and, where there is one, a fifth model: a teacher.

python rlhf_engines.py OUTPUT_FILE '[[["--actor_model_name_or_path=...", ...], TEACHER], ...]'
TEACHER is a folder or null. The JSON has for each run what was built, and what the checks say of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dschat.arguments import RlhfArguments, parse_arguments
from dschat.distributed import deepspeed_private, zero3
from dschat.distributed.mesh import is_main_process
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.distributed.process_wide import process_wide
from dschat.distributed.random_state import seed_everything
from dschat.engines import out_of_memory
from dschat.engines.memory_remedies import Phase, PhaseKind, memory_flags
from dschat.errors import UserError
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.roles import EngineSpec, engine_specs
from dschat.rlhf.tokenizers import load_rlhf_tokenizers
from dschat.rlhf.upstream import check_adapters, check_positions, verify_models


def models_of(args: RlhfArguments, teacher: str | None) -> list[EngineSpec]:
    """The list of step 3, with one more entry for the teacher."""
    specs = engine_specs(args)
    if teacher is not None:
        specs.append(
            EngineSpec(
                role="teacher",
                name="teacher",
                path=teacher,
                flag="--teacher_model_name_or_path",
                head="language_model",
                settings=args.actor,
                dtype=args.run.dtype,
                offload=False,
            )
        )
    return specs


def run(flags: list[str], teacher: str | None) -> dict[str, Any]:
    """Whatever step 3 does with its list of models before it trains."""
    args = parse_arguments("rlhf", flags)
    out_of_memory.report_memory_with(memory_flags(args))
    specs = models_of(args, teacher)
    received = verify_models(specs)
    check_adapters(specs)
    tokenizers, specs = load_rlhf_tokenizers(specs, args.tokenizer)
    received.check_templates(specs, tokenizers)
    check_positions(specs, tokenizers, 32)
    seed_everything(args.run.seed)
    groups = {"optimizer": args.optimizer, "ppo": args.ppo, "run": args.run}
    steps = {"actor": 8, "critic": 16}
    engine = DeepSpeedRLHFEngine(specs, tokenizers, **groups, num_training_steps=steps)
    received.check_outputs(specs, engine.by_role)
    seen = {
        "engines": list(engine.by_role),
        "trained": list(engine.by_name),
        "received": [model.flag for model in received.all],
        "sharded": [
            role
            for role, model in engine.by_role.items()
            if any(deepspeed_private.is_sharded(p) for p in model.module.parameters())
        ],
        "have gradients": [
            role
            for role, model in engine.by_role.items()
            if any(p.requires_grad for p in model.module.parameters())
        ],
        "consumers": out_of_memory.report(Phase(PhaseKind.SAMPLING), memory_flags(args), MemoryError()),
    }
    known = process_wide(out_of_memory.MemoryReport).flags.models_of
    seen["prefixes of flags"] = {name: settings.prefix for name, settings in known.items()}
    with engine.reference() as reference:
        seen["reference is the actor"] = reference is engine.actor
    for role in engine.by_role:
        seen[f"changed {role}"] = what_a_change_breaks(specs, received, engine, role)
    return seen


def what_a_change_breaks(specs: list, received: Any, engine: DeepSpeedRLHFEngine, role: str) -> str | None:
    """The message of the check where one model's last weights, of its head or its norm, are others."""
    weights = list(engine.by_role[role].module.parameters())[-1]
    with zero3.gathered([weights], modifier_rank=0), torch.no_grad():
        before = weights.clone()
        weights.mul_(-1)
    try:
        received.check_outputs(specs, engine.by_role)
    except UserError as error:
        return str(error)
    finally:
        with zero3.gathered([weights], modifier_rank=0), torch.no_grad():
            weights.copy_(before)
    return None


if __name__ == "__main__":
    init_process_group()
    torch.set_num_threads(1)
    results = [run(flags, teacher) for flags, teacher in json.loads(sys.argv[2])]
    if is_main_process():
        Path(sys.argv[1]).write_text(json.dumps(results))
    destroy_process_group()
