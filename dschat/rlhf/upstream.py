"""The models that step 3 receives, and the promises that come with them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dschat.export.upstream import UpstreamModel, verify_model
from dschat.models import config, lora
from dschat.models.tensor_parallel import check_tensor_parallel
from dschat.rlhf.roles import LOADABLE_HEADS, EngineSpec
from dschat.rlhf.tokenizers import RlhfTokenizers


@dataclass(frozen=True)
class UpstreamModels:
    """The received models by the role whose folder they are: several roles may start from one."""

    by_role: Mapping[str, UpstreamModel]

    @property
    def all(self) -> list[UpstreamModel]:
        """Each received model once."""
        return list(self.by_role.values())

    def score_scale(self, normalization: str) -> tuple[float, float]:
        """Mean and standard deviation by which the reward model's scores are brought to 0 and 1.

        They are step 2's where `normalization` is step2, and change nothing otherwise.
        """
        return self.by_role["reward"].score_statistics() if normalization == "step2" else (0.0, 1.0)

    def check_templates(self, specs: Iterable[EngineSpec], tokenizers: RlhfTokenizers) -> None:
        """Raise `UserError` where a model would read another template than it was trained with."""
        for spec in specs:
            self.by_role[spec.source].check_template(tokenizers.of(spec.role))

    def check_outputs(self, specs: Iterable[EngineSpec], engines: Mapping[str, Any]) -> None:
        """Raise `UserError` where an engine does not compute what was promised. Every rank must call it.

        `engines` are by role. A model with a fresh head computes what nobody has promised.
        """
        for spec in specs:
            if spec.role in engines and not spec.fresh_head:
                self.by_role[spec.source].check_outputs(engines[spec.role])


def verify_models(specs: Sequence[EngineSpec]) -> UpstreamModels:
    """The received models, verified as far as files tell. Raises `UserError`.

    What step 2 found wrong with a reward model is repeated.
    """
    received = {
        spec.role: verify_model(spec.path, spec.flag, *LOADABLE_HEADS[spec.head])
        for spec in specs
        if spec.source == spec.role
    }
    for spec in specs:
        if spec.head == "score":
            received[spec.source].warn_of_verdict()
    return UpstreamModels(received)


def check_adapters(specs: Iterable[EngineSpec]) -> None:
    """Raise `UserError` for adapters that a trained model cannot get, and for layers that tensor ranks cannot
    share. Reads no weights."""
    for spec in specs:
        check_tensor_parallel(spec.path, spec.settings)
        if spec.trained:
            kind = "language" if spec.head == "language_model" else "reward"
            lora.check_adapters(**{kind: spec.starting_settings})


def check_positions(specs: Iterable[EngineSpec], tokenizers: RlhfTokenizers, num_tokens: int) -> None:
    """Raise `UserError` where answers of the actor could outgrow the positions of a model that reads them.

    A model that reads answers as text cuts what is too long for it.
    """
    paths = dict.fromkeys(spec.path for spec in specs if spec.role not in tokenizers.own)
    for path in paths:
        config.check_positions(
            path,
            num_tokens,
            "--max_prompt_seq_len or --max_answer_seq_len",
            "the longest prompt with the longest answer",
        )
