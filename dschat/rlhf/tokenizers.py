"""The tokenizers of step 3: the actor's, and those of models that read answers as text."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from dschat.arguments import TokenizerArguments
from dschat.console import messages
from dschat.data.rows import Rows
from dschat.errors import UserError
from dschat.models.config import learned_positions
from dschat.models.tokenizer import first_difference, load_tokenizer, reads_otherwise
from dschat.rlhf.rewards.retokenize import Retokenizer
from dschat.rlhf.roles import REWARD_FLAG, EngineSpec, spec_of


@dataclass(frozen=True)
class RlhfTokenizers:
    """The tokenizers by which the models of step 3 read prompts and answers."""

    actor: PreTrainedTokenizerBase
    """Tokenizer of the actor, and of every model that reads the actor's tokens."""
    own: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    """By role, the tokenizers of models that read answers as text, in their own tokens and chat template."""

    def of(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer by which the model of that role reads."""
        return self.own.get(role, self.actor)

    @property
    def reward_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The reward model's own tokenizer, None where it reads the actor's tokens."""
        return self.own.get("reward")


def load_rlhf_tokenizers(
    specs: Sequence[EngineSpec], settings: TokenizerArguments
) -> tuple[RlhfTokenizers, list[EngineSpec]]:
    """The tokenizers of all models of step 3, and the specifications that follow from them.

    A critic that was to start from a reward model of another tokenizer starts from the actor. Raises
    `UserError` where a model has a tokenizer, or a template, that its `TokenizerRule` does not allow.
    """
    actor = specs[0]
    ours = load_tokenizer(actor.path, settings)
    own: dict[str, PreTrainedTokenizerBase] = {}
    for spec in specs:
        if spec.source != actor.role:
            tokenizer = _tokenizer_of(spec, actor, RlhfTokenizers(ours, own), settings)
            own |= {} if tokenizer is None else {spec.role: tokenizer}
    starts_elsewhere = "reward" in own
    settled = [
        spec.starting_from(actor) if starts_elsewhere and spec.tokenizer == "reward" else spec
        for spec in specs
    ]
    return RlhfTokenizers(ours, own), settled


def _tokenizer_of(
    spec: EngineSpec, actor: EngineSpec, known: RlhfTokenizers, settings: TokenizerArguments
) -> PreTrainedTokenizerBase | None:
    """The model's own tokenizer, None where it reads the actor's tokens. Raises `UserError`."""
    if spec.tokenizer == "reward":
        return None
    own = replace(settings, chat_template=None)  # the template that the model was trained with
    shares_template = spec.tokenizer in ("actor", "own tokens")
    theirs = load_tokenizer(spec.path, settings if shares_template else own)
    if spec.tokenizer == "actor":
        _require_same_tokens(spec, actor, known.actor, theirs)
        return None
    if spec.tokenizer == "own tokens":
        return load_tokenizer(spec.path, own) if _has_own_tokens(spec, actor, known.actor, theirs) else None
    if spec.tokenizer == "known":
        _require_known(spec, known, theirs)
    return theirs if reads_otherwise(known.actor, theirs) else None


def _require_same_tokens(
    spec: EngineSpec, actor: EngineSpec, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> None:
    difference = first_difference(ours, theirs)
    if difference is not None:
        raise UserError(
            f"{actor.flag} {actor.path!r} and {spec.flag} {spec.path!r} have different tokenizers: "
            f"{difference}. The {spec.name} reads the actor's tokens: give one that does. (The reward model "
            f"of {REWARD_FLAG} may have another.)"
        )


def _has_own_tokens(
    spec: EngineSpec, actor: EngineSpec, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> bool:
    difference = first_difference(ours, theirs)
    if difference is not None:
        messages.note(
            f"the {spec.name} {spec.path!r} has a tokenizer of its own ({difference}): it reads the "
            "answers as text, in its own tokens and template, and the critic starts from the actor with a "
            "fresh head."
        )
        return True
    if reads_otherwise(ours, theirs):
        raise UserError(
            f"{actor.flag} {actor.path!r} and {spec.flag} {spec.path!r} were saved with different chat "
            "templates: the reward model would judge texts of a form it has not seen. Train both with one "
            f"template (--chat_template in steps 1 and 2), or name the reward model with {REWARD_FLAG}, by "
            "which it reads answers in its own template."
        )
    return False


def _require_known(spec: EngineSpec, known: RlhfTokenizers, theirs: PreTrainedTokenizerBase) -> None:
    tokenizers = [known.actor, *filter(None, [known.reward_tokenizer])]
    if all(reads_otherwise(tokenizer, theirs) for tokenizer in tokenizers):
        raise UserError(
            f"{spec.flag} {spec.path!r} has another tokenizer or chat template than the actor and the reward "
            "model: give one that reads as one of them does."
        )


def build_retokenizer(
    specs: Sequence[EngineSpec], role: str, tokenizers: RlhfTokenizers, prompts: Rows | None
) -> Retokenizer | None:
    """What turns answers into the tokens of a model that reads text; None where it reads the actor's tokens.

    `prompts` are the data set of the rollouts' prompts, which such a model needs in its own tokens.
    """
    spec = spec_of(specs, role)
    if spec is None or role not in tokenizers.own:
        return None
    assert prompts is not None, "a model with its own tokenizer reads prompts anew"
    return Retokenizer(
        prompts, tokenizers.actor, tokenizers.own[role], max_tokens=learned_positions(spec.path)
    )
