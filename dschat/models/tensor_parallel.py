"""Tensor parallelism: the ranks of a tensor group share the weights of each layer, by DeepSpeed's AutoTP.

A layer whose outputs are shared (a column) gives each rank some heads or some of the MLP's neurons; the layer
after it (a row) takes them, and the ranks add up what it computes. All else is whole on every rank.
"""

import re
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from dschat.arguments import ModelArguments
from dschat.distributed.collectives import barrier
from dschat.distributed.deepspeed_private import shard_layers, tensor_groups
from dschat.distributed.device import give_back_memory
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.models.config import read_config
from dschat.models.lora import lora_config

OWN_PLANS = {
    "opt": (
        r"layers.*.self_attn.[qkv]_proj",
        r"layers.*.fc1",
        r"layers.*.self_attn.out_proj",
        r"layers.*.fc2",
    ),
    "gptj": (r"h.*.attn.[qkv]_proj", r"h.*.mlp.fc_in", r"h.*.attn.out_proj", r"h.*.mlp.fc_out"),
}
"""Two columns and their rows for families of which transformers has no plan, by `model_type`."""

KINDS = {
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "summed",
    "colwise_gather_output": "gathered column",
    "colwise_rep": "gathered column",
}
"""What transformers' plans call the ways to share a layer, and what `shard_layers` does."""

WHOLE = "embedding_rowwise"
"""What plans from transformers 5.24 on share besides; here every rank keeps all rows of the embeddings."""


def check_tensor_parallel(model_name_or_path: str, args: ModelArguments) -> None:
    """Raise `UserError` where --tensor_parallel_size ranks cannot share the model's layers. Reads no weights.

    `args` are the model's own, or in step 3 those of the trained model that it stands beside.
    """
    if (size := args.tensor_parallel_size) == 1:
        return
    config = read_config(model_name_or_path, dropout=None)
    given = f"--{args.prefix}tensor_parallel_size {size}: {model_name_or_path!r}"
    if _plan(config) is None:
        raise UserError(
            f"{given} is a {config.model_type!r} model, whose layers tensor parallelism cannot share: "
            "DeepSpeed's AutoTP and transformers have no plan for them. Leave the flag out; --zero_stage 3 "
            "shards the weights of any model."
        )
    heads = {
        name: count
        for name in ("num_attention_heads", "num_key_value_heads")
        if (count := getattr(config, name, None)) is not None
    }
    for name, count in heads.items():
        if count % size:
            sizes = [str(n) for n in range(1, count + 1) if not any(c % n for c in heads.values())]
            raise UserError(
                f"{given} has {name} {count}, which is no multiple of {size}: every rank needs as many heads "
                f"as the others. Sizes for this model: {', '.join(sizes)}."
            )


def await_turn_to_load() -> None:
    """Wait until the ranks of this machine before this one have loaded a model and cut its layers.

    Every rank calls it before it loads the model, and `shard_over_tensor_ranks` after that ends its turn; in
    between it calls no collective.
    """
    tensor_groups(mesh().tensor.size)
    for _ in range(mesh().machine.rank):
        barrier(axis="world")


def shard_over_tensor_ranks(model: Any, size: int) -> None:
    """Leave each of `size` ranks its share of the layers' weights, in place, and let the next rank load.

    `model` is one of transformers or a `RewardModel`, with the same weights on every rank and its adapters.
    Of an adapter on a column B is shared, on a row A is; so its output has the layer's shape.
    """
    plan = _plan(model.config)
    assert plan is not None, "check_tensor_parallel lets no other model through"
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and output._forward_hooks:  # what is added to the rows of new tokens
        plan = {layer: kind for layer, kind in plan.items() if kind != "gathered column"}
    shared = {"column": "lora_B", "row": "lora_A"}
    patterns = {
        rf"(.*\.)?{_regex(layer)}(\.base_layer|\.{shared.get(kind, 'base_layer')}\.default)?\.weight$": kind
        for layer, kind in plan.items()
    }
    adapted: dict[str, nn.Module] = {}
    if lora_config(model) is not None:
        adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    shard_layers(model, patterns, adapted, size=size)
    give_back_memory()
    for _ in range(mesh().machine.rank, mesh().world.size):  # no machine has more ranks
        barrier(axis="world")


def _plan(config: PretrainedConfig) -> dict[str, str] | None:
    """The kind of each layer that the ranks share, by its name with * for a number; None where there is no
    plan for all layers of the family."""
    if config.model_type in OWN_PLANS:
        return dict(zip(OWN_PLANS[config.model_type], ("column", "column", "row", "row"), strict=True))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan or not set(plan.values()) <= {WHOLE, *KINDS}:
        return None
    of_head = {} if config.tie_word_embeddings else getattr(model_class, "_tp_plan", None) or {}
    return {name: KINDS[kind] for name, kind in {**plan, **of_head}.items() if kind in KINDS}


def _regex(layer: str) -> str:
    return re.escape(layer).replace(r"\*", r"\d+").replace(r"\[qkv\]", "[qkv]")
