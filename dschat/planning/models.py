"""The models of a run as a plan sees them: how many weights each has, and what its passes cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from dschat.arguments import DpoArguments, ModelArguments, RunArguments
from dschat.distributed.device import DTYPES
from dschat.distributed.heap import LARGE
from dschat.models.attention import way_of
from dschat.models.config import head_width, read_config
from dschat.models.lora import adapted_layers
from dschat.models.preflight import SCORES, meta_model_of
from dschat.models.reward_model import disable_gradient_checkpointing, enable_gradient_checkpointing
from dschat.planning.meta_pass import (
    NUM_LAYERS,
    PassShape,
    Rows,
    columns_of,
    layers_of,
    pass_shape,
    with_layers,
)

PERSISTENT = 10_000
"""Weights of the largest parameter that ZeRO-3 leaves whole: stage3_param_persistence_threshold."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model of a run, as a plan sees it: where its weights are, and how its engine is built."""

    role: str
    """Key of the model in dictionaries, in checkpoints and among the exported folders."""
    name: str
    """Name of the model in messages, without an article."""
    path: str
    """Folder or hub id of the weights."""
    head: str
    """Output layer of the engine."""
    trained: bool = False
    """Whether the engine has an optimiser."""
    settings: ModelArguments
    """Flags of the trained model that decide ZeRO stage and memory: its own, or those of the model it stands
    beside."""
    dtype: Literal["bf16", "fp16", "fp32"]
    """Precision of weights and activations."""
    offload: bool
    """Whether CPU memory holds the optimiser states, or the weights of a frozen model between uses."""
    load_in_4bit: bool = False
    """Whether the linear layers of the backbone are packed into 4 bits."""
    without_adapters_of: str | None = None
    """Role of a model that needs no engine beside it where it trains adapters alone: with the adapters off it
    computes what this model does."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the engine; a frozen model is either sharded (3) or whole on each rank (0)."""
        stage = self.settings.zero_stage
        return stage if self.trained or stage == 3 else 0


@dataclass(frozen=True)
class Counts:
    """Numbers of weights."""

    whole: int
    trained: int
    linear: int = 0
    """Of those in linear layers of the backbone, which tensor ranks share."""
    packed: int = 0
    """Frozen ones of those, which --load_in_4bit packs."""
    persistent: int = 0
    """Of those in small parameters, which ZeRO-3 does not shard."""
    small: int = 0
    """Of those in parameters that it shards, but that a CPU's heap has room for."""


class Mode(NamedTuple):
    """How a model makes passes."""

    trained: bool
    whole: bool
    """Whether all weights are trained; else adapters and the head of scores."""
    recomputes: bool
    """Whether the backward pass computes activations again."""


FROZEN = Mode(trained=False, whole=False, recomputes=False)


