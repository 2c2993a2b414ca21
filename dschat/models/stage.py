"""A stage of a pipeline: transformers' model with some of its layers, which passes hidden states on.

The modules keep their names, so that files, adapters and exports know nothing of stages. A stage reads the
same rows as all others: it makes masks and positions itself, as its own forward pass does in any run.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dschat.distributed.mesh import Axis
from dschat.errors import UserError

LAYERS = ("layers", "h")
"""How a decoder calls the list of its layers."""

POSITIONS = ("embed_positions", "wpe")
"""Embeddings that are added to those of the tokens; other parts are before the layers or after them."""

BEFORE = ("drop", "emb_dropout", "embed_dropout", "project_in", "word_embeddings_layernorm")

AFTER = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "project_out")

EVERYWHERE = ("rotary_emb",)
"""Parts without weights that every stage needs."""


OF_TUPLES = ("bloom", "falcon", *(("gptj",) if Version(transformers.__version__) < Version("5.24") else ()))
"""Kinds of models whose layers return a tuple, the hidden states first."""


class Absent(nn.Module):
    """A layer of another stage: hidden states pass it unchanged."""

    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self._in_tuple = in_tuple

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden, None) if self._in_tuple else hidden


class ReceivedStates(nn.Module):
    """In the place of the token embeddings: the hidden states that the stage before has sent."""

    states: Tensor | None = None

    def __init__(self, num_embeddings: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings

    def forward(self, _: Tensor) -> Tensor:
        assert self.states is not None, "a later stage computes nothing before it has received hidden states"
        return self.states


class NoPositions(nn.Module):
    """In the place of position embeddings, which the first stage has added."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


def check_stages(model: Any, num_stages: int, new_tokens: Callable[[int], list[int]]) -> None:
    """Raise `UserError` where a model cannot be divided into so many stages; one without weights will do.

    `new_tokens` says of a number of embeddings which tokens' rows are to be trained beside adapters.
    """
    flag, kind = f"--pipeline_parallel_size {num_stages}", model.config.model_type
    try:
        decoder, name = _decoder_of(model)
    except StopIteration:
        raise UserError(f"{flag} is not for a {kind!r} model: it has no list of layers.") from None
    embeddings = _backbone(model).get_input_embeddings()
    known = (*POSITIONS, *BEFORE, *AFTER, *EVERYWHERE, name)
    parts = decoder.named_children()
    others = [child for child, part in parts if child not in known and part is not embeddings]
    if others or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = ", ".join(others) or "its own code"
        raise UserError(
            f"{flag} is not for a {kind!r} model: in which stage {what} belongs is not known; use "
            "--zero_stage 3 or --tensor_parallel_size to share its weights out."
        )
    if new_tokens(embeddings.num_embeddings):
        raise UserError(
            f"{flag} and --only_optimize_lora cannot be combined here: some tokens are new to the model, and "
            "no stage trains their rows alone; leave out --only_optimize_lora."
        )
    num_layers = len(getattr(decoder, name))
    if num_layers < num_stages:
        raise UserError(f"{flag} is more than the model's {num_layers} layers.")


def built_as_stage(model_class: Any, config: PretrainedConfig, stage: Axis) -> Any:
    """A class whose instances lose what other stages have when they are constructed, before weights are read.

    `from_pretrained` then reads the weights of this stage from disk and no others.
    """
    if model_class is AutoModelForCausalLM:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def construct(self: Any, config: PretrainedConfig, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        _cut(self, stage)

    return type(
        model_class.__name__, (model_class,), {"__init__": construct, "__module__": model_class.__module__}
    )


def finish_stage(model: Any, stage: Axis | None) -> None:
    """Drop what a loaded stage has no use for: a reward model's head, embeddings that only tied weights."""
    if stage is None:
        return
    if stage.rank < stage.size - 1 and hasattr(model, "rwtransformer"):
        del model.v_head
    backbone = _backbone(model)
    if stage.rank > 0 and isinstance(backbone.get_input_embeddings(), nn.Embedding):
        backbone.set_input_embeddings(ReceivedStates(backbone.get_input_embeddings().num_embeddings))


def tied_embedding(model: Any, stage: Axis) -> nn.Module | None:
    """Of a language model with tied weights, what the first stage embeds with and the last predicts with."""
    if hasattr(model, "rwtransformer") or not model.config.get_text_config().tie_word_embeddings:
        return None
    ends = {0: model.get_input_embeddings, stage.size - 1: model.get_output_embeddings}
    return ends[stage.rank]() if stage.rank in ends else None


def continue_from(model: Any, hidden: Tensor) -> None:
    """Let a later stage's next forward pass start from these hidden states [B, L, D]; the first embeds."""
    place = _backbone(model).get_input_embeddings()
    if isinstance(place, ReceivedStates):
        place.states = hidden


def own_layers(num_layers: int, stage: Axis) -> range:
    """The layers of a stage: as many in each, one more in the first of them where they do not divide."""
    share, rest = divmod(num_layers, stage.size)
    start = stage.rank * share + min(stage.rank, rest)
    return range(start, start + share + (stage.rank < rest))


def _cut(model: Any, stage: Axis) -> None:
    """Take what other stages have out of a model; its tied weights stay until they are read."""
    decoder, name = _decoder_of(model)
    layers, is_last = getattr(decoder, name), stage.rank == stage.size - 1
    own = own_layers(len(layers), stage)
    for number in range(len(layers)):
        if number not in own:
            layers[number] = Absent(in_tuple=model.config.model_type in OF_TUPLES)
    is_tied = bool(model.all_tied_weights_keys)
    for child in [child for child, part in decoder.named_children() if part is not None]:
        if (child in BEFORE and stage.rank > 0) or (child in AFTER and not is_last):
            setattr(decoder, child, nn.Identity())
        if child in POSITIONS and stage.rank > 0:
            setattr(decoder, child, NoPositions())
    if stage.rank > 0 and not (is_last and is_tied):
        model.set_input_embeddings(ReceivedStates(model.get_input_embeddings().num_embeddings))
    if not is_last:
        model.all_tied_weights_keys = {}
        model._tied_weights_keys = {}  # by which a vocabulary that grows is tied again
        if model.get_output_embeddings() is not None:
            model.set_output_embeddings(None)


def _backbone(model: Any) -> Any:
    """The model of transformers that has the embeddings: of a reward model what is below its head."""
    return getattr(model, "rwtransformer", model)


def _decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that has the list of layers, and the list's name in it."""
    places = ((module, name) for module in model.modules() for name in LAYERS)
    return next(place for place in places if isinstance(getattr(*place, None), nn.ModuleList))