class _Adapted(nn.Module):
    """A linear layer with an adapter, as PEFT computes it."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Any = layer.weight
        outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
        self.base_layer = layer
        self.lora_A = nn.Linear(inputs, rank, **options)
        self.lora_B = nn.Linear(rank, outputs, **options)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's, times a number."""
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 1.0


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """One model of a run."""

    spec: Spec
    config: PretrainedConfig
    only_adapters: bool
    """Whether adapters alone are trained, by --only_optimize_lora."""

    @cached_property
    def structure(self) -> "Structure":
        """Its modules, which models of one configuration share, whether they are trained or not."""
        s = self.settings
        adapters = (s.lora_dim, s.lora_module_name, s.lora_config) if self._has_adapters else ()
        config = self.config.to_json_string(use_diff=False)
        return Structure((config, self.spec.head, self.spec.dtype, *map(str, adapters)), self)

    @property
    def mode(self) -> Mode:
        """How it makes passes."""
        recomputes = self.spec.trained and self.settings.gradient_checkpointing
        return Mode(self.spec.trained, not self.trains_adapters_only, recomputes)

    @property
    def _has_adapters(self) -> bool:
        return self.spec.trained and self.settings.uses_lora

    @property
    def settings(self) -> ModelArguments:
        """Flags of the model that it is, or stands beside."""
        return self.spec.settings

    @property
    def trains_adapters_only(self) -> bool:
        """Whether the model is trained, and nothing but its adapters are."""
        return self._has_adapters and self.only_adapters

    @property
    def tensor_ranks(self) -> int:
        """Ranks that share each layer."""
        return self.settings.tensor_parallel_size if self.spec.trained else 1

    @property
    def element(self) -> int:
        """Bytes of a number in the model's precision."""
        return DTYPES[self.spec.dtype].itemsize

    def build(self) -> nn.Module:
        """The model with few layers on the meta device."""
        config, dtype = with_layers(self.config), DTYPES[self.spec.dtype]
        is_reward_model = self.spec.head != "language_model"
        model = meta_model_of(config, is_reward_model=is_reward_model, dtype=dtype)
        if self._has_adapters:
            self._adapt(model)
        return model

    def _adapt(self, model: Any) -> None:
        layers, rank = adapted_layers(model, replace(self.settings, model_name_or_path=self.spec.path))
        for name, layer in layers.items():
            model.set_submodule(name, _Adapted(layer, rank))

    @property
    def counts(self) -> Counts:
        """How many weights."""
        return _counts(self.structure, self.mode)

    @property
    def largest(self) -> int:
        """Weights of the largest parameter that is trained."""
        return _largest(self.structure, self.mode)

    def shape(self, rows: Rows, *, trains: bool) -> PassShape:
        """What a pass over such rows holds; it is found once."""
        way = self.way(rows.length)
        columns = columns_of(_few_layers(self.structure), way, rows.length)
        return _shape(self.structure, self.mode if trains else FROZEN, columns, rows.all_have_logits, way)

    def way(self, length: int) -> str:
        """The attention of rows of so many tokens, by the names of `models.attention.WAYS`."""
        return way_of(self.config, self.settings.attn_implementation, DTYPES[self.spec.dtype], length)

    @property
    def cache_width(self) -> int:
        """Numbers per token that a KV cache holds, keys and values of all layers."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return 2 * self.config.num_hidden_layers * heads * head_width(self.config)


@dataclass(frozen=True)
class Structure:
    """The modules of a model."""

    key: tuple[str, ...]
    """What they depend on."""
    model: PlannedModel = field(compare=False)

    def prepared(self, mode: Mode) -> nn.Module:
        """The model with few layers, as it makes passes; there is one, whose mode the next call changes."""
        model: Any = _few_layers(self)
        for name, parameter in model.named_parameters():
            is_own = ".lora_" in name or name.startswith("v_head")
            others = mode.whole and not name.endswith(".base_layer.weight")
            parameter.requires_grad_(mode.trained and (is_own or others))
        (enable_gradient_checkpointing if mode.recomputes else disable_gradient_checkpointing)(model)
        return model


@cache
def _few_layers(structure: Structure) -> nn.Module:
    return structure.model.build()


@cache
def _counts(structure: Structure, mode: Mode) -> Counts:
    """How many weights: each further layer has those of the last."""
    few = structure.prepared(mode)
    whole, layer = _count(few), _count(layers_of(few)[-1])
    more = structure.model.config.num_hidden_layers - NUM_LAYERS
    return Counts(**{name: value + more * getattr(layer, name) for name, value in vars(whole).items()})


@cache
def _largest(structure: Structure, mode: Mode) -> int:
    return max(p.numel() for p in structure.prepared(mode).parameters() if p.requires_grad)


@cache
def _shape(structure: Structure, mode: Mode, columns: int, all_have_logits: bool, way: str) -> PassShape:
    return pass_shape(
        structure.prepared(mode),
        structure.model.config.num_hidden_layers,
        columns=columns,
        all_have_logits=all_have_logits,
        dtype=DTYPES[structure.model.spec.dtype],
        way=way,
        trains=mode.trained,
    )


def _count(model: nn.Module) -> Counts:
    parameters = list(model.parameters())
    linear = [
        m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in name
    ]
    return Counts(
        whole=_total(parameters),
        trained=_total([p for p in parameters if p.requires_grad]),
        linear=_total(linear),
        packed=_total([weight for weight in linear if not weight.requires_grad]),
        persistent=_total([p for p in parameters if p.numel() <= PERSISTENT]),
        small=_total([p for p in parameters if p.numel() > PERSISTENT and p.nbytes < LARGE]),
    )


def _total(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def planned_models(
    specs: Sequence[Spec], *, only_adapters: bool, configs: dict[str, PretrainedConfig] | None = None
) -> list[PlannedModel]:
    """The models of a run. `configs` are by path, in place of those in the folders.

    A reference that an actor of adapters alone makes needless is left out.
    """
    found: dict[str, PlannedModel] = {}
    for spec in specs:
        twin = found.get(spec.without_adapters_of or "")
        if twin is not None and twin.trains_adapters_only:
            continue
        scores = SCORES if spec.head != "language_model" else {}
        given = (configs or {}).get(spec.path)
        if given is None:
            config = read_config(spec.path, 0.0, **scores)
        else:
            kept = {
                name: value for name, value in given.to_dict().items() if not name.endswith(("2label", "2id"))
            }
            config = type(given).from_dict({**kept, **scores})
        found[spec.role] = PlannedModel(spec, config, only_adapters)
    return list(found.values())


def supervised_specs(args: Any) -> list[Spec]:
    """The models of the arguments of step 1, of step 2 or of DPO."""
    model: ModelArguments = args.model
    run: RunArguments = args.run
    head = "score" if args.step == "reward" else "language_model"
    trained = Spec(
        role="model",
        name="model",
        path=model.model_name_or_path,
        head=head,
        trained=True,
        settings=model,
        dtype=run.dtype,
        offload=run.offload,
        load_in_4bit=model.load_in_4bit,
    )
    if not isinstance(args, DpoArguments):
        return [trained]
    reference = replace(
        trained,
        role="reference",
        name="reference model",
        trained=False,
        offload=args.dpo.offload_reference_model,
        without_adapters_of="model",
    )
    return [trained, reference]
